"""The masked model: full size, with channels that do nothing. A cut model must give exactly its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .groups import Group, silence, tensor_of
from .residual import normalising_over

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def masked(model: PreTrainedModel, cuts: Sequence[tuple[Group, torch.Tensor]]) -> Iterator[None]:
    """Silence all channels of each group but those kept, inside as the cut model will have them.

    Inside, experts that go are never chosen by their router, and norms take their mean over the features, channels or
    heads that stay.
    The zeros stay after the context; routers and norms are themselves again.

    Args:
        model: the model, changed in place.
        cuts: groups with the channels they keep, as `cut` takes them.
    """
    without: dict[int, torch.Tensor] = {}
    for group, keep in cuts:
        if group.kind != "experts":
            silence(model, group, keep)
            continue
        gone = torch.ones(group.count, dtype=torch.bool)
        gone[keep] = False
        for member in group.members:
            tensor = tensor_of(model, member.tensor)
            if tensor.dim() == 2:
                without[tensor.data_ptr()] = gone
    with ExitStack() as stack:
        stack.enter_context(_NeverRouted(without))
        for group, keep in cuts:
            if group.kind != "experts" and keep.dim() == 1:
                stack.enter_context(normalising_over(model, group, keep))
        yield


class _NeverRouted(TorchFunctionMode):
    """Gives the rows of some routers that are marked the logit minus infinity."""

    def __init__(self, without: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.without = without

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.without and func in (functional.linear, torch.matmul, torch.Tensor.matmul):
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            gone = self.without.get(weight.data_ptr()) if isinstance(weight, torch.Tensor) else None
            if gone is not None and result.shape[-1] == len(gone):
                return result.masked_fill(gone.to(result.device), float("-inf"))
        return result
