"""The int8 products as operators of torch, which a compiled graph calls without looking inside.

Modules call these only while `torch.compile` traces them: the dispatcher costs some microseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ...errors import CompressionError
from .int8 import Activations, Stored, has_int_mm, int_mm_linear, torch_linear
from .packing import packed_copy, takes_copy


def unpacked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activations: Activations | Stored,
) -> torch.Tensor:
    """Multiply float32 `x` (..., in) by int8 `weight` where no kernel takes a copy: the fastest way left."""
    product = int_mm_linear if has_int_mm(weight.device) else torch_linear
    return product(x, weight, scale, bias, activations)


@torch.library.custom_op("llmcompress::int8_linear", mutates_args=())
def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: str
) -> torch.Tensor:
    """Multiply `x` (..., in), of any float dtype, by int8 `weight` (out, in) with one `scale` an output.

    Args:
        x: at least 1-D.
        weight: int8 codes.
        scale: float32 (out,).
        bias: (out,) or None.
        activations: `"tensor"` or `"token"`: what shares one scale of activations.

    Returns:
        (..., out) in the dtype of `x`.
    """
    return _linear(x, weight, scale, bias, cast(Activations, activations))


@torch.library.custom_op("llmcompress::int8_static_linear", mutates_args=())
def int8_static_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
) -> torch.Tensor:
    """The same with a stored scale of activations.

    Args:
        x: at least 1-D.
        weight: int8 codes.
        scale: float32 (out,).
        bias: (out,) or None.
        input_scale: float32 scalar; what one of 255 steps is worth.
        input_zero_point: int32 scalar; the code of 0.0 in [0, 255].

    Returns:
        (..., out) in the dtype of `x`.
    """
    return _linear(x, weight, scale, bias, Stored.of(float(input_scale), int(input_zero_point)))


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activations: Activations | Stored,
) -> torch.Tensor:
    exact = x.to(torch.float32) if x.dim() > 1 else x.to(torch.float32).unsqueeze(0)
    if takes_copy(weight):
        y = packed_copy(weight, scale, bias, activations)[1](exact, bias, activations)
    else:
        y = unpacked_linear(exact, weight, scale, bias, activations)
    return y.reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)


@torch.library.custom_op("llmcompress::no_backward", mutates_args=())
def _no_backward(gradient: torch.Tensor, inputs: int, who: str) -> torch.Tensor:
    """Fail when a backward pass runs, not when a graph with one is traced."""
    raise CompressionError(
        f"{who} has no backward pass: a quantized model cannot be trained; train first and quantize last."
    )


@_no_backward.register_fake
def _(gradient: torch.Tensor, inputs: int, who: str) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], inputs))


@int8_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@int8_static_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def refuse_backward(operator: Any, who: str, inputs_of: Callable[[tuple[Any, ...]], int]) -> None:
    """Have a backward pass through `operator` fail, and say that a layer of class `who` has none.

    Args:
        operator: a custom operator whose first argument is the input of a product.
        who: for the message.
        inputs_of: from the operator's arguments, the last size of that input.
    """

    def note(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.inputs, ctx.others = inputs_of(inputs), len(inputs) - 1

    def refuse(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (torch.ops.llmcompress.no_backward(gradient, ctx.inputs, who), *[None] * ctx.others)

    operator.register_autograd(refuse, setup_context=note)


refuse_backward(int8_linear, "Int8Linear", lambda inputs: int(inputs[1].shape[1]))
refuse_backward(int8_static_linear, "Int8StaticLinear", lambda inputs: int(inputs[1].shape[1]))
