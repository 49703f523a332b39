"""The int8 matrix product: fbgemm on x86, plain torch elsewhere. The only file that knows.

fbgemm's operators live in torch itself (`torch.ops.quantized`), not in `torch.ao.quantization`, whose Python API is
deprecated and never imported here. They want the weight in a layout of their own; that packed copy is derived from the
plain int8 tensors, kept by the module that asked for it, and never saved.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..affine import activation_range

Activations = Literal["tensor", "token"]
"""What shares one scale: the whole input of a layer (`tensor`), or each row of it (`token`)."""

_TINY = torch.finfo(torch.float32).tiny


@cache
def activation_bits() -> int:
    """Return 8, or 7 on x86 CPUs without VNNI, where fbgemm adds pairs of products in 16 bits: 8 would overflow."""
    return 8 if torch.cpu._is_vnni_supported() else 7


def has_fbgemm(device: torch.device) -> bool:
    """Tell whether the fbgemm operators run on `device` in this build of torch, with the engine now chosen."""
    return device.type == "cpu" and torch.backends.quantized.engine in {"x86", "fbgemm"}


def pack(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: Activations) -> Any:
    """Return fbgemm's own copy of a weight.

    Args:
        weight: int8 codes (out, in).
        scale: float32 (out,).
        bias: (out,) or None.
        activations: the copy serves only calls with the same value.
    """
    zero_points = torch.zeros(weight.shape[0], dtype=torch.long)
    with warnings.catch_warnings():
        # torch announces the end of quantized tensor types. This one lives for two lines, on its way to the packer.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        coded = torch._make_per_channel_quantized_tensor(weight.detach(), scale.detach().double(), zero_points, 0)
    # With one scale a row the bias is added after that scale, so it must not be in the packed product.
    inside = bias is not None and activations == "tensor"
    return torch.ops.quantized.linear_prepack(coded, bias.detach().float() if inside and bias is not None else None)


def packed_bytes(weight: torch.Tensor) -> int:
    """Estimate the memory of a packed copy: the codes; for each output a scale, zero point, column sum and bias."""
    return weight.numel() + 16 * weight.shape[0]


def fbgemm_linear(x: torch.Tensor, packed: Any, bias: torch.Tensor | None, activations: Activations) -> torch.Tensor:
    """Multiply float32 `x` (..., in), at least 2-D, by what `pack` made of a weight; returns float32 (..., out)."""
    if activations == "tensor":
        return torch.ops.quantized.linear_dynamic(x, packed, activation_bits() == 7)
    limit = 2 ** (activation_bits() - 1) - 1
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
    # Every row now lies in [-1, 1], so the fixed range of this operator fits all and no row depends on another.
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x / largest, 1.0 / limit, limit + 1, packed
    )
    return product.mul_(largest) if bias is None else torch.addcmul(bias.float(), product, largest)


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: Activations
) -> torch.Tensor:
    """The same product in plain torch, on any device: codes the activations alike, multiplies the codes as floats.

    Products of codes are whole numbers: exact in float32 up to about 500 inputs, and beyond that to float rounding.
    """
    codes, unit = _code_activations(x, activations)
    product = F.linear(codes, weight.to(torch.float32)) * unit * scale
    return product if bias is None else product + bias.float()


def _code_activations(x: torch.Tensor, activations: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of `x` less their zero point, as floats, and what one step of them is worth."""
    if x.numel() == 0:
        return x, x.new_ones(())
    if activations == "token":
        limit = 2 ** (activation_bits() - 1) - 1
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY)
        return torch.round(x / largest * limit), largest / limit
    levels = 2 ** activation_bits() - 1
    unit, zero = activation_range(x, levels)
    return torch.round(x / unit).add_(zero).clamp_(0, levels).sub_(zero), unit
