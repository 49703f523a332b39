"""The sensitivity of layers that are told with their grids: texts to batches, one of two methods, a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from ..anatomy.layers import WeightLayer, refuse_nonfinite
from ..calibration import calibration_batches
from ..calibration.replay import Batch
from ..compressor import Context
from ..errors import CompressionError
from .damage import Candidate, estimated, measured
from .fitting import Fit
from .grid import Grid
from .sensitivity_table import LayerDamage, Sensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["auto", "kl", "fisher"]

# Multiply-adds that measuring may take before it is estimated instead: some seconds. The estimate comes so close (on
# trained models 0.99 of correlation, sums within 10 %) that more is not worth waiting for.
_MOST_WORK = {"cpu": 1e11}
_MOST_WORK_ELSEWHERE = 1e13


def measure(
    model: PreTrainedModel,
    context: Context,
    layers: Sequence[WeightLayer],
    grid_of: Callable[[WeightLayer, int], Grid],
    *,
    who: str,
    bits: Sequence[int],
    fit: Fit,
    group_size: int | None,
    samples: int,
    max_length: int,
    method: Method,
) -> Sensitivity:
    """Return the damage of each of `layers` at each of `bits`; layers that share a weight count once, by the first.

    Args:
        model: the float model; the same afterwards.
        context: its data, tokenizer, seed and progress are used.
        layers: what to round.
        grid_of: the grid of a layer at some bits.
        who: for messages.
        bits: widths.
        fit: how grids are laid.
        group_size: for the table.
        samples: texts at most.
        max_length: tokens a text at most.
        method: `"kl"`, `"fisher"`, or `"auto"` for the first where that is not too much work.

    Raises:
        MissingInputError: no data or tokenizer, or texts too short.
        CompressionError: weights or answers are NaN or infinite.
    """
    refuse_nonfinite(layers)
    batches = calibration_batches(model, context, who=who, samples=samples, max_length=max_length)
    shared: dict[int, list[WeightLayer]] = {}
    for layer in layers:
        shared.setdefault(id(layer.weight), []).append(layer)
    candidates = [
        Candidate(own[0], {width: grid_of(own[0], width) for width in bits}, alone=len(own) == 1)
        for own in shared.values()
    ]
    if method == "auto":
        method = "kl" if _work(model, batches, candidates) <= _limit(model) else "fisher"
    if method == "kl":
        damages, answers = measured(model, batches, candidates, fit, who=who, progress=context.progress)
    else:
        damages, answers = estimated(
            model, batches, candidates, fit, who=who, seed=context.seed, progress=context.progress
        )
    broken = next((key for key, value in damages.items() if not value < torch.inf), None)
    if broken is not None:
        raise CompressionError(
            f"{who}: with {broken[0]} at {broken[1]} bits the answers of {type(model).__name__} are NaN or infinite; "
            f"leave the layer out with skip=({broken[0]!r},), or allow more bits only."
        )
    rows = [
        LayerDamage(
            layer=candidate.layer.name,
            weights=candidate.layer.weight.numel(),
            bits=width,
            bits_a_weight=grid.bits_a_weight(candidate.layer.weight.shape[candidate.layer.input_axis]),
            damage=damages[candidate.layer.name, width],
        )
        for candidate in candidates
        for width, grid in candidate.grids.items()
    ]
    return Sensitivity(
        model=type(model).__name__, method=method, answers=answers, fit=fit, group_size=group_size, rows=tuple(rows)
    )


def _work(model: PreTrainedModel, batches: Sequence[Batch], candidates: Sequence[Candidate]) -> float:
    """Return about how many multiply-adds measuring takes: half a model runs for each layer and width."""
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    passes = sum(len(candidate.grids) for candidate in candidates)
    return 0.5 * passes * tokens * sum(parameter.numel() for parameter in model.parameters())


def _limit(model: PreTrainedModel) -> float:
    return _MOST_WORK.get(model.device.type, _MOST_WORK_ELSEWHERE)
