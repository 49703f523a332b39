"""The arithmetic of int8: symmetric codes for weights, affine codes for activations. Pure functions on tensors.

A weight row `w` is stored as codes `q` in [-127, 127] and one float scale `s`, so that `w ~ q * s`. An activation is
coded as `q = round(x / s) + z` in [0, 255], where `s` and `z` are chosen from its smallest and largest value.
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".)
"""

from __future__ import annotations

import torch

from .grid import row_chunks

WEIGHT_LIMIT = 127
"""Largest code of a weight. -128 is not used: the codes stay symmetric, and negation stays exact."""


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code each row of `weight` symmetrically in int8 with its own scale, the largest magnitude of the row over 127.

    Args:
        weight: float tensor (rows, columns), finite.

    Returns:
        Codes (rows, columns) in int8 and scales (rows,) in float32. The error of a weight is at most half its scale.

    Example:
        >>> codes, scale = quantize_rows(torch.tensor([[-1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]))
        >>> codes.tolist()
        [[-127, 64, 0], [0, 0, 0]]
    """
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    # Some rows at a time: the float32 copy of a large table would be as big as the model.
    for rows in row_chunks(weight):
        exact = weight[rows].to(torch.float32)
        largest = exact.abs().amax(dim=1) if exact.shape[1] else exact.new_zeros(exact.shape[0])
        # A row of zeros (a padding token, a pruned neuron) has no scale of its own; any positive one codes it exactly.
        scale[rows] = (largest / WEIGHT_LIMIT).clamp_min_(torch.finfo(torch.float32).tiny)
        codes[rows] = torch.round(exact / scale[rows].unsqueeze(1)).clamp_(-WEIGHT_LIMIT, WEIGHT_LIMIT)
    return codes, scale


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 weight (rows, columns) that `codes` and `scale` stand for.

    Example:
        >>> dequantize_rows(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([0.5])).tolist()
        [[1.0, -2.0]]
    """
    return codes.to(torch.float32) * scale.unsqueeze(1)


def round_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return the float32 weight (rows, columns) that the codes of `weight` stand for.

    Example:
        >>> round_rows(torch.tensor([[-127.0, 1.2]])).tolist()
        [[-127.0, 1.0]]
    """
    return dequantize_rows(*quantize_rows(weight))


def activation_range(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero point so that the codes 0 to `levels` cover `x`, and 0.0 is coded exactly.

    Args:
        x: float tensor of any shape, not empty.
        levels: the largest code, 255 for 8 bits.

    Returns:
        Scale and zero point, both float32 scalars; the zero point is a whole number in [0, levels].

    Example:
        >>> scale, zero = activation_range(torch.tensor([-1.0, 3.0]), 255)
        >>> round(float(scale) * 255, 6), int(zero)
        (4.0, 64)
    """
    low, high = torch.aminmax(x)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    return scale, torch.round(-low / scale).clamp_(0, levels)
