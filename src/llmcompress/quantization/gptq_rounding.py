"""GPTQ's rounding: column after column, each error made up for by the columns that are still to be rounded."""

from __future__ import annotations

import torch

from .grid import Coded, Grid, Range, middles, spread


@torch.no_grad()
def round_with_feedback(
    weight: torch.Tensor,
    root: torch.Tensor,
    laid: Range,
    grid: Grid,
    *,
    order: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    block_size: int = 64,
) -> Coded:
    """Round `weight` on a grid that is laid already, by GPTQ (arXiv 2210.17323).

    Args:
        weight: float32 (rows, columns).
        root: from `calibration.inverse_root`, of the products in the given order.
        laid: scale and zero point of each group, (rows, groups), in the order of the columns as they are stored.
        grid: which levels.
        order: the columns in the order in which they are rounded, (columns,); None is as they are. The groups stay
            those of the stored order, so any order is stored alike.
        zeros: bool (rows, columns): weights that must stay exactly 0, or None. The grid must have a code for 0.
        block_size: columns after which the rest of the matrix is updated at once: changes the time, not the result.

    Returns:
        The codes, with the grid as it was laid.

    Example:
        >>> from llmcompress.quantization.grid import min_max
        >>> weight, grid = torch.tensor([[0.0, 0.4, 3.0]]), Grid(2, None)
        >>> round_with_feedback(weight, torch.eye(3), min_max(weight, grid), grid).codes.tolist()
        [[0, 0, 3]]
    """
    columns = weight.shape[1]
    scale, zero = laid
    order = torch.arange(columns, device=weight.device) if order is None else order
    # Columns as rows: each step reads and writes contiguous memory.
    left = weight.t()[order].contiguous()
    steps = spread(scale.float(), grid, columns).t()[order].contiguous()
    zero_codes = middles(zero, grid, columns).expand(len(weight), columns).t()[order].contiguous()
    fixed = None if zeros is None else zeros.t()[order].contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, factor = left[start:end], root[start:end, start:end]
        errors = torch.empty_like(block)
        for row in range(end - start):
            step, middle = steps[start + row], zero_codes[start + row]
            code = torch.addcdiv(middle, block[row], step).round_().clamp_(0, grid.limit)
            if fixed is not None:
                code = torch.where(fixed[start + row], middle, code)
            codes[start + row] = code
            torch.div(block[row] - code.sub_(middle).mul_(step), factor[row, row], out=errors[row])
            block[row + 1 :].addr_(factor[row, row + 1 :], errors[row], alpha=-1)
        left[end:].addmm_(root[start:end, end:].t(), errors, alpha=-1)
    stored = torch.empty_like(codes)
    stored[order] = codes
    return Coded(stored.t().contiguous(), scale, zero)
