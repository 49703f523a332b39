"""Stop when the student gets no better, and give back the best one that there was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field, PlainSerializer, PlainValidator
from transformers import TrainerCallback

from ..anatomy.kept import modes_kept, random_state_kept
from ..compressor import Settings
from ..errors import ConfigError
from ..registry import tasks
from .checkpoints import load_weights, save_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _read_task(given: Any) -> Any:
    if isinstance(given, Mapping) and "data_sha256" in given:
        raise ConfigError(
            "EarlyStopping.task must be passed as an object where its data is no file, got a recipe's account of one; "
            "pass for instance TextClassification(dev_rows)."
        )
    if isinstance(given, Mapping):
        given = tasks.create(given)
    if given is not None and not (hasattr(given, "evaluate") and hasattr(given, "check")):
        raise ConfigError(
            f"EarlyStopping.task must be a task, its dict or None, got {given!r:.80}; for instance "
            f"TextClassification('dev.tsv')."
        )
    return given


def _write_task(task: Any) -> dict[str, Any] | None:
    """Return a task as a recipe holds it: with its file, or with the hash of data that is in no file."""
    if task is None:
        return None
    fields = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(task)
        if field.name not in {"data", "tokenizer"} and getattr(task, field.name) != field.default
    }
    data = {"data": str(task.data)} if isinstance(task.data, (str, Path)) else {"data_sha256": task.data_hash}
    return {"name": task.name, **data, **fields}


class EarlyStopping(Settings):
    """When training stops before its end, and what is given back: the student that was best on data held out.

    The student is evaluated at even distances and at the end. After `patience` evaluations in a row that were no better
    than the best one before, training stops. Whenever it ends, the weights of the best evaluation are the result.

    Args:
        task: an evaluation task with data of its own, such as `TextClassification("dev.tsv")`, or its dict; its first
            metric decides. None: the training's own loss, on rows held out of the training data.
        held_out: share of the rows that is held out where there is no task, in (0, 1).
        patience: evaluations without a better one until training stops.
        evaluations: how many there are if training goes to its end.

    Example:
        >>> EarlyStopping(patience=0)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: EarlyStopping.patience must be in (0, inf), got 0.
    """

    task: Annotated[Any, PlainValidator(_read_task), PlainSerializer(_write_task)] = Field(
        None, description="a task with data of its own; None: the loss on rows held out"
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the rows held out where there is no task")
    patience: int = Field(3, gt=0, description="evaluations without a better one until training stops")
    evaluations: int = Field(10, gt=0, description="evaluations of a training that goes to its end")


def held_out_rows(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split `rows` at random into those to train on and those held out, at least one each.

    Raises:
        ConfigError: there are fewer than two rows.

    Example:
        >>> train, held = held_out_rows(list(range(20)), 0.1, seed=0)
        >>> len(train), len(held)
        (18, 2)
    """
    if len(rows) < 2:
        raise ConfigError(
            f"EarlyStopping.held_out must have at least 2 rows to split, got {len(rows)}; pass more data."
        )
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    chosen = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [row for index, row in enumerate(rows) if index in chosen]


class KeepBest(TrainerCallback):
    """Evaluate at even distances, keep the best weights in the output folder, stop without a better one.

    All that it knows stands in the trainer's log, so that a training that was killed goes on with it.

    Args:
        settings: how often, and how patient.
        model: the student.
        measure: returns how good it is, and whether more is better.
    """

    def __init__(
        self, settings: EarlyStopping, model: PreTrainedModel, measure: Callable[[], tuple[float, bool]]
    ) -> None:
        self._settings, self._model, self._measure = settings, model, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Evaluate if it is time."""
        every = math.ceil(state.max_steps / self._settings.evaluations)
        if state.global_step % every and state.global_step < state.max_steps:
            return
        with random_state_kept(), modes_kept(self._model), torch.no_grad():
            self._model.eval()
            # One process decides: the last digit of a score may differ between them.
            score, higher = broadcast_object_list(list(self._measure()))
        before = [entry["evaluation"] for entry in state.log_history if "evaluation" in entry]
        state.log_history.append({"evaluation": score, "step": state.global_step})
        best = (max if higher else min)(before, default=None)
        if best is None or (score > best if higher else score < best):
            save_weights(self._model, _best_file(args))
        elif len(before) - before.index(best) >= self._settings.patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Take the best weights."""
        load_weights(self._model, _best_file(args))


def _best_file(args: Any) -> Path:
    # Processes need not share a disk, and all have the same weights.
    return Path(args.output_dir) / f"best-{args.process_index}.safetensors"
