"""Blocks of a quantized model run past the modules between their layers, wherever that computes the same.

PyTorch calls it a fast path where its own `TransformerEncoderLayer` does so. Which blocks have one is found by trying:
the first time that a block is called in some way, both ways are run on random states, and the fast one is taken from
then on if the results are equal to the last bit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..anatomy.stacks import find_stacks
from .modules import QuantizedModule
from .transformer_block import Given, TransformerBlock, find_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers hands to blocks without need: it is in the rotary embeddings and in the cache already.
_IDLE = ("position_ids", "use_cache", "cache_position")
# Enough rows for the tiles of AMX.
_ROWS, _TOKENS = 2, 9

_CLASSES: dict[type[nn.Module], type[FastPath]] = {}

# Where a module is: the modules beside it, its name among them, and the module itself.
_Place = tuple[Mapping[str, Any], str, nn.Module]


@dataclass
class Fast:
    """What is known of the fast path of a block.

    Attributes:
        candidates: what the block may be.
        names: of the arguments behind the states.
        places: of all modules within the block.
        proven: by the kind of what is given, what the block was found to be, or None.
    """

    candidates: tuple[TransformerBlock, ...]
    names: tuple[str, ...]
    places: tuple[_Place, ...]
    proven: dict[tuple[Any, ...], TransformerBlock | None] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether nobody listens to a module of the block, or put another in its place, or trains it."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        for beside, name, module in self.places:
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                return False
            if "forward" in module.__dict__ or beside.get(name) is not module:
                return False
        return True


class FastPath(nn.Module):
    """The part of a block's class that looks for a shorter way before it goes the way of the model's own code."""

    plain: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the block does."""
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and not torch.is_grad_enabled():
            y = self._fast(args, kwargs)
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def _fast(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the result, or None where the fast path does not serve."""
        fast = cast(Fast, self.__dict__["_fast_path"])
        x: Any = args[0] if args else None
        if type(x) is not torch.Tensor or not x.is_cpu or x.dim() != 3 or x.numel() == 0:
            return None
        if self.training or torch.is_autocast_enabled("cpu") or not fast.is_plain:
            return None
        given = _given({**dict(zip(fast.names, args[1:], strict=False)), **kwargs} if args[1:] else kwargs)
        if given is None or not fast.candidates[0].uses_sdpa:
            return None
        kind = x.dtype, *given.kind
        if kind not in fast.proven:
            fast.proven[kind] = self._proven(x, given, fast)
        block = fast.proven[kind]
        return None if block is None else block.run(x, given)

    def _proven(self, x: torch.Tensor, given: Given, fast: Fast) -> TransformerBlock | None:
        source = torch.Generator(x.device).manual_seed(0)
        states = [torch.randn(_ROWS, _TOKENS, x.shape[2], generator=source, device=x.device).to(x.dtype)]
        if given.cache is not None:
            states.append(torch.randn(_ROWS, 1, x.shape[2], generator=source, device=x.device).to(x.dtype))
        expected = self._tried(None, states, given)
        for block in fast.candidates:
            if block.rotates_halves and given.rotary is None:
                continue
            found = None if expected is None else self._tried(block, states, given)
            if found is not None and all(map(torch.equal, found, expected or [])):
                return block
        return None

    def _tried(
        self, block: TransformerBlock | None, states: list[torch.Tensor], given: Given
    ) -> list[torch.Tensor] | None:
        """Return what `block`, or the model's own code, makes of states that follow one another."""
        from transformers import DynamicCache

        names, results = cast(Fast, self.__dict__["_fast_path"]).names, []
        cache, source, seen = None if given.cache is None else DynamicCache(), torch.Generator().manual_seed(1), 0
        for x in states:
            seen += x.shape[1]
            like = _like(given, x, seen, cache, source)
            try:
                y = super().forward(x, **_arguments(like, names)) if block is None else block.run(x, like)
            except Exception:
                # Whatever a model's own code raises: what cannot be tried is none of those here.
                return None
            if type(y) is not torch.Tensor:
                return None
            results.append(y)
        return results

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class of the model's own code: that of this object has no name in any module."""
        _, (_, *rest), *state = cast(Any, super().__reduce_ex__(max(protocol, 2)))
        return _new, (type(self).plain, *rest), *state


def use_fast_path(model: PreTrainedModel) -> None:
    """Give a fast path to the blocks of `model` that hold quantized layers and seem to be Transformer blocks.

    A block stays the object that it is, and an instance of its class.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> model = lc.DynamicQuantization().compress(tiny_model("bert"), lc.Context())
        >>> block = model.bert.encoder.layer[0]
        >>> isinstance(block, FastPath), type(block).__name__
        (True, 'BertLayer')
    """
    for stack in find_stacks(model):
        for index, block in enumerate(stack.blocks):
            if isinstance(block, FastPath) or not any(
                isinstance(module, QuantizedModule) for module in block.modules()
            ):
                continue
            candidates = tuple(find_parts(model, stack.block_path(index)))
            if candidates:
                names = tuple(inspect.signature(type(block).forward).parameters)[2:]
                block.__dict__["_fast_path"] = Fast(candidates, names, _places(block))
                block.__class__ = _fast_class(type(block))


def leave_fast_path(model: nn.Module) -> None:
    """Give the blocks of `model` their own classes back: the reverse of `use_fast_path`."""
    for module in model.modules():
        if isinstance(module, FastPath):
            del module.__dict__["_fast_path"]
            module.__class__ = type(module).plain


def _fast_class(plain: type[nn.Module]) -> type[FastPath]:
    """Return the class of those blocks of a class that have a fast path: it is called as theirs."""
    known = _CLASSES.get(plain)
    if known is not None:
        return known

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FastPath.forward(self, *args, **kwargs)

    same = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = type(plain.__name__, (FastPath, plain), {**same, "plain": plain, "forward": forward})
    return _CLASSES.setdefault(plain, made)


def _new(plain: type[nn.Module], *rest: Any) -> FastPath:
    cls = _fast_class(plain)
    return cls.__new__(cls, *rest)


def _places(block: nn.Module) -> tuple[_Place, ...]:
    return tuple(
        (parent._modules, name, child)
        for parent in block.modules()
        for name, child in parent._modules.items()
        if child is not None
    )


def _given(named: Mapping[str, Any]) -> Given | None:
    """Sort the arguments of a block; None where there is one among them that a fast path knows nothing of."""
    given = Given()
    for name, value in named.items():
        if value is None or value is False or name in _IDLE:
            continue
        if name == "attention_mask":
            given.mask = value
        elif name == "position_embeddings":
            given.rotary = value
        elif name == "past_key_values":
            given.cache = value
        else:
            return None
    position = named.get("cache_position")
    if given.cache is not None and position is not None:
        cos, sin = given.rotary or (None, None)
        given.cache_options = ({"sin": sin, "cos": cos, "cache_position": position},)
    return given


def _like(given: Given, x: torch.Tensor, seen: int, cache: Any, source: torch.Generator) -> Given:
    """Return random arguments of the kind of `given` for states `x`, the last of `seen`."""
    rows, tokens = x.shape[:2]
    mask, rotary = None, None
    if given.mask is not None:
        mask = torch.rand(rows, 1, tokens, seen, generator=source, device=x.device) > 0.5
        mask[..., -1] = True
        if given.mask.dtype is not torch.bool:
            mask = (
                torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min).to(given.mask.dtype)
            )
    if given.rotary is not None:
        angles = torch.randn(rows, tokens, given.rotary[0].shape[-1] // 2, generator=source, device=x.device).repeat(
            1, 1, 2
        )
        rotary = angles.cos().to(given.rotary[0].dtype), angles.sin().to(given.rotary[0].dtype)
    return Given(mask, rotary, cache, ({},) if given.cache_options else ())


def _arguments(given: Given, names: tuple[str, ...]) -> dict[str, Any]:
    told = {"attention_mask": given.mask, "position_embeddings": given.rotary, "past_key_values": given.cache}
    return {name: value for name, value in told.items() if value is not None or name in names}
