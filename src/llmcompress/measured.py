"""One step of a run, done and measured: seeded, its outputs finite, its size, its score and its speed."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from .anatomy.empty import weightless
from .anatomy.footprint import Footprint, footprint
from .anatomy.kept import modes_kept, random_state_kept
from .anatomy.module_sizes import module_sizes
from .anatomy.probe import probe_inputs, probe_outputs
from .compressor import Action, Compressor, Context, Outline
from .data import longest_input
from .errors import NothingToCompressError, UnsupportedModelError, VerificationError
from .evaluation.latency import Speedup, measure_latencies, speedup
from .quantization.hf import mark
from .result import TOLD_ZEROS, StepRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of the row on which a finished chain is timed against its base.
SPEED_TOKENS = 64
_UNLOADABLE = "a folder of this model will not load by from_pretrained"


def plan_step(step: Compressor, model: PreTrainedModel, context: Context) -> list[Action]:
    """Return the plan of a step for the model as it stands before it.

    Raises:
        NothingToCompressError: it would touch nothing.
    """
    actions = step.plan(model, context)
    if not any(action.touched for action in actions):
        reasons = sorted({action.reason or "" for action in actions})
        raise NothingToCompressError(
            f"{type(step).__name__} finds nothing to compress in {type(model).__name__}: "
            f"{'; '.join(reasons) or 'its plan is empty'}."
        )
    return actions


def outline_step(step: Compressor, model: PreTrainedModel, context: Context) -> Outline | None:
    """Have a step change the sizes of a model without weights, and the config tell them, as a run does it."""
    context.told.clear()
    context.corrected.clear()
    before = shapes(model)
    outline = step.outline(model, context)
    if outline is not None and shapes(outline.model) != before:
        mark_sizes(outline.model, context)
    return outline


def check_chain(steps: Sequence[Compressor], model: PreTrainedModel, context: Context) -> list[Action]:
    """Return the plan of the first step; refuse a chain of which a step cannot take what the steps before it leave.

    Later steps are planned on the sizes that the earlier ones will leave; on `model` where these are not known exactly.

    Raises:
        CompressionError: what the step would raise once its turn came.
    """
    first = plan_step(steps[0], model, context)
    ahead = replace(context, history=[], told=[], corrected=set(), progress=False)
    current: PreTrainedModel | None = weightless(model) if len(steps) > 1 else None
    with seeded(context.seed):
        for earlier, later in itertools.pairwise(steps):
            outline = None if current is None else outline_step(earlier, current, ahead)
            current = None if outline is None or outline.estimated is not None else outline.model
            if current is None:
                plan_step(later, model, context)
            else:
                plan_step(later, current, ahead)
    return [*first, *unloadable(model)]


def unloadable(model: PreTrainedModel) -> list[Action]:
    """Say why no folder of a float model will load, where its modules are not those that its config builds."""
    try:
        module_sizes(model)
    except UnsupportedModelError as error:
        return [Action(path="", reason=f"{_UNLOADABLE}: {error}")]
    return []


def run_step(
    step: Compressor, model: PreTrainedModel, actions: Sequence[Action], context: Context
) -> tuple[PreTrainedModel, StepRecord]:
    """Run a step, and account for it but for score and speed.

    Args:
        step: what to do.
        model: may be changed in place.
        actions: its plan.
        context: of the run.

    Returns:
        The model that the step returned, in eval mode, and the record.
    """
    context.told.clear()
    context.corrected.clear()
    model.eval()
    before = shapes(model)
    start = time.perf_counter()
    with seeded(context.seed):
        model = step.compress(model, context)
    seconds = time.perf_counter() - start
    model.eval()
    return model, account(step, model, before, actions, context, seconds)


def account(
    step: Compressor,
    model: PreTrainedModel,
    before: dict[str, torch.Size],
    actions: Sequence[Action],
    context: Context,
    seconds: float,
) -> StepRecord:
    """Return the record of a step that has run; where it changed shapes, the model's config now tells them.

    Args:
        step: what was done.
        model: what came of it.
        before: the model's `shapes` before it.
        actions: its plan.
        context: holds what it told.
        seconds: its time.
    """
    if shapes(model) != before:
        mark_sizes(model, context)
    found = context.findings(actions)
    return StepRecord(
        step=step.to_dict(),
        seconds=seconds,
        footprint=footprint(model),
        touched=[action for action in found if action.touched],
        left=[action for action in found if not action.touched],
    )


def mark_sizes(model: PreTrainedModel, context: Context) -> None:
    """Have the config tell what shapes the model has now, so that whatever saves it writes a folder that loads."""
    try:
        mark(model)
    except UnsupportedModelError as error:
        context.tell(Action(path="", reason=f"{_UNLOADABLE}: {error}"))


def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shape of each parameter and buffer."""
    return {name: tensor.shape for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())}


def is_finite(model: PreTrainedModel) -> bool:
    """Whether the model's outputs for a probe are; False also where there is no probe for it."""
    try:
        with modes_kept(model):
            # One row: classifiers without a padding token take no more.
            outputs = probe_outputs(model, probe_inputs(model, rows=1))
    except UnsupportedModelError:
        return False  # neither text nor images: there is no probe, and the strategies' own checks stand alone
    return bool(torch.isfinite(outputs).all())


def refuse_broken(step: Compressor, model: PreTrainedModel) -> None:
    """Withhold a model with NaN or infinite outputs.

    Raises:
        VerificationError: it is one.
    """
    if not is_finite(model):
        raise VerificationError(
            f"{type(step).__name__} left {type(model).__name__} with NaN or infinite outputs; the result is "
            f"withheld. Compress less, or leave layers out with skip=(...)."
        )


def differs(before: Footprint, after: Footprint) -> bool:
    """Tell whether a step changed more than values: then its speed is worth a measurement."""
    sizes = (before.parameters, before.disk_bytes) != (after.parameters, after.disk_bytes)
    return sizes or abs(before.zeros - after.zeros) > TOLD_ZEROS


def speed_against(base: PreTrainedModel, candidate: PreTrainedModel) -> Speedup | None:
    """Time base and candidate in turns, on one row of tokens or one image; None for what reads something else."""
    tokens = min(SPEED_TOKENS, longest_input(base) or SPEED_TOKENS)
    try:
        # Zero seconds ask for the fewest rounds that still give an interval.
        timed = measure_latencies({"base": base, "candidate": candidate}, tokens=tokens, seconds=0, progress=False)
    except UnsupportedModelError:
        return None
    found = speedup(timed["base"], timed["candidate"])
    return found.model_copy(update={"tokens": 0}) if base.main_input_name == "pixel_values" else found


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch inside, and give the caller's random state back."""
    with random_state_kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
