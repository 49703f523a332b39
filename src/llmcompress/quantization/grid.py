"""Groups of weights on a grid of few levels: how a grid is laid, and how weights are put on it and read back.

A row is cut into groups of consecutive inputs; each has a scale, and an integer zero point where the grid is not
symmetric. A weight is `(code - zero) * scale`, or `level[code] * scale` with a codebook. Everything is computed with
the scale as it is stored, so that what is measured here is what the folder holds. Pure functions on tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Codebook = Literal["nf4", "fp4"]

LEVELS: dict[Codebook, tuple[float, ...]] = {
    # Quantiles of a normal distribution, zero among them (QLoRA, arXiv 2305.14314, appendix E).
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # Sign, two bits of exponent, one of mantissa, scaled to 1.
    "fp4": (
        *(-1.0, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -1 / 192, 0.0),
        *(1 / 192, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0),
    ),
}
"""The levels of each codebook, ascending, for weights divided by the largest magnitude of their group."""

# So many weights at a time: temporary memory does not grow with the layer.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Grid:
    """The levels that the weights of a layer may take.

    Attributes:
        bits: of a code, 2 to 8; 4 with a codebook.
        group_size: consecutive inputs that share a scale; None is the whole row. The last group of a row may be
            shorter.
        symmetric: the zero point is the middle code and is not stored.
        codebook: unequal steps, or None.
        scale_dtype: in which scales are stored.
        zero_bits: of a stored zero point; above `bits` it has that many binary places more. None is `bits`: a code.

    Example:
        >>> Grid(4, 64).bits_a_weight(4096)
        4.3125
    """

    bits: int
    group_size: int | None
    symmetric: bool = False
    codebook: Codebook | None = None
    scale_dtype: torch.dtype = torch.float16
    zero_bits: int | None = None

    @property
    def zero_width(self) -> int:
        """The bits of a stored zero point."""
        return self.zero_bits or self.bits

    @property
    def zero_parts(self) -> int:
        """How many parts of a step the zero point is counted in: 1 where it is a code."""
        return 2 ** (self.zero_width - self.bits)

    @property
    def limit(self) -> int:
        """The largest code."""
        return len(LEVELS[self.codebook]) - 1 if self.codebook else 2**self.bits - 1

    @property
    def has_zero(self) -> bool:
        """Whether a zero point is stored for each group."""
        return not self.symmetric and self.codebook is None

    def groups(self, columns: int) -> int:
        """Return how many groups a row of `columns` weights has."""
        return -(-columns // self.size(columns))

    def size(self, columns: int) -> int:
        """Return how many weights a full group has, in a row of `columns`."""
        return min(self.group_size or columns, columns) or 1

    def bits_a_weight(self, columns: int) -> float:
        """Return the stored bits a weight, scales and zero points included, without the padding of the last byte."""
        extra = 8 * self.scale_dtype.itemsize + (self.zero_width if self.has_zero else 0)
        return self.bits + extra * self.groups(columns) / columns


@dataclass(frozen=True)
class Coded:
    """A matrix on a grid.

    Attributes:
        codes: uint8 (rows, columns), not packed.
        scale: (rows, groups), in the grid's scale dtype.
        zero: uint8 (rows, groups), in parts of a step (see `Grid.zero_parts`), or None where the grid has none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


Range = tuple[torch.Tensor, "torch.Tensor | None"]
"""Scale and zero point of each group, (rows, groups)."""


def min_max(weight: torch.Tensor, grid: Grid) -> Range:
    """Lay the grid so that it just covers each group of `weight` (rows, columns).

    Args:
        weight: float32, finite.
        grid: which levels.

    Example:
        >>> scale, zero = min_max(torch.tensor([[-1.0, 2.0]]), Grid(2, None, scale_dtype=torch.float32))
        >>> scale.tolist(), zero.tolist()
        ([[1.0]], [[1]])
    """
    return laid(*_bounds(weight, grid), grid)


