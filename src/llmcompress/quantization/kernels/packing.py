"""The copy of an int8 weight that a kernel multiplies by: made on demand, kept as long as the weight, never saved."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .int8 import Activations, Stored, fbgemm_linear
from .int8_native import Int8Weight, multiplies
from .native import native


class PackedCopy(Protocol):
    """A weight as a kernel wants it, with its scale and, if it has one, its bias.

    Attributes:
        nbytes: of memory.
    """

    nbytes: int

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored) -> torch.Tensor:
        """Multiply float32 `x` (..., in), at least 2-D; returns float32 (..., out).

        Args:
            x: the input.
            bias: the one that the copy was made of.
            activations: what the copy was made for.
        """


Copy = tuple[Any, PackedCopy]
"""What the copy was made of, and the copy."""

# By the weight itself, so that a compiled graph, which knows tensors and no modules, finds the copy of the module.
_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass
class FbgemmCopy:
    """The copy of fbgemm."""

    packed: Any
    nbytes: int

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored) -> torch.Tensor:
        """Multiply."""
        return fbgemm_linear(x, self.packed, bias, activations)


def has_fbgemm(device: torch.device) -> bool:
    """Tell whether the fbgemm operators run on `device` in this build of torch, with the engine now chosen."""
    return device.type == "cpu" and torch.backends.quantized.engine in {"x86", "fbgemm"}


def takes_copy(weight: torch.Tensor) -> bool:
    """Tell whether the product with `weight` (out, in) is computed from a copy on this machine."""
    if torch.jit.is_tracing():
        return False  # the trace would hold the memory of an answer, and not what computes it
    return multiplies(weight) if native() is not None else has_fbgemm(weight.device)


def copies_codes(device: torch.device) -> bool:
    """Tell whether products with int8 weights on `device` are computed from copies of the codes."""
    return device.type == "cpu" if native() is not None else has_fbgemm(device)


def pack(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored
) -> Any:
    """Return fbgemm's own copy of a weight.

    Args:
        weight: int8 codes (out, in).
        scale: float32 (out,).
        bias: (out,) or None.
        activations: the copy serves only calls with the same value.
    """
    zero_points = torch.zeros(weight.shape[0], dtype=torch.long, device=weight.device)
    with warnings.catch_warnings():
        # torch announces the end of quantized tensor types. This one lives for two lines, on its way to the packer.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        coded = torch._make_per_channel_quantized_tensor(weight.detach(), scale.detach().double(), zero_points, 0)
    # With one scale a row the bias is added after that scale, so it must not be in the packed product.
    inside = bias is not None and activations != "token"
    return torch.ops.quantized.linear_prepack(coded, bias.detach().float() if inside and bias is not None else None)


def make_copy(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored
) -> PackedCopy:
    """Return a new copy for the fastest kernel; for a weight that `takes_copy`, arguments as those of `pack`."""
    kernels = native()
    if kernels is not None:
        return Int8Weight(weight, scale, bias, kernels)
    return FbgemmCopy(pack(weight, scale, bias, activations), copy_bytes(weight))


def packed_copy(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored
) -> Copy:
    """Return the copy that is kept for `weight`, made anew where any of the tensors was replaced or written to."""
    state = copy_state(weight, scale, bias, activations)
    known: Copy | None = _COPIES.get(weight)
    if known is None or known[0] != state:
        known = (state, make_copy(weight, scale, bias, activations))
        _COPIES[weight] = known
    return known


def copy_state(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored
) -> tuple[Any, ...]:
    """Return what tells whether a copy is still of these tensors; while `torch.jit.trace` records, none is."""
    if torch.jit.is_tracing():
        return ()
    return marks(weight), marks(scale), None if bias is None else marks(bias), activations


def forget_copy(weight: torch.Tensor) -> None:
    """Drop the copy that is kept for `weight`, if any."""
    _COPIES.pop(weight, None)


def packed_bytes(weight: torch.Tensor) -> int:
    """Return the memory of the copy kept for `weight`, 0 before the first product."""
    known: Copy | None = _COPIES.get(weight)
    return known[1].nbytes if known is not None else 0


def copy_bytes(weight: torch.Tensor) -> int:
    """Estimate the memory of fbgemm's copy: the codes; for each output a scale, zero point, column sum and bias."""
    return weight.numel() + 16 * weight.shape[0]


def marks(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor is replaced or written to, though not through `tensor.data`.

    What is written to an inference tensor, which counts no writes, is not seen either.
    """
    # The address of a tensor that is gone is often that of the next one; a weak reference tells them apart. As long as
    # its tensor lives it is one object, found equal before the tensors are; two that live have two ids.
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, id(tensor), weakref.ref(tensor)


class Identity(tuple[Any, ...]):
    """The `marks` of a tensor; pickled or copied they are those of none."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[Identity], tuple[()]]:
        return Identity, ()


def identity(tensor: torch.Tensor) -> Identity:
    """Return the `marks` of a tensor for an object that is saved together with them.

    Example:
        >>> import copy
        >>> ones = torch.ones(2)
        >>> known = identity(ones)
        >>> known == identity(ones), copy.deepcopy(known) == known, identity(ones.clone()) == known
        (True, False, False)
    """
    return Identity(marks(tensor))
