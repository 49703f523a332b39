"""What lies between the products: activation functions, RMSNorm and LayerNorm, each in one pass over its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from .library import Native

Gate = Literal["gelu", "gelu_tanh", "silu"]
"""GELU by the error function, GELU by its approximation with tanh, and SiLU."""

GATES: dict[Gate, int] = {"gelu": 0, "gelu_tanh": 1, "silu": 2}
"""The numbers by which the kernels know them."""

# For `torch.jit.trace`, which records operators of torch only, and of a kernel the memory of its answer.
_TRACED: dict[Gate, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activate(gate: Gate, x: torch.Tensor, kernels: Native) -> torch.Tensor:
    """Apply an activation function, within `1e-6 * (1 + |x|)` of the exact one; infinities and NaN as torch has them.

    Args:
        gate: which one.
        x: float32, of any shape, contiguous, on the CPU.
        kernels: what computes.

    Returns:
        A new tensor of the same shape.
    """
    if torch.jit.is_tracing():
        return _TRACED[gate](x)
    y = torch.empty_like(x)
    kernels.functions.llmc_activate(
        kernels.table, GATES[gate], x.data_ptr(), x.numel(), y.data_ptr(), torch.get_num_threads()
    )
    return y


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: Native, offset: float = 0.0
) -> torch.Tensor:
    """Return `x / sqrt(mean(x * x) + epsilon) * (weight + offset)`, the mean of each row (Zhang & Sennrich 2019).

    Args:
        x: float32 (..., columns), contiguous, on the CPU, not empty.
        weight: float32 (columns,), contiguous, on the CPU.
        epsilon: added to the mean.
        kernels: what computes.
        offset: added to the weight.

    Returns:
        A new tensor of the shape of `x`.
    """
    if torch.jit.is_tracing():
        return F.rms_norm(x, weight.shape, weight + offset, epsilon)
    return _by_rows(kernels.functions.llmc_rms_norm, x, epsilon, kernels, weight.data_ptr(), offset)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, kernels: Native
) -> torch.Tensor:
    """Return `(x - mean) / sqrt(variance + epsilon) * weight + bias`, those of each row (Ba et al. 2016).

    Args:
        x: float32 (..., columns), contiguous, on the CPU, not empty.
        weight: float32 (columns,), contiguous, on the CPU.
        bias: the same.
        epsilon: added to the variance.
        kernels: what computes.

    Returns:
        A new tensor of the shape of `x`.
    """
    if torch.jit.is_tracing():
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    return _by_rows(kernels.functions.llmc_layer_norm, x, epsilon, kernels, weight.data_ptr(), bias.data_ptr())


def _by_rows(
    norm: Callable[..., None], x: torch.Tensor, epsilon: float, kernels: Native, *weights: float
) -> torch.Tensor:
    y, columns = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // columns
    norm(kernels.table, x.data_ptr(), *weights, rows, columns, epsilon, y.data_ptr(), torch.get_num_threads())
    return y
