"""The int8 matrix product: by fbgemm, by `torch._int_mm`, or in plain torch; `int8_native` has the one in C++.

Activations are coded as they come (`Activations`: one scale for all of them, or one a row), or with a `Stored` scale
that was calibrated. fbgemm's operators live in torch itself (`torch.ops.quantized`), not in `torch.ao.quantization`,
whose Python API is deprecated and never imported here; the copy of the weight that they want comes from `packing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..affine import activation_range
from .native import native

Activations = Literal["tensor", "token"]
"""What shares one scale: the whole input of a layer (`tensor`), or each row of it (`token`)."""

_TINY = torch.finfo(torch.float32).tiny
_SHIFT = 128
# Of cuBLAS: more rows than 16, and columns in eights.
_FEWEST_ROWS, _MULTIPLE = 17, 8


@cache
def activation_bits() -> int:
    """Return how many bits of an activation this machine multiplies: 8, or 7 where products are added in 16 bits.

    That is so on x86 CPUs without VNNI, in fbgemm as in the native kernels: 8 bits would overflow there.
    """
    kernels = native()
    if kernels is not None and kernels.name == "avx2":  # asked for by name, perhaps, where the CPU has VNNI
        return 7
    exact = kernels is not None and kernels.name in {"avx_vnni", "avx512_vnni", "avx512_amx", "neon_dot"}
    return 8 if exact or torch.cpu._is_vnni_supported() else 7


@dataclass(frozen=True)
class Stored:
    """How activations are coded that have a stored scale: `round(x / scale + zero_point)`, from 0 to `levels`.

    Attributes:
        scale: what one step is worth, positive.
        zero_point: the code of 0.0, in [0, levels].
        levels: the largest code: 255, or 127 where `activation_bits` is 7.
    """

    scale: float
    zero_point: int
    levels: int

    @classmethod
    def of(cls, scale: float, zero_point: int) -> Stored:
        """Fit what was calibrated for codes from 0 to 255 to the codes that this machine can multiply.

        Example:
            >>> Stored.of(0.5, 128).levels in (127, 255)
            True
        """
        levels = 2 ** activation_bits() - 1
        return cls(scale * 255 / levels, round(zero_point * levels / 255), levels)


def has_int_mm(device: torch.device) -> bool:
    """Tell whether `torch._int_mm` is worth calling on `device`.

    On CUDA it needs compute capability 7.5. On a CPU without VNNI it is a plain loop, 20 times slower than casting the
    codes to float; with VNNI it goes through oneDNN.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    return device.type == "cpu" and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()


def fbgemm_linear(
    x: torch.Tensor, packed: Any, bias: torch.Tensor | None, activations: Activations | Stored
) -> torch.Tensor:
    """Multiply float32 `x` (..., in), at least 2-D, by what `pack` made of a weight; returns float32 (..., out)."""
    if activations == "tensor":
        return torch.ops.quantized.linear_dynamic(x, packed, activation_bits() == 7)
    if isinstance(activations, Stored):
        zero, scale = activations.zero_point, activations.scale
        if activations.levels < 255:
            # The operator would code what is out of range in 8 bits, whose products overflow.
            x = x.clamp(-zero * scale, (activations.levels - zero) * scale)
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, scale, zero, packed)
    limit = 2 ** (activation_bits() - 1) - 1
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
    # Every row now lies in [-1, 1], so the fixed range of this operator fits all and no row depends on another.
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x / largest, 1.0 / limit, limit + 1, packed
    )
    return product.mul_(largest) if bias is None else torch.addcmul(bias.float(), product, largest)


def int_mm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activations: Activations | Stored,
) -> torch.Tensor:
    """The same product by `torch._int_mm`, exact in int32, for devices that `has_int_mm`; it takes no packed copy."""
    codes, zero, unit = _code(x, activations)
    # Codes of a row are signed already; those from 0 to 255 are moved into int8, and what that adds is taken off.
    shift = 0 if activations == "token" else _SHIFT
    small = (codes - shift).to(torch.int8).reshape(-1, codes.shape[-1])
    rows, (outputs, inputs) = len(small), weight.shape
    columns = weight
    if weight.is_cuda:
        small = F.pad(small, (0, -inputs % _MULTIPLE, 0, max(_FEWEST_ROWS - rows, 0)))
        # Not by nothing: torch would copy the weight.
        if inputs % _MULTIPLE or outputs % _MULTIPLE:
            columns = F.pad(weight, (0, -inputs % _MULTIPLE, 0, -outputs % _MULTIPLE))
    product = torch._int_mm(small, columns.t())[:rows, :outputs]
    if activations != "token":
        product = product + (shift - zero).to(torch.int32) * weight.sum(dim=1, dtype=torch.int32)
    y = product.to(torch.float32).reshape(*x.shape[:-1], outputs) * (unit * scale)
    return y if bias is None else y + bias.float()


def torch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activations: Activations | Stored,
) -> torch.Tensor:
    """The same product in plain torch, on any device: the reference that the others are compared with.

    Products of codes are whole numbers: exact in float32 up to about 500 inputs, and beyond that to float rounding.
    """
    codes, zero, unit = _code(x, activations)
    y = F.linear(codes - zero, weight.to(torch.float32)) * (unit * scale)
    return y if bias is None else y + bias.float()


def rounded_activations(x: torch.Tensor, activations: Activations | Stored) -> torch.Tensor:
    """Return float32 `x` (..., in) as the products of this file see it: coded, and read back.

    Example:
        >>> x = torch.tensor([[1.0, 0.3]])
        >>> bool((rounded_activations(x, "token") - x).abs().max() < 0.01)
        True
    """
    codes, zero, unit = _code(x, activations)
    return (codes - zero) * unit


def _code(x: torch.Tensor, activations: Activations | Stored) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes of `x` as floats, the code of 0.0, and what one step is worth (a scalar, or one a row)."""
    zero = x.new_zeros(())
    if x.numel() == 0:
        return x, zero, x.new_ones(())
    if isinstance(activations, Stored):
        unit = x.new_tensor(activations.scale)
        # As fbgemm does: one rounding of x / scale + zero_point to float, then one to a whole number.
        exact = x.double() * unit.reciprocal().double() + activations.zero_point
        return exact.float().round_().clamp_(0, activations.levels), zero + activations.zero_point, unit
    if activations == "token":
        limit = 2 ** (activation_bits() - 1) - 1
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
        return torch.round(x / largest * limit), zero, largest / limit
    levels = 2 ** activation_bits() - 1
    unit, zero = activation_range(x, levels)
    return torch.round(x * unit.reciprocal()).add_(zero).clamp_(0, levels), zero, unit
