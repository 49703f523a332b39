"""Better grids than the one that just covers a group: clipped to the least squared error, or robust to outliers.

Each function takes float32 weights (rows, columns) and a grid, and returns scale and zero point of each group in the
form in which they are stored; `min_max` in `grid` is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from .grid import (
    Coded,
    Grid,
    Range,
    decode,
    encode,
    in_groups,
    laid,
    middles,
    min_max,
    row_chunks,
    spread,
    stored,
    stored_zero,
)

Fit = Literal["min_max", "mse", "hqq"]

# Shares of the range that are tried; below these a normal or heavy-tailed group never gains at 2 bits and more.
_SHRINKS = torch.linspace(1.0, 0.4, 25, dtype=torch.float32)
# Half-quadratic splitting: the norm of the error, its first weight against the quadratic term, and its growth.
_NORM, _BETA, _GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20


def fit(weight: torch.Tensor, grid: Grid, how: Fit = "min_max", importance: torch.Tensor | None = None) -> Range:
    """Lay the grid over each group of `weight`.

    Args:
        weight: float32 (rows, columns), finite.
        grid: which levels.
        how: `"min_max"`, `"mse"` or `"hqq"`.
        importance: (columns,), how much a squared error of an input counts; for `"mse"` only, None counts all alike.

    Returns:
        Scale and zero point, (rows, groups), as they are stored.

    Example:
        >>> weight = torch.tensor([[0.1, -0.2, 0.3, 8.0]])
        >>> scale, zero = fit(weight, Grid(3, None), "mse")
        >>> bool(scale < fit(weight, Grid(3, None))[0])
        True
    """
    methods: dict[Fit, Callable[..., Range]] = {"min_max": _covering, "mse": _clipped, "hqq": _half_quadratic}
    parts = [methods[how](weight[rows], grid, importance) for rows in row_chunks(weight)]
    zeros = [zero for _, zero in parts if zero is not None]
    scale = torch.cat([scale for scale, _ in parts])
    return scale, torch.cat(zeros) if zeros else None


def quantize(weight: torch.Tensor, grid: Grid, how: Fit = "min_max", importance: torch.Tensor | None = None) -> Coded:
    """Lay the grid over `weight` (rows, columns) and put each weight on its nearest level.

    Example:
        >>> coded = quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Grid(2, None))
        >>> coded.codes.tolist()
        [[0, 1, 2, 3]]
    """
    exact = weight.detach().float()
    scale, zero = fit(exact, grid, how, importance)
    codes = torch.empty(exact.shape, dtype=torch.uint8, device=exact.device)
    for rows in row_chunks(exact):
        codes[rows] = encode(exact[rows], scale[rows], zero[rows] if zero is not None else None, grid)
    return Coded(codes, scale, zero)


def _covering(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Range:
    return min_max(weight, grid)


def _clipped(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Range:
    """Try smaller ranges than the covering one, and keep the one of least squared error, group by group."""
    groups = in_groups(weight, grid)
    low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
    best: Range | None = None
    least = torch.full_like(low, torch.inf)
    for shrink in _SHRINKS.tolist():
        found = laid(low * shrink, high * shrink, grid)
        error = _group_errors(weight, found, grid, importance)
        best, least = _better(best, least, found, error)
    assert best is not None
    return best


def _half_quadratic(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> Range:
    """Minimise sum |w - w_q|^0.7 by half-quadratic splitting (HQQ, Badri & Shaji 2023).

    An auxiliary error takes up the outliers by a shrinkage step, and the zero point is then refitted to the rest in
    closed form; on a grid without zero points, or with whole ones, it is the scale. The best of all rounds is kept,
    group by group.
    """
    best = current = min_max(weight, grid)
    least = torch.full(best[0].shape, torch.inf, dtype=torch.float32, device=weight.device)
    beta = _BETA
    for _ in range(_ROUNDS):
        coded = Coded(encode(weight, *current, grid), *current)
        residual = weight - decode(coded, grid)
        size = residual.abs()
        best, least = _better(best, least, current, in_groups(size.pow(_NORM), grid).sum(-1))
        shrunk = residual.sign() * (size - size.clamp_min(1e-8).pow(_NORM - 1) / beta).clamp_min(0)
        current = _refitted(weight - shrunk, coded, grid)
        beta *= _GROWTH
    return best


def _refitted(target: torch.Tensor, coded: Coded, grid: Grid) -> Range:
    """Return the range with which the codes come closest to `target` (rows, columns): zero point or scale is moved."""
    scale = coded.scale
    # A whole zero point can hardly move: the mean error of rounded weights is below half a step.
    if coded.zero is None or grid.zero_parts == 1:
        unit = in_groups(decode(Coded(coded.codes, torch.ones_like(scale), coded.zero), grid), grid)
        ratio = (unit * in_groups(target, grid)).sum(-1) / unit.square().sum(-1).clamp_min(1e-12)
        return stored(torch.where(ratio == 0, scale.float(), ratio), grid), coded.zero
    steps = coded.codes.float() - target / spread(scale.float(), grid, target.shape[1])
    count = in_groups(torch.ones_like(target[:1]), grid).sum(-1)
    return scale, stored_zero(in_groups(steps, grid).sum(-1) / count, grid)


def _better(best: Range | None, least: torch.Tensor, found: Range, error: torch.Tensor) -> tuple[Range, torch.Tensor]:
    if best is None:
        return found, error
    wins = error < least
    scale = torch.where(wins, found[0], best[0])
    zero = torch.where(wins, found[1], best[1]) if found[1] is not None and best[1] is not None else None
    return (scale, zero), torch.where(wins, error, least)


def _group_errors(weight: torch.Tensor, found: Range, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    if grid.codebook:
        residual = in_groups(weight - decode(Coded(encode(weight, *found, grid), *found), grid), grid)
    else:
        # As `encode` and `decode` do it, without a copy of scale and zero point for each weight.
        scale, groups = found[0].float().unsqueeze(-1), in_groups(weight, grid)
        zero = found[1]
        middle = middles(None, grid, 1).to(weight.device) if zero is None else zero.float() / grid.zero_parts
        middle = middle.unsqueeze(-1)
        residual = (groups / scale).add_(middle).round_().clamp_(0, grid.limit).sub_(middle).mul_(scale).sub_(groups)
    squares = residual.square_()
    if importance is not None or weight.shape[1] % grid.size(weight.shape[1]):
        # What fills up a shorter last group counts nothing.
        counts = torch.ones_like(weight[:1]) if importance is None else importance.unsqueeze(0)
        squares = squares.mul_(in_groups(counts, grid))
    return squares.sum(-1)
