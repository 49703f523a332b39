"""What the original comes to and scores, and what is refused for it before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ..anatomy.footprint import disk_bytes
from ..calibration.replay import Forward
from ..errors import ConfigError
from ..evaluation.latency import measure_latency
from ..evaluation.units import bytes_text, milliseconds_text
from .recovery import length_of
from .survey import texts_of
from .trial import Cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..compressor import Context
    from ..evaluation.tasks import Task, TaskScore
    from .budget import Budget
    from .targets import Targets

# How often the examples held out are scored in the last run: the base, a cut or two, the training, the rounding.
_SCORED = 5
# Share of the budget that may go into what no search can do without; the rest is for building and training.
_SHARE = 0.5
# Texts on which a pass of the teacher is timed.
_TEXTS = 16


@dataclass(frozen=True)
class Original:
    """The base of a search, measured.

    Attributes:
        cost: what it comes to.
        base: its score on the examples to choose by.
        reading: seconds that a pass takes, a token.
        choosing: seconds that it takes to score a model on the examples to choose by.
        verifying: seconds for those that the loss is told on.
    """

    cost: Cost
    base: TaskScore
    reading: float
    choosing: float
    verifying: float

    @property
    def last(self) -> float:
        """Seconds of the scoring in the last run, about."""
        return _SCORED * self.verifying


def measure(
    model: PreTrainedModel, choose: Task, verify: Task, context: Context, targets: Targets, clock: Budget
) -> Original:
    """Measure the original, and score it on both parts of the task: an example that breaks either breaks it here.

    Args:
        model: the original.
        choose: the part of the task to choose by.
        verify: the part that no choice sees; may be the same.
        context: data and tokenizer.
        targets: what is asked for.
        clock: of the search.

    Raises:
        ConfigError: it is as small and as fast as is asked for, has no score to lose, or the budget is too short to
            score what a search makes of it.
        Exception: whatever the task breaks on.
    """
    cost = Cost(disk_bytes(model), _milliseconds(model, targets))
    _refuse_met(targets, cost)
    # Trainer and accelerate import most of what is installed, for seconds: now, while a budget can still be refused.
    import_module("transformers.trainer")
    tokenizer = context.tokenizer
    assert tokenizer is not None
    base, choosing = _scored(choose, model, tokenizer, clock, "chains are chosen by")
    verifying = choosing
    if verify is not choose:
        _, verifying = _scored(verify, model, tokenizer, clock, "the loss is told on")
    # A first pass also loads code; the part to choose by is the smaller one.
    choosing = min(choosing, verifying)
    found = Original(cost, base, _reading(model, context, length_of(choose), clock), choosing, verifying)
    _refuse_short(model, targets, found, clock)
    return found


def _scored(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, clock: Budget, use: str
) -> tuple[TaskScore, float]:
    begin = clock.spent()
    score = task.evaluate(model, tokenizer, progress=False)
    # Nothing can be held against it: a correlation with labels that are all alike is no number.
    if not math.isfinite(score.value):
        raise ConfigError(
            f"fit.task must give the original a finite {score.primary}, got {score.value} on the {len(score.examples)} "
            f"examples that {use}; pass more examples, with labels that differ."
        )
    return score, clock.spent() - begin


def _reading(model: PreTrainedModel, context: Context, length: int, clock: Budget) -> float:
    batches = texts_of(model, context, _TEXTS, length)
    forward = Forward(model, all_logits=True)
    for _ in range(2):  # the first one finds its weights and its memory
        begin = clock.spent()
        for batch in batches:
            forward(batch)
    return (clock.spent() - begin) / sum(batch["input_ids"].numel() for batch in batches)


def _refuse_met(targets: Targets, own: Cost) -> None:
    """Refuse targets that the original meets: whatever were done to it would only lose."""
    if targets.hold(own.bytes, own.ms, 1.0):
        is_now = bytes_text(own.bytes) + ("" if own.ms is None else f" and {milliseconds_text(own.ms)} a pass")
        raise ConfigError(
            f"fit must be asked for less than the model is, got {targets.text()}: it is {is_now} already, there is "
            f"nothing to do."
        )


def _refuse_short(model: PreTrainedModel, targets: Targets, found: Original, clock: Budget) -> None:
    """Refuse a budget that scoring would fill: one chain that is tried, and the result, step by step."""
    spent, scoring = clock.spent(), found.choosing + found.last
    least = math.ceil((spent + scoring) / _SHARE)
    if targets.budget < least:
        raise ConfigError(
            f"fit.budget must be at least about {least} s for {type(model).__name__} and this task on this machine, "
            f"got {targets.budget:g} s: measuring the original took {spent:.1f} s, scoring what comes of it takes "
            f"{scoring:.1f} s, and as much must be left to cut and to train; give it more time, or the task fewer "
            f"examples."
        )


def _milliseconds(model: PreTrainedModel, targets: Targets) -> float | None:
    if not targets.timed:
        return None
    rows, tokens = targets.shape
    return measure_latency(model, batch_size=rows, tokens=tokens, seconds=1.0).median_ms
