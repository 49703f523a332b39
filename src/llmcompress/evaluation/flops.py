"""How many floating-point operations a forward pass takes, by torch's own counter, whatever the weights' encoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Field
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .inference import evaluating
from .latency import forward_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of operators of torch that multiply matrices: one of them without a formula makes the count too low.
_MULTIPLIES = re.compile(r"(^|_)(\w*mm|mv|addmv|dot|vdot|linear|convolution|attention|lstm|gru|rnn)(_|$)")


class Flops(BaseModel, frozen=True, extra="forbid"):
    """Operations of one forward pass: matrix products, convolutions and attention; a multiply and an add are two.

    A quantized layer counts as the product it stands for, so that the number tells the work of the architecture and
    not of the kernel. Attention counts as if nothing were masked, zeros as any other number.
    """

    batch_size: int
    tokens: int
    count: int | None = Field(description="operations; None where they cannot be counted")
    reason: str = Field(default="", description="why they cannot be")


def count_flops(model: PreTrainedModel, *, batch_size: int = 1, tokens: int = 128) -> Flops:
    """Count the operations of one forward pass, which is run once.

    Args:
        model: any text model; it is left as it was.
        batch_size: rows of the batch.
        tokens: tokens a row.

    Raises:
        UnsupportedModelError: the model does not read token ids.

    Example:
        >>> import llmcompress.testing as lt
        >>> found = count_flops(lt.tiny_model("bert"), tokens=8)
        >>> found.count == 2 * (8 * 2 * (4 * 64**2 + 2 * 64 * 128 + 2 * 8 * 64) + 64**2 + 2 * 64)
        True
    """
    inputs = forward_inputs(model, batch_size, tokens)
    unknown = _Uncounted()
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # The counter takes composite operators apart; the recorder below it sees what they are made of.
    with evaluating(model), _plain_products(model), unknown, counter:
        model(**inputs)
    if unknown.names:
        reason = f"torch has no formula for {', '.join(sorted(unknown.names))}"
        return Flops(batch_size=batch_size, tokens=tokens, count=None, reason=reason)
    return Flops(batch_size=batch_size, tokens=tokens, count=counter.get_total_flops())


class _Uncounted(TorchDispatchMode):
    """Notes every operator that may multiply matrices and that the counter has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in _FORMULAS:
            foreign = func.namespace not in ("aten", "prim", "prims")
            if foreign or _MULTIPLIES.search(packet.__name__):
                self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_products(model: nn.Module) -> Iterator[None]:
    """Let every linear layer whose weight is no float matrix do a plain product of its size, of zeros."""
    layers = [module for module in model.modules() if _is_coded(module)]
    own = {id(layer): vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}
    for layer in layers:
        layer.forward = _product_of_zeros(int(layer.in_features), int(layer.out_features))
    # Coded experts run the model's own code, which asks them for one expert's product at a time.
    experts = [module for module in model.modules() if hasattr(module, "float_shapes")]
    for module in experts:
        module.product = _expert_of_zeros(module)
    try:
        yield
    finally:
        for module in experts:
            del module.product
        for layer in layers:
            del layer.forward
            if id(layer) in own:  # accelerate's hooks, for instance, put one there
                layer.forward = own[id(layer)]


def _is_coded(module: nn.Module) -> bool:
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes) or any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    return not (isinstance(weight, torch.Tensor) and weight.is_floating_point())


def _product_of_zeros(inputs: int, outputs: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = x.new_zeros(1).expand(inputs, outputs)
        return (x.reshape(-1, inputs) @ weight).reshape(*x.shape[:-1], outputs)

    return forward


def _expert_of_zeros(module: Any) -> Callable[[str, int, torch.Tensor], torch.Tensor]:
    def product(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        _, outputs, inputs = module.sizes(name)
        return _product_of_zeros(inputs, outputs)(x)

    return product


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Queries meet keys, and what comes of it the values; one head of these may serve several of queries."""
    rows, heads, asked, width = query
    return int(2 * rows * heads * asked * key[-2] * (width + value[-1]))


def _grouped(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Each row of `left` meets the one matrix of `right` (experts, in, out) that its group is given."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


def _vectors(matrix: Any, vector: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows = matrix[0] if len(matrix) == 2 else 1
    return int(2 * rows * vector[0])


# What torch's counter leaves out, though ordinary models use it on CPUs; and attention, since older counters (that of
# torch 2.11) do not know of grouped heads.
_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention,
    torch.ops.aten.mv: _vectors,
    torch.ops.aten.dot: _vectors,
}
if hasattr(torch.ops.aten, "_grouped_mm"):  # not in torch 2.5
    _FORMULAS[torch.ops.aten._grouped_mm] = _grouped
