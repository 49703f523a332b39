"""`round_to="auto"`: the multiple of channels that this machine computes fastest, found by a short measurement.

Only the matrix products of the model's own feed-forward network are timed, in its dtype and on its device, at widths
next to the one asked for. A measurement is made once a process for the same shapes, so that the plan of a step and its
work agree.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn import functional

from ..anatomy import anatomy
from ..anatomy.groups import Kind
from ..anatomy.parts import FeedForward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes: TypeAlias = tuple[tuple[int, int], ...]
"""Inputs and outputs of each matrix of a feed-forward network."""

UNMEASURED = 8
"""The multiple where nothing can be measured."""

_MULTIPLES = (1, 8, 16, 32, 64, 128)
# No width further than this from the one asked for is a rounding of it.
_FURTHEST = 0.1
# Costs that differ by less are equal: then the multiple that rounds least is taken.
_EQUAL = 0.02
_ROWS = 64
_FEWEST_ROUNDS = 3
_SECONDS = 1.0


@dataclass(frozen=True)
class Rounding:
    """The multiple to round to, and how it was found.

    Attributes:
        multiple: widths are multiples of this.
        remark: what was measured, in a line.
    """

    multiple: int
    remark: str


def fastest_rounding(model: PreTrainedModel, shares: Mapping[Kind, float]) -> Rounding:
    """Return the multiple whose widths cost least time for each weight that is kept.

    Tried are 1, 8, 16, 32, 64 and 128, as far as they round by no more than 10 %; of multiples that cost the same
    within 2 % the smallest is taken.

    Args:
        model: the model; of its weights only dtype and device count.
        shares: share of the channels of each kind to remove; those of `"ffn"` and `"hidden"` are rounded.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> fastest_rounding(tiny_model("bert"), {"ffn": 0.5}).multiple in (1, 8, 16, 32, 64, 128)
        True
    """
    networks = anatomy(model).feed_forwards()
    if not networks or not {"ffn", "hidden"} & set(shares):
        return Rounding(UNMEASURED, "round_to='auto' rounds nothing here: no FFN or hidden width is cut")
    if model.device.type == "meta":
        return Rounding(UNMEASURED, f"round_to='auto' measures nothing on the meta device and takes {UNMEASURED}")
    network = max(networks, key=lambda network: network.width)
    shapes: dict[int, Shapes] = {}
    for multiple in _MULTIPLES:
        found = _rounded_shapes(network, shares, multiple)
        if found is not None and found not in shapes.values():
            shapes[multiple] = found
    if len(shapes) < 2:
        multiple = next(iter(shapes), UNMEASURED)
        return Rounding(multiple, f"round_to='auto' takes multiples of {multiple}: no other rounds by less than 10 %")
    seconds = product_seconds(tuple(shapes.values()), model.dtype, str(model.device), torch.get_num_threads())
    costs = {
        multiple: spent / sum(inputs * outputs for inputs, outputs in own)
        for (multiple, own), spent in zip(shapes.items(), seconds, strict=True)
    }
    best = min(costs.values())
    multiple = next(multiple for multiple, cost in costs.items() if cost <= best * (1 + _EQUAL))
    numbers = ", ".join(
        f"{spent * 1e3:.3g} ms at {_size(own, network, shares)}"
        for own, spent in zip(shapes.values(), seconds, strict=True)
    )
    return Rounding(
        multiple,
        f"round_to='auto' takes multiples of {multiple}, the least time for each weight kept: the matrix products of "
        f"{network.path} take, for {_ROWS} rows, {numbers}",
    )


@functools.lru_cache(maxsize=64)
def product_seconds(candidates: tuple[Shapes, ...], dtype: torch.dtype, device: str, threads: int) -> tuple[float, ...]:
    """Return the least time that the products of each candidate took, in seconds; they take turns.

    Args:
        candidates: inputs and outputs of each matrix.
        dtype: of weights and inputs.
        device: where they are.
        threads: of torch; a measurement with others is another one.
    """
    # Memory for the largest matrices, of which each candidate uses the beginning.
    numels = [max(own[at][0] * own[at][1] for own in candidates) for at in range(len(candidates[0]))]
    memory = [torch.randn(numel, device=device).to(dtype) for numel in numels]
    weights = [
        [part[: inputs * outputs].view(outputs, inputs) for part, (inputs, outputs) in zip(memory, own, strict=True)]
        for own in candidates
    ]
    rows = [[torch.randn(_ROWS, inputs, device=device).to(dtype) for inputs, _ in own] for own in candidates]
    best = [math.inf] * len(candidates)
    begin, rounds = time.perf_counter(), 0
    with torch.inference_mode():
        while rounds <= _FEWEST_ROUNDS or time.perf_counter() - begin < _SECONDS:
            for number, (own, inputs) in enumerate(zip(weights, rows, strict=True)):
                spent = _timed(own, inputs)
                # The first round warms up.
                best[number] = min(best[number], spent) if rounds else math.inf
            rounds += 1
    return tuple(best)


def _timed(weights: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> float:
    start = time.perf_counter()
    for weight, row in zip(weights, rows, strict=True):
        functional.linear(row, weight)
    if weights[0].device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _rounded_shapes(network: FeedForward, shares: Mapping[Kind, float], multiple: int) -> Shapes | None:
    """Return the shapes of the pruned network, or None where this multiple rounds too far."""
    unit = math.lcm(multiple, 8) if network.down.layer.kind == "experts" else multiple
    width = _rounded(network.width, shares.get("ffn", 0.0), unit)
    hidden = _rounded(network.down.outputs, shares.get("hidden", 0.0), multiple)
    if width is None or hidden is None:
        return None
    return tuple(
        (width, hidden) if part is network.down else (hidden, part.outputs // network.width * width)
        for part in network.projections()
    )


def _rounded(size: int, share: float, unit: int) -> int | None:
    if not share:
        return size
    wanted = size * (1 - share)
    rounded = max(round(wanted / unit), 1) * unit
    return rounded if rounded < size and abs(rounded - wanted) <= max(_FURTHEST * wanted, 1) else None


def _size(shapes: Shapes, network: FeedForward, shares: Mapping[Kind, float]) -> str:
    width, hidden = shapes[network.projections().index(network.down)]
    return " x ".join(str(size) for kind, size in (("ffn", width), ("hidden", hidden)) if kind in shares)
