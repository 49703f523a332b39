"""Long runs: kept in a file as they finish, and two ways of training compared example by example over all seeds."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmcompress.evaluation.statistics import PairedTest, paired_metrics

Scores = list[float]
"""One number an example: right or wrong, or a loss."""


class Runs:
    """Finished runs in a file, one JSON object a line, so that a benchmark that was stopped goes on where it was.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._found = {_key(run["what"]): run["scores"] for run in map(json.loads, lines)}

    def scores(self, what: Mapping[str, Any], run: Callable[[], Sequence[float]]) -> Scores:
        """Return the scores of the run that `what` describes: from the file, or of `run()`, which is kept then."""
        return self.kept(what, lambda: [round(float(score), 6) for score in run()])

    def found(self, what: Mapping[str, Any]) -> Any:
        """Return what the run that `what` describes found, or None where it was not finished."""
        return self._found.get(_key(what))

    def kept(self, what: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Return what the run that `what` describes found, of what JSON can hold; as `scores`."""
        key = _key(what)
        if key not in self._found:
            # As it is read again: tuples are lists there.
            self._found[key] = json.loads(json.dumps(run()))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'what': what, 'scores': self._found[key]})}\n")
        return self._found[key]


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)


def difference(ours: Sequence[Scores], theirs: Sequence[Scores]) -> PairedTest:
    """Test the difference of two means over all seeds, paired by example.

    The seeds of one example are drawn together: they are no independent examples.

    Args:
        ours: for each seed the score of each example.
        theirs: the other way's, in the same order.
    """
    sides = [np.array(scores, float).ravel() for scores in (theirs, ours)]
    base, candidate = (lambda counts, side=side: {"mean": counts @ side / counts.sum(1)} for side in sides)
    groups = list(range(len(ours[0]))) * len(ours)
    return paired_metrics(base, candidate, len(sides[0]), {"mean": "difference"}, groups=groups)[0]
