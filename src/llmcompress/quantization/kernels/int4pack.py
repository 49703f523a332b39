"""torch's own product with 4-bit weights on CUDA, `_weight_int4pack_mm`, and how our layout becomes its own.

It knows groups of 32 to 256, bfloat16 activations, and weights as `(code - 8) * scale + offset`, scales and offsets in
bfloat16: those of a packed matrix are rounded once, by at most 1/256. The first use on a device is a trial of one small
product against the unpacked weights; where it fails, the operator is not used there.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..grid import Coded, Grid, decode

if TYPE_CHECKING:
    from ..packed_matrix import PackedMatrix

_GROUPS = (32, 64, 128, 256)
_INNER_TILES = 8
# A tile of the operator: outputs, and inputs for the inner tiles above.
_OUTPUTS, _INPUTS = 8, 16 * _INNER_TILES
_TRIAL_ERROR = 0.02


def fits(matrix: PackedMatrix) -> bool:
    """Tell whether the operator can multiply by `matrix`, on a device that has it."""
    grid = matrix.grid
    plain = grid.bits == 4 and grid.codebook is None and grid.group_size in _GROUPS
    return plain and matrix.weight.shape[0] % _OUTPUTS == 0 and matrix.columns % _INPUTS == 0


@cache
def runs(device: torch.device) -> bool:
    """Tell whether the operator gives right products on `device`: tried once, on a small matrix."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    # Whatever the default device is, the generator is on the CPU.
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (_OUTPUTS * 8, _INPUTS * 2), generator=generator).to(torch.uint8)
        grid = Grid(4, 64)
        shape = (len(codes), grid.groups(codes.shape[1]))
        scale = torch.rand(shape, dtype=torch.float32, generator=generator).add_(0.5).half()
        zero = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
        x = torch.randn(4, codes.shape[1], dtype=torch.float32, generator=generator)
        coded = Coded(codes, scale, zero)
        exact = F.linear(x, decode(coded, grid))
    try:
        on_device = Coded(codes.to(device), scale.to(device), zero.to(device))
        found = Int4PackProduct(on_device, grid).multiply(x.to(device)).float().cpu()
    except RuntimeError:
        return False
    return bool((found - exact).norm() < _TRIAL_ERROR * exact.norm())


class Int4PackProduct:
    """Holds a matrix in the operator's layout, half a byte a weight.

    Args:
        coded: the codes, unpacked, on a CUDA device.
        grid: what they mean.
    """

    def __init__(self, coded: Coded, grid: Grid) -> None:
        self._group = grid.size(coded.codes.shape[1])
        # The even column of a pair in the high nibble.
        pairs = coded.codes[:, ::2] << 4 | coded.codes[:, 1::2]
        self._weight = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_TILES)
        self._scales = scales_and_offsets(coded, grid)
        self.nbytes = self._weight.nbytes + self._scales.nbytes

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, matrix: PackedMatrix) -> torch.Tensor:
        """Multiply in bfloat16."""
        product = self.multiply(x.reshape(-1, x.shape[-1])).to(x.dtype).view(*x.shape[:-1], -1)
        return product if bias is None else product.add_(bias)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Map `rows` (rows, inputs) to (rows, outputs), bfloat16."""
        exact = rows.to(torch.bfloat16).contiguous()
        return torch.ops.aten._weight_int4pack_mm(exact, self._weight, self._group, self._scales)


def scales_and_offsets(coded: Coded, grid: Grid) -> torch.Tensor:
    """Return what `(code - 8)` is multiplied by and what is added: bfloat16 (groups, rows, 2).

    Example:
        >>> coded = Coded(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[6]]))
        >>> scales_and_offsets(coded, Grid(4, 32)).tolist()
        [[[0.5, 1.0]]]
    """
    scale = coded.scale.float()
    zero = torch.full_like(scale, 8) if coded.zero is None else coded.zero.float() / grid.zero_parts
    return torch.stack([scale, (8 - zero) * scale], dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
