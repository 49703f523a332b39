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

from .between import Activation, LayerNorm, Norm
from .kernels import Int8Weight
from .kernels.native import Chain, NativeProduct, RunningChain, native
from .modules import Int8Linear
from .packed_modules import PackedLinear

if TYPE_CHECKING:
    from .transformer_block import TransformerBlock

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
            if beside[name] is not tensor:
                return None
            if tensor is not None and (tensor.data_ptr() != address or (version >= 0 and tensor._version != version)):
                return None
        copies = [copy() for copy in self._copies]
        return None if None in copies else copies


def block_chains(block: TransformerBlock) -> BlockChains | None:
    """Return the chains of a block, or None where a layer of it is not computed by a native kernel."""
    kernels = native()
    linear = [layer for layer in (block.q, block.k, block.v, block.o, block.up, block.gate, block.down) if layer]
    if kernels is None or not isinstance(block.activation, Activation) or not all(map(_is_native, linear)):
        return None
    if not all(isinstance(norm, Norm) and norm.tensors is not None for norm in block.norms):
        return None
    (first, second), heads = cast("tuple[Norm, Norm]", block.norms), cast("tuple[Norm, ...]", block.head_norms)
    gate = block.activation.gate
    before = Chain(kernels)
    x = before.given(_sizes(block.q)[0])
    states = _norm(before, x, first) if block.norm_first else x
    asked, keys, values = (_product(before, states, layer) for layer in (block.q, block.k, block.v))
    if block.rotates_halves:
        if not all(isinstance(norm, Norm) and norm.tensors is not None for norm in block.head_norms):
            return None
        if block.head_norms:
            asked, keys = (_norm(before, *pair) for pair in zip((asked, keys), heads, strict=True))
        cosines, sines = before.given(block.head_dim), before.given(block.head_dim)
        asked, keys = (before.rotate(vectors, cosines, sines) for vectors in (asked, keys))
    running = before.finish(asked, keys, values)
    behind = Chain(kernels)
    inputs, outputs = _sizes(block.o)
    attended, x = behind.given(inputs), behind.given(outputs)
    attended = behind.add(_product(behind, attended, block.o), x)
    if not block.norm_first:
        attended = _norm(behind, attended, first)
    states = _norm(behind, attended, second) if block.norm_first else attended
    if block.gate is None:
        inner = behind.activate(gate, _product(behind, states, block.up))
    else:
        inner = behind.activate(gate, _product(behind, states, block.gate))
        inner = behind.multiply(inner, _product(behind, states, block.up))
    y = behind.add(_product(behind, inner, block.down), attended)
    if not block.norm_first:
        y = _norm(behind, y, second)
    copies = tuple(weakref.ref(cast("Int8Linear | PackedLinear", layer).computed_by()[0]) for layer in linear)
    marks = tuple(
        (beside, name, tensor, _version(tensor), 0 if tensor is None else tensor.data_ptr())
        for layer in (*linear, first, second, *heads)
        for beside in (layer._parameters, layer._buffers)
        for name, tensor in beside.items()
    )
    return BlockChains(running, behind.finish(y), copies, marks)


def _version(tensor: torch.Tensor | None) -> int:
    # Inference tensors count no writes.
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _sizes(layer: nn.Module) -> tuple[int, int]:
    return cast(int, layer.in_features), cast(int, layer.out_features)


def _is_native(layer: nn.Module) -> bool:
    if not isinstance(layer, (Int8Linear, PackedLinear)):
        return False
    computes, how, *_ = layer.computed_by()
    if isinstance(how, torch.Tensor) and (how.dtype is not torch.float32 or not how.is_contiguous()):
        return False
    return isinstance(computes, (Int8Weight, NativeProduct))


def _product(chain: Chain, x: int, layer: nn.Module) -> int:
    computes, how, *_ = cast("Int8Linear | PackedLinear", layer).computed_by()
    return chain.product(x, cast("Int8Weight | NativeProduct", computes).step(how))


def _norm(chain: Chain, x: int, norm: Norm) -> int:
    tensors = cast("tuple[torch.Tensor, ...]", norm.tensors)
    if isinstance(norm, LayerNorm):
        return chain.layer_norm(x, tensors[0], tensors[1], norm.epsilon)
    return chain.rms_norm(x, tensors[0], norm.epsilon)
