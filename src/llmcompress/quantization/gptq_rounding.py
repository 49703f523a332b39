"""GPTQ's rounding: column after column, each error made up for by the columns behind; and what improves on it then.

All of it lowers tr (W - Q) H (W - Q)^T, the squared error of a layer's outputs on the calibration tokens, for each row
on its own. H is the damped sum of x x^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grid import Coded, Grid, Range, decode, in_groups, middles, spread, stored, stored_zero

# Entries of the systems of equations that are solved at a time.
_SYSTEMS = 1 << 22
# A group's scale that would leave these bounds stays what it was: the codes were chosen for another one.
_LEAST, _MOST = 0.5, 2.0


@torch.no_grad()
def round_with_feedback(
    weight: torch.Tensor,
    root: torch.Tensor,
    laid: Range,
    grid: Grid,
    *,
    order: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    block_size: int = 128,
) -> Coded:
    """Round `weight` on a grid that is laid already, by GPTQ (arXiv 2210.17323).

    With R R^T the Hessian and R upper triangular, column j aims at w_j + sum over i < j of (w_i - q_i) R_ij / R_jj,
    which is what optimal brain surgery makes of it step by step (so shown by QuIP, arXiv 2307.13304); no inverse is
    needed.

    Args:
        weight: float32 (rows, columns).
        root: from `calibration.hessian.damped_root`, of the products in the given order.
        laid: scale and zero point of each group, (rows, groups), in the order of the columns as they are stored.
        grid: which levels; no codebook.
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
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    feedback = (root / root.diagonal()).float()
    turned = _Turned.of(weight, laid, grid, order, zeros)
    # What is left of a weight when its code, times the scale, is taken away.
    whole = turned.weight + turned.middle * turned.scale
    codes, errors = torch.empty_like(whole), torch.empty_like(whole)
    for start in range(0, len(order), block_size):
        end = min(start + block_size, len(order))
        aims = torch.addmm(turned.weight[start:end], feedback[:start, start:end].t(), errors[:start])
        for row, column in enumerate(range(start, end)):
            code, scale, error = codes[column], turned.scale[column], errors[column]
            torch.addcdiv(turned.middle[column], aims[row], scale, out=code).round_().clamp_(0, grid.limit)
            turned.keep_zeros(column, code)
            torch.addcmul(whole[column], code, scale, value=-1, out=error)
            aims[row + 1 :].addr_(feedback[column, column + 1 : end], error)
    return Coded(turned.back(codes), *laid)


@torch.no_grad()
def round_again(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    coded: Coded,
    grid: Grid,
    *,
    order: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    block_size: int = 128,
) -> Coded:
    """Choose each code once more, column after column, with all other columns as they are by now.

    One pass of coordinate descent: no row's error grows.

    Args:
        weight: float32 (rows, columns).
        hessian: float32 (columns, columns), damped, in the stored order.
        coded: what the weight is rounded to.
        grid: which levels; no codebook.
        order: as for `round_with_feedback`.
        zeros: as for `round_with_feedback`.
        block_size: as for `round_with_feedback`.

    Example:
        >>> grid, hessian = Grid(2, None), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> coded = Coded(torch.tensor([[0, 0]], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1))
        >>> round_again(torch.tensor([[0.4, 0.4]]), hessian, coded, grid).codes.tolist()  # 0.4 + 0.9 x 0.4 > 0.5
        [[1, 0]]
    """
    order = torch.arange(weight.shape[1], device=weight.device) if order is None else order
    # Column j: what an error in each column asks of column j.
    pull = hessian[order][:, order] / hessian.diagonal()[order]
    laid = (coded.scale, coded.zero)
    turned = _Turned.of(weight, laid, grid, order, zeros)
    codes = coded.codes.t()[order].float()
    errors = turned.weight - (codes - turned.middle) * turned.scale
    for start in range(0, len(order), block_size):
        end = min(start + block_size, len(order))
        moves = pull[:, start:end].t() @ errors
        chosen, changes = torch.empty_like(moves), torch.empty_like(moves)
        for row, column in enumerate(range(start, end)):
            code, scale, change = chosen[row], turned.scale[column], changes[row]
            torch.addcdiv(codes[column], moves[row], scale, out=code).round_().clamp_(0, grid.limit)
            turned.keep_zeros(column, code)
            torch.sub(codes[column], code, out=change).mul_(scale)
            moves[row + 1 :].addr_(pull[column, column + 1 : end], change)
        codes[start:end] = chosen
        errors[start:end] += changes
    return Coded(turned.back(codes), *laid)


