"""A Transformer block in two calls of the native kernels, with the attention between them.

The first goes from the states to queries, keys and values, the second from what was attended to the block's result. A
block has them where native kernels compute each of its layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .between import Activation, Norm, RMSNorm
from .kernels import Int8Weight
from .kernels.native import Chain, NativeProduct, RunningChain, native
from .modules import Int8Linear
from .packed_modules import PackedLinear

if TYPE_CHECKING:
    from .transformer_block import Norms, TransformerBlock

# A tensor where it is registered: beside others, under its name, and what changes when it is written to or moved.
_Mark = tuple[Mapping[str, torch.Tensor | None], str, torch.Tensor | None, int, int]


@dataclass(frozen=True)
class BlockChains:
    """The two chains of a block.

    Attributes:
        before: from the states to queries, keys and values; with cosines and sines of positions to what is rotated, if
            the block rotates by halves.
        behind: from what was attended and the states to the result.
    """

    before: RunningChain
    behind: RunningChain
    _copies: tuple[weakref.ref[Any], ...]
    _marks: tuple[_Mark, ...]

    def copies(self) -> list[Any] | None:
        """Return what the chains compute by, to be held while they run; None where a layer has something new.

        The chains do not hold it: a layer that is moved or dropped gives its memory back at once.
        """
        for beside, name, tensor, version, address in self._marks:
            if beside.get(name) is not tensor:
                return None
            if tensor is not None and (tensor.data_ptr() != address or (version >= 0 and tensor._version != version)):
                return None
        copies = [copy() for copy in self._copies]
        return None if None in copies else copies


def may_chain(block: TransformerBlock) -> bool:
    """Tell by the classes of its layers whether a block may have chains."""
    linear = all(isinstance(layer, (Int8Linear, PackedLinear)) for layer in block.linear)
    return linear and isinstance(block.activation, Activation) and all(isinstance(norm, Norm) for norm in block.norms)


def block_chains(block: TransformerBlock) -> BlockChains | None:
    """Return the chains of a block that `may_chain`, or None where a layer is not computed by a native kernel now."""
    kernels, linear, norms = native(), block.linear, cast("list[Norm]", block.norms)
    if kernels is None or not all(map(_is_native, linear)) or any(norm.tensors is None for norm in norms):
        return None
    before = Chain(kernels)
    x = before.given(_sizes(block.qkv[0])[0])
    states = _norm(before, x, block.attention_norms.before)
    projected = [_product(before, states, layer) for layer in block.qkv]
    if block.rotates_halves:
        for place, norm in enumerate(block.head_norms):
            projected[place] = _norm(before, projected[place], norm)
        cosines, sines = before.given(block.head_dim), before.given(block.head_dim)
        projected[:2] = (before.rotate(vectors, cosines, sines) for vectors in projected[:2])
    behind = Chain(kernels)
    heads, x = (behind.given(size) for size in _sizes(block.o))
    attended = _sum(behind, _product(behind, heads, block.o), x, block.attention_norms)
    states = _norm(behind, attended, block.network_norms.before)
    inner = _product(behind, states, block.up if block.gate is None else block.gate)
    inner = behind.activate(cast(Activation, block.activation).gate, inner)
    if block.gate is not None:
        inner = behind.multiply(inner, _product(behind, states, block.up))
    y = _sum(behind, _product(behind, inner, block.down), attended, block.network_norms)
    copies = tuple(weakref.ref(cast("Int8Linear | PackedLinear", layer).computed_by()[0]) for layer in linear)
    marks = tuple(
        (beside, name, tensor, _version(tensor), 0 if tensor is None else tensor.data_ptr())
        for layer in (*linear, *norms)
        for beside in (layer._parameters, layer._buffers)
        for name, tensor in beside.items()
    )
    return BlockChains(before.finish(*projected), behind.finish(y), copies, marks)


def _version(tensor: torch.Tensor | None) -> int:
    # Inference tensors count no writes.
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _sizes(layer: nn.Module) -> tuple[int, int]:
    return cast(int, layer.in_features), cast(int, layer.out_features)


def _is_native(layer: nn.Module) -> bool:
    if cast("Int8Linear | PackedLinear", layer).is_tied:
        return False  # its tensors are another's, and are not watched
    computes, how, *_ = cast("Int8Linear | PackedLinear", layer).computed_by()
    if isinstance(how, torch.Tensor) and (how.dtype is not torch.float32 or not how.is_contiguous()):
        return False
    return isinstance(computes, (Int8Weight, NativeProduct))


def _product(chain: Chain, x: int, layer: nn.Module) -> int:
    computes, how, *_ = cast("Int8Linear | PackedLinear", layer).computed_by()
    return chain.product(x, cast("Int8Weight | NativeProduct", computes).step(how))


def _sum(chain: Chain, y: int, x: int, norms: Norms) -> int:
    return _norm(chain, chain.add(_norm(chain, y, norms.after), x), norms.summed)


def _norm(chain: Chain, x: int, norm: nn.Module | None) -> int:
    if not isinstance(norm, Norm):
        return x
    tensors = cast("tuple[torch.Tensor, ...]", norm.tensors)
    if isinstance(norm, RMSNorm):
        return chain.rms_norm(x, tensors[0], norm.epsilon, norm.offset)
    return chain.layer_norm(x, tensors[0], tensors[1], norm.epsilon)
