"""The product with packed weights as an operator of torch, which a compiled graph calls without looking inside."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..grid import Codebook, Grid
from ..packed_matrix import PackedMatrix
from .int8_ops import refuse_backward
from .packed import product_of


@torch.library.custom_op("llmcompress::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    codebook: str | None,
    zero_bits: int | None,
    compute: str,
) -> torch.Tensor:
    """Multiply `x` (..., in), of any float dtype, by packed `weight`.

    Args:
        x: at least 1-D.
        weight: int8 (out, bytes).
        scale: (out, groups).
        zero: uint8 (out, bytes), or None.
        bias: (out,) or None.
        columns: inputs.
        bits: of a code; this and the next four are those of a `Grid`.
        group_size: consecutive inputs that share a scale.
        symmetric: whether there are no zero points.
        codebook: unequal steps, or None.
        zero_bits: of a stored zero point.
        compute: `"int8"`, `"float"` or `"auto"`.

    Returns:
        (..., out) in the dtype of `x`.
    """
    grid = Grid(bits, group_size, symmetric, cast("Codebook | None", codebook), scale.dtype, zero_bits)
    matrix = PackedMatrix(weight, scale, zero, grid, columns)
    product = product_of(matrix, cast(Any, compute))[1]
    y = product(x if x.dim() > 1 else x.unsqueeze(0), bias, matrix)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@packed_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    codebook: str | None,
    zero_bits: int | None,
    compute: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


refuse_backward(packed_linear, "PackedLinear", lambda inputs: cast(int, inputs[5]))
