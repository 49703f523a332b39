"""A matrix as it is stored in few bits: what modules, experts and kernels pass to one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grid import Coded, Grid, count_zeros, decode, row_chunks
from .packing import unpack


@dataclass(frozen=True)
class PackedMatrix:
    """The packed codes of a matrix, of which a kernel makes what it needs.

    Attributes:
        weight: int8 (outputs, bytes): the codes of a row as a bit stream, see `packing`.
        scale: (outputs, groups).
        zero: uint8 (outputs, bytes): the zero points, packed like the codes; None on grids that have none.
        grid: what the codes mean.
        columns: inputs.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid
    columns: int

    def coded(self) -> Coded:
        """Return the codes, unpacked."""
        groups = self.scale.shape[1]
        zero = None if self.zero is None else unpack(self.zero, self.grid.zero_width, groups)
        return Coded(unpack(self.weight.view(torch.uint8), self.grid.bits, self.columns), self.scale, zero)

    def zeros(self) -> int:
        """Return how many weights stand for exactly 0."""
        # Some rows at a time: unpacked, a large table would take several times its bytes.
        parts = (
            PackedMatrix(
                self.weight[rows],
                self.scale[rows],
                None if self.zero is None else self.zero[rows],
                self.grid,
                self.columns,
            )
            for rows in row_chunks(self.weight)
        )
        return sum(count_zeros(part.coded(), self.grid) for part in parts)

    def dequantized(self) -> torch.Tensor:
        """Return the float32 weight (outputs, inputs)."""
        return decode(self.coded(), self.grid)
