"""When a training stops before its end: the settings, and the rows held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PlainSerializer, PlainValidator

from ..compressor import Settings
from ..errors import ConfigError
from ..registry import tasks


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
        evaluations: how many there are if training goes to its end; one a step at most.

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


def check_held_out(rows: Sized) -> None:
    """Refuse rows that are too few to hold one out.

    Raises:
        ConfigError: there are fewer than two.
    """
    if len(rows) < 2:
        raise ConfigError(
            f"EarlyStopping.held_out must have at least 2 rows to split, got {len(rows)}; pass more data."
        )


def held_out_rows(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split `rows` at random into those to train on and those held out, at least one each.

    Raises:
        ConfigError: there are fewer than two rows.

    Example:
        >>> train, held = held_out_rows(list(range(20)), 0.1, seed=0)
        >>> len(train), len(held)
        (18, 2)
    """
    check_held_out(rows)
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    chosen = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [row for index, row in enumerate(rows) if index in chosen]
