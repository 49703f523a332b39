"""How big a model is: parameters, zeros, bytes in memory, bytes on disk; each measured, ties counted once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from .empty import noted_zeros
from .saved import file_bytes, saved_tensors
from .turns import let_go

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Footprint(BaseModel, frozen=True):
    """Size of a model.

    Example:
        >>> from torch import nn
        >>> footprint(nn.Linear(4, 3)).parameters
        15
    """

    parameters: int = Field(description="weights the model has, whatever their encoding; tied ones once")
    nonzero: int = Field(description="how many of them are not zero")
    memory_bytes: int = Field(description="bytes of all tensors in memory, derived copies of packed weights included")
    disk_bytes: int = Field(description="bytes of the safetensors file that save_pretrained writes")

    @property
    def zeros(self) -> float:
        """Share of weights that are exactly zero, in [0, 1]."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0


def footprint(model: nn.Module | PreTrainedModel) -> Footprint:
    """Measure the size of `model`. Changes nothing, writes nothing."""
    parameters = nonzero = 0
    for _, logical, zeros in _weights(model):
        parameters += logical
        nonzero += logical - zeros
    return Footprint(
        parameters=parameters,
        nonzero=nonzero,
        memory_bytes=_memory_bytes(model),
        disk_bytes=disk_bytes(model),
    )


def disk_bytes(model: nn.Module) -> int:
    """Tell the bytes of the safetensors file that `save_pretrained` writes, header included, without writing it.

    Exact, but for a model above the 50 GB at which transformers begins another file with a header of its own.
    """
    return file_bytes(saved_tensors(model))


def sparse_bytes(model: nn.Module) -> int:
    """Return the bytes of a file that leaves zeros out: for each weight one bit, and the value where it is not zero.

    Theoretical: no file is written so and no kernel reads it. A tensor that would grow by it counts as it is.
    """
    saved = 0
    for tensor, logical, zeros in _weights(model):
        saved += max(0, zeros * tensor.nbytes // max(logical, 1) - (logical + 7) // 8)
    return disk_bytes(model) - saved


def _weights(model: nn.Module) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield each distinct weight tensor, the number of weights it stands for, and how many of them are zero.

    A module that stores a weight in another form says so by `coded_weights()`, a list of (tensor, weights it holds),
    and `zero_counts()`. Of weights on the meta device zeros are those noted (`empty.note_zeros`), of codes none.
    """
    seen: set[int] = set()
    for module in model.modules():
        coded = {id(tensor): number for number, (tensor, _) in enumerate(getattr(module, "coded_weights", list)())}
        counts: list[tuple[int, int]] = []
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or id(tensor) in seen or not (id(tensor) in coded or isinstance(tensor, nn.Parameter)):
                continue
            seen.add(id(tensor))
            if id(tensor) not in coded:
                # bitsandbytes keeps the shape that its packed bytes stand for in the quantization state.
                shape = getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape)
                logical = int(torch.Size(shape).numel())
                yield tensor, logical, _zeros(tensor) if tensor.numel() == logical else 0
            else:
                counts = counts or _counts(module)
                yield tensor, *counts[coded[id(tensor)]]
            let_go(tensor)


def _counts(module: Any) -> list[tuple[int, int]]:
    """Return for each weight in codes how many there are and how many are zero."""
    coded = module.coded_weights()
    zeros = [0] * len(coded) if any(tensor.is_meta for tensor, _ in coded) else module.zero_counts()
    return [(number, zero) for (_, number), zero in zip(coded, zeros, strict=True)]


def _zeros(tensor: torch.Tensor) -> int:
    return noted_zeros(tensor) if tensor.is_meta else tensor.numel() - int(torch.count_nonzero(tensor))


def _memory_bytes(model: nn.Module) -> int:
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size() + _state_bytes(getattr(tensor, "quant_state", None))
        # Copies in another form (packed for a kernel) are no buffers, since they are never saved; they are memory.
        total += int(getattr(module, "derived_bytes", int)())
    return total


def _state_bytes(state: object) -> int:
    """Return the bytes of the tensors in a quantization state of bitsandbytes, nested ones included."""
    if state is None:
        return 0
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return own + _state_bytes(getattr(state, "state2", None))
