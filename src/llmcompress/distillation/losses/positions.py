"""Which positions of a batch count, and what a sum over them is divided by."""

from __future__ import annotations

from typing import TypeAlias

import torch

Count: TypeAlias = "torch.Tensor | float | None"


def counted(
    first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor | None, count: Count
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Keep the counted positions only, so that what does not count is not computed either, and tell what to divide by.

    Args:
        first: values (..., width), or (...) where `second` has no axis of widths either.
        second: values, or labels (...), of the same positions.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> mask = torch.tensor([[True, True, True], [False, False, False]])
        >>> kept, _, count = counted(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), mask, None)
        >>> tuple(kept.shape), count
        ((3, 5), 3)
    """
    second = second.to(first.device)
    if mask is not None:
        first, second = first[mask], second[mask]
        positions = int(mask.sum())
    else:
        positions = (first.shape if second.dim() == first.dim() == 1 else first.shape[:-1]).numel()
    # Nothing that counts is a loss of zero, not 0/0.
    return first, second, max(positions, 1) if count is None else count
