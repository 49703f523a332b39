"""Catch the inputs of weight matrices while the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..anatomy.reads import PRODUCTS, one_expert_at_a_time
from ..errors import CompressionError
from .statistics import SummedInputs, parts_of

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer
    from .statistics import Statistic

# f(inputs, weight) and f(added, inputs, weight).
_PRODUCTS = {functional.linear, *PRODUCTS}
_ADDED_PRODUCTS = {torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm}
# Twice this is no float32 number any more.
_LARGEST = torch.finfo(torch.float32).max / 2

# Layers whose module is called with their inputs; other weights are used by the code of the module they are in.
_CALLED = ("linear", "conv1d")


@contextmanager
def listen(layers: Sequence[WeightLayer], statistics: Mapping[str, Sequence[Statistic]], *, who: str) -> Iterator[None]:
    """Feed the inputs of `layers` to their `statistics` for as long as the context is open.

    The inputs of a linear layer are what its module is called with. Experts (and matrices of other modules) are used
    by their module's own code, so the products with their weights are watched instead.

    Raises:
        CompressionError: an input is NaN or infinite; the message names the layer.
    """
    used = [layer for layer in layers if is_watched(layer)]
    latest = _Latest()
    with ExitStack() as stack:
        for layer in layers:
            if layer.kind in _CALLED:
                hook = _Hook(layer, statistics[layer.name][0], who, latest)
                stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if used:
            stack.enter_context(one_expert_at_a_time(used))
            stack.enter_context(_Products([_Watched(layer, statistics[layer.name], who) for layer in used]))
        yield


def is_watched(layer: WeightLayer) -> bool:
    """Whether the layer's inputs are told from the products with its weight, and not from a call of its module."""
    return layer.kind not in _CALLED


class _Latest:
    """What the layer called last got, and what was added up of it: the next one may get the same (q, k and v)."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._version = 0
        self._sums: dict[type, tuple[torch.Tensor, ...]] = {}

    def sums(self, statistic: SummedInputs, inputs: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the sums of `rows`, which are those of `inputs`."""
        # Where torch does not tell whether a tensor was changed, nothing is taken for the same.
        version = -1 if inputs.is_inference() else inputs._version
        if self._inputs is not inputs or self._version != version or version < 0:
            self._inputs, self._version, self._sums = inputs, version, {}
        kind = type(statistic)
        if kind not in self._sums:
            self._sums[kind] = statistic.sums(rows)
        return self._sums[kind]


class _Hook:
    def __init__(self, layer: WeightLayer, statistic: Statistic, who: str, latest: _Latest) -> None:
        self._layer, self._statistic, self._who, self._latest = layer, statistic, who, latest

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        _feed(self._statistic, inputs, self._layer, self._layer.name, self._who, self._latest)


class _Watched:
    """One weight, told by its place in memory, and the statistics of its parts."""

    def __init__(self, layer: WeightLayer, statistics: Sequence[Statistic], who: str) -> None:
        self._layer, self._statistics, self._who = layer, statistics, who
        self._part = layer.weight.nbytes // parts_of(layer)

    def part_at(self, address: int) -> int | None:
        """Return the number of the expert that begins at `address`, if one does."""
        # A share of an expert's rows that does not begin it gets the same inputs as the one that does.
        # The weight may come into memory, at another address, only when its block runs.
        part, rest = divmod(address - self._layer.weight.data_ptr(), self._part)
        return part if rest == 0 and 0 <= part < len(self._statistics) else None

    def feed(self, part: int, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Take the inputs of a product with `weight`: one expert's, or a stack of them from number `part` on."""
        name = self._layer.name
        if weight.dim() == 3:
            for number, own in enumerate(inputs.expand(len(weight), -1, -1), start=part):
                # With all experts in one product, a token that is routed elsewhere comes as a row of zeros.
                _feed(self._statistics[number], own[own.any(-1)], self._layer, f"{name}[{number}]", self._who)
        else:
            where = f"{name}[{part}]" if len(self._statistics) > 1 else name
            _feed(self._statistics[part], inputs, self._layer, where, self._who)


class _Products(TorchFunctionMode):
    """Looks at every matrix product for those with one of the watched weights."""

    def __init__(self, watched: Sequence[_Watched]) -> None:
        super().__init__()
        self._watched = watched

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = 0 if func in _PRODUCTS else 1 if func in _ADDED_PRODUCTS else len(args)
        if len(args) > first + 1:
            left, right = args[first], args[first + 1]
            # Some models write inputs @ weight, some weight @ inputs.
            if not self._look(right, left):
                self._look(left, right.mT if right.dim() > 1 else right)
        return func(*args, **(kwargs or {}))

    def _look(self, weight: torch.Tensor, inputs: torch.Tensor) -> bool:
        address = weight.data_ptr()
        for watched in self._watched:
            part = watched.part_at(address)
            if part is not None:
                watched.feed(part, inputs, weight)
                return True
        return False


@torch.no_grad()
def _feed(
    statistic: Statistic,
    inputs: torch.Tensor,
    layer: WeightLayer,
    name: str,
    who: str,
    latest: _Latest | None = None,
) -> None:
    rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(layer.weight.device)
    if not len(rows):
        return
    low, high = torch.aminmax(rows)
    # Also false for NaN. Bins of a histogram, for one, reach to the next power of two.
    largest = max(-float(low), float(high))
    if not largest < _LARGEST:
        found = f"activations of {largest:.2g}" if math.isfinite(largest) else "NaN or infinite activations"
        raise CompressionError(
            f"{who}: {found} enter {name}; check the weights before it and the model's dtype (float16 overflows where "
            f"float32 and bfloat16 do not)."
        )
    if latest is not None and isinstance(statistic, SummedInputs):
        statistic.add(len(rows), latest.sums(statistic, inputs, rows))
    else:
        statistic.update(rows)
