"""Which blocks go by the criteria that ask data; each one is told to the report with its number."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..calibration.replay import Batch
from ..compressor import Action, Context
from ..errors import CompressionError, UnsupportedModelError
from .block_choice import Choice, complement, deviation
from .block_importance import losses_without, turning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def most_influence(
    model: PreTrainedModel, batches: Sequence[Batch], choices: Sequence[Choice], context: Context, *, who: str
) -> dict[str, tuple[int, ...]]:
    """Keep the blocks that turn the hidden states most (block influence, arXiv 2403.03853).

    Returns:
        The indices kept by the stack's path.
    """
    spans = {choice.stack.path: 1 for choice in choices}
    stacks = [choice.stack for choice in choices]
    found = turning(model, batches, spans, stacks, measure="cosine", who=who, progress=context.progress)
    chosen = {}
    for choice in choices:
        influence = found[choice.stack.path]
        kept = choice.dearest(influence)
        assert kept is not None
        why = deviation(choice, influence)
        for index in complement(kept, len(choice.stack)):
            _tell(context, choice, index, f"block influence {influence[index]:.4f}{f'; {why}' if why else ''}")
        chosen[choice.stack.path] = kept
    return chosen


def nearest_run(
    model: PreTrainedModel, batches: Sequence[Batch], choices: Sequence[Choice], context: Context, *, who: str
) -> dict[str, tuple[int, ...]]:
    """Drop the run of blocks behind which the hidden states are nearest to those before it (arXiv 2403.17887).

    Returns:
        The indices kept by the stack's path.

    Raises:
        UnsupportedModelError: no run of so many blocks can go.
    """
    spans = {choice.stack.path: len(choice.stack) - choice.keep for choice in choices}
    stacks = [choice.stack for choice in choices]
    found = turning(model, batches, spans, stacks, measure="angle", who=who, progress=context.progress)
    chosen = {}
    for choice in choices:
        path, of = choice.stack.path, len(choice.stack)
        distances, span = found[path], spans[path]
        ranked = sorted(range(len(distances)), key=distances.__getitem__)
        start = next((start for start in ranked if _may_go(choice, range(start, start + span))), None)
        if start is None:
            raise UnsupportedModelError(
                f"{who}.criterion='angular_distance' removes consecutive blocks, and no {span} of {path} in "
                f"{type(model).__name__} can go; use criterion='block_influence'."
            )
        gone = range(start, start + span)
        remark = f"angular distance {distances[start]:.4f} from before block {start} to behind block {gone[-1]}"
        if start != ranked[0]:
            remark += f"; from block {ranked[0]} on it is {distances[ranked[0]]:.4f}, but these cannot be left out"
        for index in gone:
            _tell(context, choice, index, remark)
        chosen[path] = complement(gone, of)
    return chosen


def lowest_loss(
    model: PreTrainedModel, batches: Sequence[Batch], choices: Sequence[Choice], context: Context, *, who: str
) -> dict[str, tuple[int, ...]]:
    """Remove blocks one after the other, each time the one without which the loss is lowest, whatever its stack.

    Returns:
        The indices kept by the stack's path.
    """
    gone: dict[str, list[int]] = {choice.stack.path: [] for choice in choices}
    rounds = sum(len(choice.stack) - choice.keep for choice in choices)
    for _ in tqdm(range(rounds), desc=who, disable=not context.progress):
        trials = [
            (choice, index)
            for choice in choices
            for index in complement(gone[choice.stack.path], len(choice.stack))
            if _may_go(choice, [*gone[choice.stack.path], index])
        ]
        already = [choice.stack.block_path(index) for choice in choices for index in gone[choice.stack.path]]
        sets = [[*already, choice.stack.block_path(index)] for choice, index in trials]
        # A damaged block would be the first to go, and its damage unseen: the model as it stands is asked, too.
        now, *losses = losses_without(model, batches, [already, *sets], who=who)
        if not math.isfinite(now):
            raise CompressionError(
                f"{who}: the loss of {type(model).__name__} on the calibration texts is {now}; repair the "
                f"checkpoint first."
            )
        best = min(range(len(trials)), key=losses.__getitem__)
        choice, index = trials[best]
        gone[choice.stack.path].append(index)
        _tell(
            context, choice, index, f"loss {now:.4f} -> {losses[best]:.4f}, the best of {len(trials)} that were tried"
        )
    return {choice.stack.path: complement(gone[choice.stack.path], len(choice.stack)) for choice in choices}


def _may_go(choice: Choice, without: Collection[int]) -> bool:
    """Whether the blocks `without`, and perhaps others, may go."""
    return choice.dearest([0.0] * len(choice.stack), without=without) is not None


def _tell(context: Context, choice: Choice, index: int, reason: str) -> None:
    context.tell(Action(path=choice.stack.block_path(index), does="removed", reason=reason))