def encode(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """Return the code of the nearest level for each weight: uint8 (rows, columns).

    Args:
        weight: float32 (rows, columns).
        scale: (rows, groups), as stored.
        zero: (rows, groups) or None.
        grid: which levels.

    Example:
        >>> grid = Grid(2, None, scale_dtype=torch.float32)
        >>> encode(torch.tensor([[-1.0, 0.4, 9.0]]), torch.tensor([[1.0]]), torch.tensor([[1]]), grid).tolist()
        [[0, 1, 3]]
    """
    steps = weight / spread(scale.float(), grid, weight.shape[1])
    if grid.codebook:
        levels = _levels(grid, weight.device)
        return torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return (
        steps.add_(middles(zero, grid, weight.shape[1]).to(steps.device)).round_().clamp_(0, grid.limit).to(torch.uint8)
    )


def decode(coded: Coded, grid: Grid) -> torch.Tensor:
    """Return the float32 matrix (rows, columns) that `coded` stands for.

    Example:
        >>> codes = torch.tensor([[0, 3]], dtype=torch.uint8)
        >>> decode(Coded(codes, torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.uint8)), Grid(2, None)).tolist()
        [[-0.5, 1.0]]
    """
    columns = coded.codes.shape[1]
    scale = spread(coded.scale.float(), grid, columns)
    if grid.codebook:
        return _levels(grid, coded.codes.device)[coded.codes.int()] * scale
    return (coded.codes.float() - middles(coded.zero, grid, columns).to(scale.device)) * scale


def count_zeros(coded: Coded, grid: Grid) -> int:
    """Return how many weights of `coded` stand for exactly 0.

    Example:
        >>> codes = torch.tensor([[0, 1, 1, 3]], dtype=torch.uint8)
        >>> count_zeros(Coded(codes, torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.uint8)), Grid(2, None))
        2
    """
    columns = coded.codes.shape[1]
    if grid.codebook:
        return int((coded.codes == LEVELS[grid.codebook].index(0.0)).sum())
    if coded.zero is None:
        return int((coded.codes == 2 ** (grid.bits - 1)).sum())
    return int((coded.codes * grid.zero_parts == spread(coded.zero, grid, columns)).sum())


def spread(values: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    """Repeat one value a group, (rows, groups), for each of its weights: (rows, columns)."""
    if values.shape[1] == 1:
        return values.expand(-1, columns)
    return values.repeat_interleave(grid.size(columns), dim=1)[:, :columns]


def row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Yield slices of whole rows, about a million weights each."""
    step = max(_CHUNK // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def in_groups(weight: torch.Tensor, grid: Grid, fill: float = 0.0) -> torch.Tensor:
    """Return `weight` (rows, columns) as (rows, groups, size); a shorter last group is filled up with `fill`."""
    size = grid.size(weight.shape[1])
    missing = -weight.shape[1] % size
    return (F.pad(weight, (0, missing), value=fill) if missing else weight).unflatten(1, (-1, size))


def _bounds(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and largest weight of each group, with zero between them: (rows, groups)."""
    groups = in_groups(weight, grid)
    return groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)


def laid(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> Range:
    """Lay the grid from `low` (at most 0) to `high` (at least 0) of each group, (rows, groups)."""
    if grid.has_zero:
        scale = stored((high - low) / grid.limit, grid)
        return scale, stored_zero(-low / scale.float(), grid)
    if grid.codebook:
        return stored(torch.maximum(high, -low), grid), None
    # There is one level more below zero than above it: the sign of the scale gives it to the larger side.
    half = 2 ** (grid.bits - 1)
    largest = torch.where(-low >= high, low, high)
    return stored(largest / -half, grid), None


def stored_zero(zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round zero points in steps, (rows, groups), to what is stored of them."""
    return (zero * grid.zero_parts).round().clamp(0, 2**grid.zero_width - 1).to(torch.uint8)


def stored(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round scales to the stored dtype; a group of zeros gets one that is not zero, and is coded exactly by it."""
    stored = scale.to(grid.scale_dtype)
    tiny = torch.finfo(grid.scale_dtype).smallest_normal
    return torch.where(stored == 0, torch.full_like(stored, tiny), stored)


def middles(zero: torch.Tensor | None, grid: Grid, columns: int) -> torch.Tensor:
    """Return which code stands for 0.0, at each weight: float32 (rows, columns), or (1, 1) where it is the same at all.

    Args:
        zero: (rows, groups), as stored, or None.
        grid: which levels; no codebook.
        columns: of the matrix.
    """
    if zero is None:
        return torch.full((1, 1), 2.0 ** (grid.bits - 1), dtype=torch.float32)
    return spread(zero.float() / grid.zero_parts, grid, columns)


def _levels(grid: Grid, device: torch.device) -> torch.Tensor:
    assert grid.codebook is not None
    return torch.tensor(LEVELS[grid.codebook], dtype=torch.float32, device=device)
