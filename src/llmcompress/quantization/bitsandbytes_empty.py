"""Layers of bitsandbytes without weights: the names and sizes that a quantized model has, for plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .linear_form import LinearForm

if TYPE_CHECKING:
    from .bitsandbytes_paths import Kind

# Scales that share a scale of their own, with double quantization.
_SCALES = 256


def empty_layer(module: nn.Module, kind: Kind, *, block: int, double_quant: bool) -> nn.Module:
    """Return the layer of bitsandbytes that takes the place of a linear layer on the meta device.

    Args:
        module: an `nn.Linear` or a `Conv1D`.
        kind: the format of the weights.
        block: weights that share a scale, in 4 bits.
        double_quant: whether the scales of 4-bit blocks are quantized too.

    Example:
        >>> layer = empty_layer(nn.Linear(64, 32, device="meta"), "nf4", block=64, double_quant=False)
        >>> sorted(layer.state_dict())[-2:], layer.weight.shape
        (['weight.quant_map', 'weight.quant_state.bitsandbytes__nf4'], torch.Size([1024, 1]))
    """
    import bitsandbytes as bnb

    form = LinearForm.of(module)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(
            form.inputs, form.outputs, bias=form.bias is not None, has_fp16_weights=False, device="meta"
        )
        codes = torch.empty(form.outputs, form.inputs, dtype=torch.int8, device="meta")
        layer.weight = bnb.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, SCB=_without_memory(form.outputs)
        )
    else:
        layer = bnb.nn.Linear4bit(form.inputs, form.outputs, bias=form.bias is not None, quant_type=kind, device="meta")
        numbers = form.inputs * form.outputs
        blocks = -(-numbers // block)
        state = bnb.functional.QuantState(
            absmax=_without_memory(blocks, torch.uint8 if double_quant else torch.float32),
            shape=torch.Size((form.outputs, form.inputs)),
            code=_without_memory(16),
            blocksize=block,
            quant_type=kind,
            dtype=form.weight.dtype,
        )
        if double_quant:
            # The mean of the scales, which is written in words: as long as any.
            state.offset, state.nested = torch.tensor(0.1), True
            state.state2 = bnb.functional.QuantState(
                absmax=_without_memory(-(-blocks // _SCALES)), code=_without_memory(256), blocksize=_SCALES,
                dtype=torch.float32,
            )  # fmt: skip
        codes = torch.empty((numbers + 1) // 2, 1, dtype=torch.uint8, device="meta")
        layer.weight = bnb.nn.Params4bit(codes, quant_state=state, quant_type=kind, bnb_quantized=True, module=layer)
    layer.bias = form.bias
    return layer.requires_grad_(False).train(module.training)


def _without_memory(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of `count` numbers that all lie in one place; what is on the meta device has no such parts."""
    return torch.zeros((), dtype=dtype).expand(count)
