"""What a task said of the base and of kept stages, on disk: a stage that is kept is not evaluated again."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from .anatomy.digest import tokenizer_digest
from .errors import CheckpointError
from .evaluation.fidelity import Fidelity
from .evaluation.tasks import TaskScore
from .places import told_if_unwritable
from .tensor_files import mark_used, read_sealed, write_sealed

if TYPE_CHECKING:
    from .evaluation.tasks import Task

_LOG = logging.getLogger(__name__)
SCORES = "scores"
"""Where they are in a `resume_dir`."""


@dataclass(frozen=True)
class Measured:
    """What a task says of one model.

    Attributes:
        score: its score.
        fidelity: how closely its answers are the base's, where both ran side by side.
    """

    score: TaskScore
    fidelity: Fidelity | None = None


class Scores:
    """The scores of one task in a `resume_dir`.

    Args:
        folder: the `resume_dir`.
        task: the task; of one that is not told by its data and settings (a function of the user's) nothing is kept.
    """

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder, self._task = folder / SCORES, _identity(task)

    def find(self, key: str, *, fidelity: bool) -> Measured | None:
        """Return what was kept under `key`, or None.

        Args:
            key: the hash of all that the model has come from, `Stages.key`.
            fidelity: whether the base must have run beside it.
        """
        file = self._file(key, fidelity)
        if file is None or not file.is_file():
            return None
        try:
            told = read_sealed(file)
            mark_used(file)
            found = told["fidelity"] and Fidelity.model_validate(told["fidelity"])
            return Measured(TaskScore.model_validate(told["score"]), found or None)
        except (CheckpointError, ValidationError, KeyError) as error:
            _LOG.warning("resume_dir: evaluated again: %s", error)
            return None

    def keep(self, key: str, measured: Measured, *, fidelity: bool) -> None:
        """Keep what was measured, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        file = self._file(key, fidelity)
        if file is None:
            return
        with told_if_unwritable(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
        close = measured.fidelity.model_dump(mode="json") if measured.fidelity is not None else None
        write_sealed({"score": measured.score.model_dump(mode="json"), "fidelity": close}, file)

    def _file(self, key: str, fidelity: bool) -> Path | None:
        if self._task is None:
            return None
        name = hashlib.sha256(f"{key} {self._task} {fidelity}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.json"


def _identity(task: Task) -> str | None:
    """Return a hash of what is asked; None where data and settings do not tell it."""
    apart = {"data", "split", "tokenizer"}
    settings = {one.name: getattr(task, one.name) for one in fields(task) if one.name not in apart}
    if not all(is_dataclass(example) for example in task.examples):
        return None
    words = tokenizer_digest(task.tokenizer) if task.tokenizer is not None else None
    kind = f"{type(task).__module__}.{type(task).__qualname__}"
    try:
        told = json.dumps([kind, task.data_hash, settings, words], sort_keys=True)
    except TypeError:
        return None
    return hashlib.sha256(told.encode()).hexdigest()
