"""Products with packed weights, computed from the very bytes that are stored: there is no copy in another form."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch

from ....errors import CompressionError
from ...grid import LEVELS, Codebook, Grid
from ...packing import packed_width
from .chain import ProductStep
from .expected import expect
from .library import Native

if TYPE_CHECKING:
    from ...packed_matrix import PackedMatrix

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# A step of a codebook is a whole number below 128, for 16-bit sums of products with activations of 8 bits.
_MIDDLE = 64


class _Matrix(ctypes.Structure):
    """`PackedMatrix` of packed_matrix.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "levels", "steps")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "bits", "code_bytes", "groups", "size")),
        *((name, ctypes.c_int64) for name in ("scale_kind", "zero_bits", "zero_bytes")),
        *((name, ctypes.c_float) for name in ("zero_unit", "middle", "unit")),
    )


class NativeProduct:
    """Multiplies by a packed matrix on the CPU, in 8-bit activations with one scale a row, or in floats.

    Args:
        matrix: the one it is for; its tensors are read in place, and what is written to them counts at once.
        exact: whether activations stay floats.
        kernels: what computes.

    Raises:
        RuntimeError: a tensor of the matrix is not what its grid says.
    """

    nbytes = 0

    def __init__(self, matrix: PackedMatrix, kernels: Native, *, exact: bool) -> None:
        _check(matrix)
        grid, columns = matrix.grid, matrix.columns
        levels, steps, unit = _codebook(grid.codebook) if grid.codebook else (None, None, 1.0)
        weight, scale, zero = matrix.weight, matrix.scale.contiguous(), matrix.zero
        zero = None if zero is None else zero.contiguous()
        parts = (weight.contiguous(), scale, zero, levels, steps)
        # Not the weight itself: products are kept by it, and must not keep it alive.
        self._tensors = tuple(part for part in parts if part is not weight)
        self._matrix = _Matrix(
            *(None if part is None else part.data_ptr() for part in parts),
            *(len(weight), columns, grid.bits, weight.shape[1], scale.shape[1], grid.size(columns)),
            *(_KINDS[scale.dtype], grid.zero_width, 0 if zero is None else zero.shape[1]),
            *(1 / grid.zero_parts, _MIDDLE if grid.codebook else 2.0 ** (grid.bits - 1), unit),
        )
        self._address = ctypes.addressof(self._matrix)
        self._outputs, self._columns, self._exact = len(weight), columns, exact
        self._multiply, self._table = kernels.functions.llmc_multiply_packed, kernels.table

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, matrix: PackedMatrix) -> torch.Tensor:
        """Multiply in float32, whatever the dtype of `x`, whose the result has.

        Raises:
            RuntimeError: `x` or the bias is of another width, or not on the CPU.
            MemoryError: there is too little for the codes of `x`.
        """
        *shape, columns = x.shape
        if columns != self._columns or not x.is_cpu:
            raise RuntimeError(
                f"a packed layer of {self._columns} inputs on the CPU was given {tuple(x.shape)} on {x.device}"
            )
        given = x.dtype
        if torch.jit.is_tracing():
            # A trace knows operators of torch only: it would hold the memory of an answer, and not what computes it.
            raise CompressionError(
                "a packed layer cannot be recorded by torch.jit.trace, which sees no kernel outside of torch; use "
                "torch.export.export or torch.compile, or trace what llmcompress.dequantize(model) returns."
            )
        exact = x.contiguous() if given is torch.float32 else x.float().contiguous()
        if bias is not None:
            if bias.dtype is not torch.float32 or not bias.is_contiguous():
                bias = bias.float().contiguous()
            expect("the bias of a packed layer", bias, (self._outputs,), torch.float32)
        product = exact.new_empty((*shape, self._outputs))
        failed = self._multiply(
            self._table,
            self._address,
            exact.data_ptr(),
            x.numel() // columns,
            None if bias is None else bias.data_ptr(),
            product.data_ptr(),
            self._exact,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the codes of activations {tuple(x.shape)}")
        return product if given is torch.float32 else product.to(given)

    def step(self, how: object) -> ProductStep:
        """Return the product as a step of a chain; `how` is the bias, float32, or None."""
        bias = how if isinstance(how, torch.Tensor) else None
        if bias is not None:
            expect("the bias of a packed layer", bias.contiguous(), (self._outputs,), torch.float32)
        address = None if bias is None else bias.data_ptr()
        return ProductStep(
            self._columns, self._outputs, self._address, packed=True, option=int(self._exact), bias=address
        )


def _check(matrix: PackedMatrix) -> None:
    """Refuse a matrix whose tensors do not fit its grid."""
    grid, columns, outputs = matrix.grid, matrix.columns, len(matrix.weight)
    groups = grid.groups(columns)
    codes = (outputs, packed_width(columns, grid.bits))
    expect("the codes of a packed layer", matrix.weight, codes, torch.int8, torch.uint8)
    expect("the scales of a packed layer", matrix.scale, (outputs, groups), *_KINDS)
    if matrix.zero is not None:
        zero = (outputs, packed_width(groups, grid.zero_width))
        expect("the zero points of a packed layer", matrix.zero, zero, torch.uint8)


def activation_limit(grid: Grid, kernels: Native) -> int:
    """Return the code of a row's largest activation, by which `NativeProduct` multiplies where it is not exact."""
    return int(kernels.functions.llmc_byte_limit(kernels.table)) if grid.bits == 8 else 127


def codebook_steps(codebook: Codebook) -> tuple[list[int], float]:
    """Return the levels of a codebook as whole numbers from 1 to 127, and what one step from 64 on is worth.

    Of all units in reach the one with the least squared error: at most half a step, 1/126 of the largest level.

    Example:
        >>> steps, unit = codebook_steps("fp4")
        >>> [round((step - 64) * unit, 3) for step in steps[8:]]
        [0.0, 0.167, 0.25, 0.333, 0.5, 0.667, 1.0]
    """
    levels = torch.tensor(LEVELS[codebook], dtype=torch.float64, device="cpu")
    largest = torch.arange(40, _MIDDLE - 0.5, 0.01, dtype=torch.float64, device="cpu")[:, None]
    steps = (levels * largest).round()
    best = int((steps / largest - levels).square().sum(1).argmin())
    return [int(step) + _MIDDLE for step in steps[best]], 1 / float(largest[best])


@cache
def _codebook(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return 16 levels as floats and as steps, and what a step is worth."""
    steps, unit = codebook_steps(codebook)
    unused = 16 - len(steps)
    # On the CPU whatever the default device is: the kernels read them by their addresses.
    levels = torch.tensor([*LEVELS[codebook], *[0.0] * unused], dtype=torch.float32, device="cpu")
    return levels, torch.tensor([*steps, *[_MIDDLE] * unused], dtype=torch.uint8, device="cpu"), unit
