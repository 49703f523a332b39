"""Weights in whatever way a module holds them, rounded row by row: a row is what is multiplied with the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def row_wise(rounding: Callable[[torch.Tensor], torch.Tensor], input_axis: int, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` with its rows rounded, in its own shape.

    Args:
        rounding: float32 (rows, inputs) to the same shape.
        input_axis: the axis of `weight` that runs over the inputs; all others together number the rows.
        weight: (outputs, inputs), (inputs, outputs), (experts, outputs, inputs), ...

    Example:
        >>> row_wise(lambda rows: rows / rows.amax(1, keepdim=True), 0, torch.tensor([[1.0, 2.0], [4.0, 1.0]])).tolist()
        [[0.25, 1.0], [1.0, 0.5]]
    """
    moved = weight.movedim(input_axis, -1)
    rows = moved.reshape(-1, moved.shape[-1]).float().contiguous()
    return rounding(rows).view(moved.shape).movedim(-1, input_axis)