@torch.no_grad()
def lay_again(
    weight: torch.Tensor, hessian: torch.Tensor, coded: Coded, grid: Grid, *, product: torch.Tensor | None = None
) -> Coded:
    """Lay the grid anew for the codes that there are: the scales of a row together, by least squares.

    Zero points with parts of a step follow, with the scales as they are by then. No row's error grows.

    Args:
        weight: float32 (rows, columns).
        hessian: float32 (columns, columns), damped, in the stored order.
        coded: what the weight is rounded to.
        grid: which levels; no codebook.
        product: `weight @ hessian`, where it is known.

    Example:
        >>> grid = Grid(2, None, scale_dtype=torch.float32)
        >>> coded = Coded(torch.tensor([[1, 2]], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1))
        >>> lay_again(torch.tensor([[0.8, 1.6]]), torch.eye(2), coded, grid).scale.round(decimals=4).tolist()
        [[0.800000011920929]]
    """
    groups = grid.groups(weight.shape[1])
    step = max(_SYSTEMS // groups**2, 1)
    product = weight @ hessian if product is None else product
    parts = [
        _laid_again(weight[rows], product[rows], hessian, _rows_of(coded, rows), grid)
        for rows in (slice(start, start + step) for start in range(0, len(weight), step))
    ]
    zeros = [zero for _, zero in parts if zero is not None]
    return Coded(coded.codes, torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None)


def output_error(weight: torch.Tensor, hessian: torch.Tensor, coded: Coded, grid: Grid) -> torch.Tensor:
    """Return the squared error of the outputs that each row makes, (rows,).

    Example:
        >>> coded = Coded(torch.tensor([[1]], dtype=torch.uint8), torch.ones(1, 1), torch.zeros(1, 1))
        >>> output_error(torch.tensor([[3.0]]), torch.tensor([[2.0]]), coded, Grid(2, None)).tolist()
        [8.0]
    """
    errors = weight - decode(coded, grid)
    return ((errors @ hessian) * errors).sum(-1)


@dataclass(frozen=True)
class _Turned:
    """A matrix and its grid with columns as rows, in the order of rounding: each step works on contiguous memory."""

    weight: torch.Tensor
    scale: torch.Tensor
    middle: torch.Tensor
    order: torch.Tensor
    zeros: torch.Tensor | None

    @classmethod
    def of(
        cls, weight: torch.Tensor, laid: Range, grid: Grid, order: torch.Tensor, zeros: torch.Tensor | None
    ) -> _Turned:
        rows, columns = weight.shape
        scale = spread(laid[0].float(), grid, columns)
        middle = middles(laid[1], grid, columns).to(weight.device).expand(rows, columns)

        def turn(matrix: torch.Tensor) -> torch.Tensor:
            return matrix.t()[order].contiguous()

        fixed = turn(zeros) if zeros is not None else None
        return cls(turn(weight), turn(scale), turn(middle), order, fixed)

    def keep_zeros(self, column: int, codes: torch.Tensor) -> None:
        """Give the weights that must stay 0 the code for it, in place."""
        if self.zeros is not None:
            torch.where(self.zeros[column], self.middle[column], codes, out=codes)

    def back(self, codes: torch.Tensor) -> torch.Tensor:
        """Return codes (columns, rows) as they are stored."""
        stored_order = torch.empty_like(self.order)
        stored_order[self.order] = torch.arange(len(self.order), device=self.order.device)
        return codes.to(torch.uint8)[stored_order].t().contiguous()


def _laid_again(weight: torch.Tensor, product: torch.Tensor, hessian: torch.Tensor, coded: Coded, grid: Grid) -> Range:
    columns = weight.shape[1]
    codes, scale, zero = coded.codes.float(), coded.scale, coded.zero
    basis = codes - middles(zero, grid, columns).to(weight.device)
    system = _System.of(product, basis, hessian, grid)
    found = system.solution()
    ratio = found / scale.float()
    found = stored(torch.where((ratio > _LEAST) & (ratio < _MOST), found, scale.float()), grid)
    scale = torch.where(system.is_better(found.float(), scale.float()), found, scale)
    if zero is None or grid.zero_parts == 1:
        return scale, zero
    steps = spread(scale.float(), grid, columns)
    system = _System.of((weight - codes * steps) @ hessian, -steps, hessian, grid)
    moved = stored_zero(system.solution(), grid)
    better = system.is_better(moved.float() / grid.zero_parts, zero.float() / grid.zero_parts)
    return scale, torch.where(better, moved, zero)


@dataclass(frozen=True)
class _System:
    """For each row the equations of the coefficients, one a group, by which `basis` comes nearest to a target.

    `product` is the target times the Hessian.
    """

    matrix: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, product: torch.Tensor, basis: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> _System:
        columns = product.shape[1]
        groups, size = grid.groups(columns), grid.size(columns)
        matrix = product.new_empty(len(product), groups, groups)
        for group in range(groups):
            own = slice(group * size, min((group + 1) * size, columns))
            onto = (basis[:, own] @ hessian[own, own.start :]).mul_(basis[:, own.start :])
            matrix[:, group, group:] = in_groups(onto, grid if groups - group > 1 else _whole(grid)).sum(-1)
            matrix[:, group:, group] = matrix[:, group, group:]
        return cls(matrix, in_groups(product * basis, grid).sum(-1))

    def solution(self) -> torch.Tensor:
        exact = self.matrix.to(torch.float32 if self.matrix.device.type == "mps" else torch.float64)
        diagonal = exact.diagonal(dim1=1, dim2=2)
        # A group without any weight but 0 has no equation.
        diagonal += diagonal.mean(1, keepdim=True) * 1e-7 + (diagonal == 0)
        return torch.linalg.solve(exact, self.right.to(exact.dtype)).float()

    def is_better(self, found: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Whether `found` has less error than `known`, (rows, 1)."""
        costs = [((self.matrix @ one.unsqueeze(-1)).squeeze(-1) - 2 * self.right) * one for one in (found, known)]
        return (costs[0].sum(-1) < costs[1].sum(-1)).unsqueeze(-1)


def _whole(grid: Grid) -> Grid:
    """Return `grid` with one group: what is left of a row is its last one, however short."""
    return Grid(grid.bits, None, grid.symmetric)


def _rows_of(coded: Coded, rows: slice) -> Coded:
    return Coded(coded.codes[rows], coded.scale[rows], coded.zero[rows] if coded.zero is not None else None)
