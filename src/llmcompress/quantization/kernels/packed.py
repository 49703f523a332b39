"""Products with packed weights, and which one serves where.

On a CPU the native kernels multiply by the packed codes as they lie in memory, with activations in 8 bits, one scale a
token, or in floats (`compute="float"`). Where they are not built, two ways are left, since torch has no fast product
for packed codes there (2.13: `_weight_int4pack_mm_for_cpu` is slower than float32):

- `int8`: the weight is coded anew in 8 bits, one scale a row, when it is first used, and multiplied by fbgemm with one
  scale of activations a token. The second coding moves a weight by at most 1/254 of the largest of its row, little
  beside the steps of 4 bits and less; the 8-bit copy is memory, told by `derived_bytes`, and never saved.
- `float`: rows are unpacked, multiplied in float and forgotten, at every call. Exact, no memory, slow for few tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..affine import quantize_rows
from ..grid import Coded, decode, row_chunks
from . import int4pack
from .int8 import fbgemm_linear, torch_linear
from .native import NativeProduct, native
from .packing import copy_bytes, has_fbgemm, marks, pack

if TYPE_CHECKING:
    from ..packed_matrix import PackedMatrix
    from ..packed_modules import Compute


class Product(Protocol):
    """A way to multiply by one matrix.

    Attributes:
        nbytes: of the copy of the matrix that it holds.
    """

    nbytes: int

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, matrix: PackedMatrix) -> torch.Tensor:
        """Map `x` (..., inputs), at least 2-D, to (..., outputs) in the dtype of `x`; `matrix` is the one it is for."""


# By the weight itself, so that a compiled graph, which knows tensors and no modules, finds the product of the module.
_PRODUCTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def product_of(matrix: PackedMatrix, compute: Compute) -> tuple[Any, Product]:
    """Return what tells whether a product still holds, and the product that is kept for `matrix`, made where needed."""
    state = product_state(matrix.weight, matrix.scale, matrix.zero, compute)
    known: tuple[Any, Product] | None = _PRODUCTS.get(matrix.weight)
    if known is None or known[0] != state:
        known = (state, packed_product(matrix, compute))
        _PRODUCTS[matrix.weight] = known
    return known


def product_state(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, compute: Compute
) -> tuple[Any, ...]:
    """Return what tells whether a product is still of these tensors of a matrix."""
    return marks(weight), marks(scale), None if zero is None else marks(zero), compute


def takes_packed_copy(device: torch.device, compute: Compute) -> bool:
    """Tell whether products on `device` are computed from a copy of the weights in 8 bits, which is memory."""
    return compute != "float" and native() is None and has_fbgemm(device)


def forget_product(weight: torch.Tensor) -> None:
    """Drop the product that is kept for `weight`, if any."""
    _PRODUCTS.pop(weight, None)


def packed_product(matrix: PackedMatrix, compute: Compute) -> Product:
    """Return a new product with `matrix` on its device; `"auto"` takes the fastest there."""
    kernels = native() if matrix.weight.is_cpu and matrix.columns else None
    if kernels is not None:
        return NativeProduct(matrix, kernels, exact=compute == "float")
    fast = has_fbgemm(matrix.weight.device)
    if compute == "int8" or (compute == "auto" and fast):
        return Int8Product(matrix.dequantized())
    if compute == "auto" and int4pack.fits(matrix) and int4pack.runs(matrix.weight.device):
        return int4pack.Int4PackProduct(matrix.coded(), matrix.grid)
    return FloatProduct()


class FloatProduct:
    """Unpacks at each call, a million weights at a time."""

    nbytes = 0

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, matrix: PackedMatrix) -> torch.Tensor:
        """Multiply in the dtype of `x`."""
        coded, grid = matrix.coded(), matrix.grid
        parts = []
        for rows in row_chunks(coded.codes):
            zero = coded.zero[rows] if coded.zero is not None else None
            weight = decode(Coded(coded.codes[rows], coded.scale[rows], zero), grid)
            parts.append(F.linear(x, weight.to(x.dtype)))
        product = torch.cat(parts, dim=-1)
        return product if bias is None else product.add_(bias)


class Int8Product:
    """Holds the weight (rows, columns) in 8 bits, packed by fbgemm where there is one."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._codes, self._scale = quantize_rows(weight)
        self.nbytes = copy_bytes(self._codes)
        self._packed: Any = None
        if has_fbgemm(weight.device):
            self._packed = pack(self._codes, self._scale, None, "token")
            self._codes = self._codes.new_empty(0)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, matrix: PackedMatrix) -> torch.Tensor:
        """Multiply in int8, one scale a row of `x`."""
        exact = x if x.dtype == torch.float32 else x.float()
        if self._packed is not None:
            product = fbgemm_linear(exact, self._packed, bias, "token")
        else:
            product = torch_linear(exact, self._codes, self._scale, bias, "token")
        return product if x.dtype == torch.float32 else product.to(x.dtype)
