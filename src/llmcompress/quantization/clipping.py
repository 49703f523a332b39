"""The clip search of AWQ (arXiv 2306.00978): the range of each group that leaves the least error in a layer's outputs.

With H, the sum of x x^T over the calibration tokens, the squared error of all outputs is `tr((Q - W) H (Q - W)^T)`, and
the tokens need not be run again. H couples the groups of a row: their errors add up or cancel. So the ranges are
improved one group after another, each given what the others have left. The error falls or stays at each step.
"""

from __future__ import annotations

import torch

from .grid import Coded, Grid, Range, decode, encode, in_groups, laid, min_max

# Shares of the covering range that are tried first, both ends alike; then factors of one end at a time.
_SHRINKS = torch.linspace(1.0, 0.5, 21, dtype=torch.float32)
_MOVES = torch.linspace(0.75, 1.15, 17, dtype=torch.float32)
# How often all groups are gone through after that.
_ROUNDS = 3
# Candidates x rows x columns of a group that are held at a time.
_HELD = 1 << 22


def output_errors(weight: torch.Tensor, rounded: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each output, summed over the tokens: `diag((Q - W) H (Q - W)^T)`.

    Args:
        weight: W, float32 (rows, columns).
        rounded: Q, of the same shape.
        products: H, the sum of x x^T over the tokens, (columns, columns).

    Returns:
        Shape (rows,).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> w, q = torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, 0.0]])
        >>> output_errors(w, q, x.T @ x).item() == (x @ (q - w).T).square().sum().item()
        True
    """
    error = rounded - weight
    return ((error @ products) * error).sum(1)


def clipped(weight: torch.Tensor, grid: Grid, products: torch.Tensor) -> Range:
    """Search the range of each group for the least error of the layer's outputs.

    Args:
        weight: float32 (rows, columns), finite.
        grid: which levels.
        products: the sum of x x^T over the tokens, (columns, columns), of any positive scale.

    Returns:
        Scale and zero point, (rows, groups), as they are stored. No row has a larger error than with `min_max`.

    Example:
        >>> weight = torch.tensor([[0.1, -0.2, 0.3, 8.0]])
        >>> products = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6]))
        >>> scale, zero = clipped(weight, Grid(3, None), products)
        >>> bool(scale < min_max(weight, Grid(3, None))[0])
        True
    """
    step = max(_HELD // (2 * len(_MOVES) * grid.size(weight.shape[1])), 1)
    parts = []
    for start in range(0, len(weight), step):
        search = _Search(weight[start : start + step], grid, products)
        for number in range(1 + _ROUNDS):
            search.go_through(first=number == 0)
        parts.append(search.found())
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


class _Search:
    """The ranges found so far for some rows, and the error of each weight under them."""

    def __init__(self, weight: torch.Tensor, grid: Grid, products: torch.Tensor) -> None:
        self._weight, self._grid, self._products = weight, grid, products
        groups = in_groups(weight, grid)
        # The ends of each group's range, (rows, groups), with zero between them.
        self._low, self._high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
        self._scale, self._zero = min_max(weight, grid)
        self._error = _rounded(weight, (self._scale, self._zero), grid) - weight

    def found(self) -> Range:
        """Return the best ranges."""
        return self._scale, self._zero

    def go_through(self, *, first: bool) -> None:
        """Improve one group after another."""
        size = self._grid.size(self._weight.shape[1])
        for group in range(self._scale.shape[1]):
            columns = slice(group * size, (group + 1) * size)
            low, high = self._low[:, group], self._high[:, group]
            if first:
                shrinks = _SHRINKS.to(low).unsqueeze(1)
                self._take_best(group, columns, low * shrinks, high * shrinks)
            else:
                moves = _MOVES.to(low).unsqueeze(1)
                same = torch.ones_like(moves)
                lows, highs = low * torch.cat([moves, same]), high * torch.cat([same, moves])
                self._take_best(group, columns, lows, highs)

    def _take_best(self, group: int, columns: slice, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take for each row the ends, of shape (candidates, rows), that lower the error most, if any do."""
        count, rows = low.shape
        weight, error = self._weight[:, columns], self._error[:, columns]
        own = self._products[columns, columns]
        # What the errors of the other groups put into the outputs, as these columns see it.
        others = self._error @ self._products[:, columns] - error @ own
        scale, zero = laid(low.reshape(-1, 1), high.reshape(-1, 1), self._grid)
        repeated = weight.repeat(count, 1)
        tried = _rounded(repeated, (scale, zero), self._grid).sub_(repeated).view(count, rows, -1)
        least, best = ((tried @ own + 2 * others) * tried).sum(-1).min(0)
        wins = least < ((error @ own + 2 * others) * error).sum(-1)
        at = (best[wins], wins.nonzero().flatten())
        self._error[wins, columns] = tried[at]
        self._low[wins, group], self._high[wins, group] = low[at], high[at]
        self._scale[wins, group] = scale.view(count, rows)[at]
        if self._zero is not None and zero is not None:
            self._zero[wins, group] = zero.view(count, rows)[at]


def _rounded(weight: torch.Tensor, found: Range, grid: Grid) -> torch.Tensor:
    return decode(Coded(encode(weight, *found, grid), *found), grid)
