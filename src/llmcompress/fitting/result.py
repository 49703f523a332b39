"""What `lc.fit` returns: the model with its report, the recipe, what was tried, and whether it is as asked for."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import METADATA_FILE, read_metadata
from ..evaluation.table import Table
from ..evaluation.units import bytes_text, json_numbers, milliseconds_text
from ..pipeline import Pipeline
from ..result import Result
from ..tensor_files import write_json
from .targets import Targets, drop_text
from .trial import Trial

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskScore

RECIPE_FILE = "recipe.yaml"
"""What the recipe is called in the folder of a result."""


@dataclass(repr=False)
class FitResult(Result):
    """A compressed model that `lc.fit` found.

    Attributes:
        met: whether the targets hold, measured, and the loss on examples that no choice has seen is within `max_drop`.
        sentence: the outcome in words; where it is not what was asked for, what is the nearest that was found.
        recipe: the chain; `recipe.to_yaml("recipe.yaml")`, and `lc.compress(model, recipe, data=...)` makes it again.
        targets: what was asked for.
        trials: every chain that was run, in order; the last one is the result. Those that broke have an `error`.
        drop: what the result loses on the examples held out, in the unit of the task's primary metric.
        noise: half of the 95 % interval of `drop`, from pairs of answers to the same examples.
        disk_bytes: of the result's safetensors file.
        latency_ms: of a pass at the shape of the targets; None where no time was asked for.
        speedup: against the base, measured in turns; None likewise.
        seconds: that the search took.
        stages: what was done, in order, and the seconds that it took.
        notes: what could not be tried, and why; and what the budget was too short for.
    """

    met: bool = False
    sentence: str = ""
    recipe: Pipeline = field(default_factory=Pipeline)
    targets: Targets | None = None
    trials: Sequence[Trial] = ()
    drop: float = 0.0
    noise: float = 0.0
    disk_bytes: int = 0
    latency_ms: float | None = None
    speedup: float | None = None
    seconds: float = 0.0
    stages: Sequence[tuple[str, float]] = ()
    notes: Sequence[str] = ()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder that every result writes, and the recipe into it, as `recipe.yaml`.

        Raises:
            CheckpointError: the folder holds something else.
        """
        written = super().save_pretrained(folder)
        content = read_metadata(written)
        # Listed before it is there: a folder whose writer was killed in between can be written anew.
        write_json({**content, "files": sorted([*content["files"], RECIPE_FILE])}, written / METADATA_FILE)
        self.recipe.to_yaml(written / RECIPE_FILE)
        return written

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain values: the outcome, the recipe, the chains that were run, the report."""
        return {
            "met": self.met,
            "sentence": self.sentence,
            "drop": self.drop,
            "noise": self.noise,
            "disk_bytes": self.disk_bytes,
            "latency_ms": self.latency_ms,
            "speedup": self.speedup,
            "seconds": self.seconds,
            "recipe": self.recipe.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "notes": list(self.notes),
            "report": self.report.model_dump(mode="json"),
        }

    def to_json(self) -> str:
        """Return `to_dict()` as JSON, with words for the numbers that JSON has not: a perplexity may be infinite."""
        return json.dumps(json_numbers(self.to_dict()), indent=2, allow_nan=False)

    @property
    def table(self) -> Table:
        """A row for each chain that was run."""
        base = self.report.base_score
        assert base is not None
        timed = any(trial.cost is not None and trial.cost.ms is not None for trial in self.trials)
        header = ["chain", "run", "steps", "on disk", *(["latency", "faster"] if timed else []), "loss", "seconds"]
        rows = [_row(trial, base, timed) for trial in self.trials]
        failed = [f"{trial.chain.name} failed: {trial.error}" for trial in self.trials if trial.error]
        return Table(header, rows, title="Tried", notes=[*dict.fromkeys(failed), *self.notes])

    def __str__(self) -> str:
        return f"{self.sentence}\n\n{self.table.text()}\n\n{self.report}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.sentence)}</p>{self.table.html()}{self.report._repr_html_()}"


def _row(trial: Trial, base: TaskScore, timed: bool) -> list[str]:
    cost = trial.cost
    speed = ["", ""]
    if cost is not None and cost.ms is not None and cost.speedup is not None:
        speed = [milliseconds_text(cost.ms), f"{cost.speedup:.2f}x"]
    loss = "failed"
    if trial.drop is not None:
        loss = f"{drop_text(trial.drop, base)} ± {drop_text(trial.noise, base).removesuffix(' points')}"
    return [
        trial.chain.name,
        trial.stage,
        str(trial.steps or ""),
        bytes_text(cost.bytes) if cost is not None else "",
        *(speed if timed else []),
        loss,
        f"{trial.seconds:.0f}",
    ]
