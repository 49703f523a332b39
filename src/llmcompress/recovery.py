"""Distillation put behind every step that changes weights, so that each gives back what it lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from .compressor import Action, Compressor, Rounds
from .distillation.distillation import KnowledgeDistillation
from .errors import ConfigError
from .registry import compressors


def read_recovery(recover: Any) -> KnowledgeDistillation | None:
    """Return the recovery that a step, its dict or its name stands for.

    Raises:
        ConfigError: it is no distillation, or one that makes a student of its own.
    """
    if isinstance(recover, (Mapping, str)):
        recover = compressors.create(recover)
    if recover is None:
        return None
    if not isinstance(recover, KnowledgeDistillation):
        raise ConfigError(f"Pipeline.recover must be a KnowledgeDistillation, its dict or None, got {recover!r}.")
    if recover.student is not None:
        raise ConfigError(
            f"Pipeline.recover must train the model as it is, got student={recover.student!r}; make the student in a "
            f"step of its own."
        )
    return recover


def with_recovery(steps: Sequence[Compressor], recover: KnowledgeDistillation) -> Iterator[Compressor]:
    """Yield `steps` with `recover` behind each that leaves float weights, and before a quantization it can train for.

    Weights that were quantized cannot be trained: there the recovery stands before, with `quantize_for` that step. No
    recovery is put beside a distillation that is there already.

    Example:
        >>> import llmcompress as lc
        >>> chain = [lc.MagnitudePruning(), lc.WandaPruning(), lc.DynamicQuantization()]
        >>> found = list(with_recovery(chain, lc.KnowledgeDistillation(steps=5)))
        >>> [type(step).__name__ for step in found[:3]]
        ['MagnitudePruning', 'KnowledgeDistillation', 'WandaPruning']
        >>> found[3].quantize_for == found[4] == lc.DynamicQuantization()
        True
    """
    previous: Compressor | None = None
    for step, following in zip_longest(steps, steps[1:]):
        ready = isinstance(previous, KnowledgeDistillation)
        if _trainable_for(step) and not ready:
            previous = _trained_for(step, recover)
            yield previous
        yield step
        previous = step
        distilled = isinstance(step, KnowledgeDistillation) or isinstance(following, KnowledgeDistillation)
        if (
            step.terminal
            or distilled
            or (following is not None and following.terminal and isinstance(following, Rounds))
        ):
            continue
        previous = recover
        yield previous


def unrecovered(step: Compressor) -> list[Action]:
    """Return the remark on a step whose loss no recovery can give back; empty where one can."""
    if not step.terminal or _trainable_for(step):
        return []
    reason = "not recovered: the weights are no longer float, and how they are rounded depends on more than themselves"
    return [Action(path="", reason=reason)]


def _trainable_for(step: Compressor) -> bool:
    return step.terminal and isinstance(step, Rounds)


def _trained_for(step: Compressor, recover: KnowledgeDistillation) -> KnowledgeDistillation:
    return recover if recover.quantize_for is not None else recover.model_copy(update={"quantize_for": step})
