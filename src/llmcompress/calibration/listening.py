"""Catch the inputs of weight matrices while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import CompressionError

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer
    from .statistics import Statistic

# Calls of the form f(inputs, weight), where the weight is already (in, out), or transposed for `linear`.
_LINEAR = {functional.linear}
_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}
_ADDED_PRODUCTS = {torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm}


@contextmanager
def listen(layers: Sequence[WeightLayer], statistics: Mapping[str, Sequence[Statistic]], *, who: str) -> Iterator[None]:
    """Feed the inputs of `layers` to their `statistics` for as long as the context is open.

    The inputs of a linear layer are what its module is called with. Experts (and matrices of other modules) are used
    by their module's own code, so the products with their weights are watched instead.

    Raises:
        CompressionError: an input is NaN or infinite; the message names the layer.
    """
    called = [layer for layer in layers if layer.kind in {"linear", "conv1d"}]
    used = [layer for layer in layers if layer.kind not in {"linear", "conv1d"}]
    with ExitStack() as stack:
        for layer in called:
            hook = _Hook(layer.name, statistics[layer.name][0], who)
            stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if used:
            stack.enter_context(_eager_experts(used))
            stack.enter_context(_Products(used, statistics, who))
        yield


class _Hook:
    def __init__(self, name: str, statistic: Statistic, who: str) -> None:
        self.name, self.statistic, self.who = name, statistic, who

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        _feed(self.statistic, inputs, self.name, self.who)


class _Products(TorchFunctionMode):
    """Watches every matrix product for those with one of our weights, told by its address."""

    def __init__(self, layers: Sequence[WeightLayer], statistics: Mapping[str, Sequence[Statistic]], who: str) -> None:
        super().__init__()
        self.who = who
        self.places = []
        for layer in layers:
            weight = layer.weight
            step = weight.nbytes // len(weight) if layer.kind == "experts" else weight.nbytes
            start = weight.data_ptr()
            self.places.append((start, start + weight.nbytes, step, layer.name, statistics[layer.name]))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = 0 if func in _LINEAR or func in _PRODUCTS else 1 if func in _ADDED_PRODUCTS else None
        if first is not None and len(args) > first + 1:
            self._look(args[first], args[first + 1])
        return func(*args, **kwargs)

    def _look(self, left: torch.Tensor, right: torch.Tensor) -> None:
        for inputs, weight in ((left, right), (right, left)):
            address = weight.data_ptr()
            for start, end, step, name, statistics in self.places:
                # A part of an expert that does not start it is a further share of rows, for the same inputs.
                if start <= address < end and (address - start) % step == 0:
                    turned = inputs if weight is right else inputs.mT
                    self._add(turned, (address - start) // step, name, statistics, weight)
                    return

    def _add(
        self, inputs: torch.Tensor, index: int, name: str, statistics: Sequence[Statistic], weight: torch.Tensor
    ) -> None:
        if weight.dim() < 3:
            _feed(statistics[index], inputs, f"{name}[{index}]" if len(statistics) > 1 else name, self.who)
            return
        for expert, own in enumerate(inputs):
            # All experts at once: a token that is routed elsewhere comes as a row of zeros.
            rows = own.reshape(-1, own.shape[-1])
            _feed(statistics[index + expert], rows[rows.any(-1)], f"{name}[{index + expert}]", self.who)


def _feed(statistic: Statistic, inputs: torch.Tensor, name: str, who: str) -> None:
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    if not len(rows):
        return
    low, high = torch.aminmax(rows)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CompressionError(
            f"{who}: NaN or infinite activations enter {name}; check the weights before it and the model's dtype "
            f"(float16 overflows where float32 and bfloat16 do not)."
        )
    statistic.update(rows)


@contextmanager
def _eager_experts(layers: Sequence[WeightLayer]) -> Iterator[None]:
    """Let transformers compute one expert at a time, with views of its weights: grouped products copy or reorder."""
    configs = {id(config): config for layer in layers if (config := getattr(layer.module, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
