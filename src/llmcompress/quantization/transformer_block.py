"""A block of a Transformer as the few layers that compute something: found by their names and sizes, run in turn.

A model's own code calls a dozen modules a block, each through `nn.Module.__call__`, and looks at its options between
them. Where a product takes 20 microseconds, that is the larger half of the time.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy.find import attention_role, head_dim_of, is_gate, is_norm
from .between import Activation, is_function
from .block_chains import BlockChains, block_chains, may_chain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "sdpa"

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Given:
    """What a block is given beside the states.

    Attributes:
        mask: as the model made it for torch's attention, or None.
        rotary: cosines and sines of the positions, or None.
        cache: of keys and values, or None.
        cache_options: what else older transformers pass on to the cache.
    """

    mask: torch.Tensor | None = None
    rotary: Rotary | None = None
    cache: Any = None
    cache_options: tuple[Any, ...] = ()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides which way a block goes."""
        rotary = None if self.rotary is None else (self.rotary[0].dtype, self.rotary[0].shape[-1])
        return None if self.mask is None else self.mask.dtype, rotary, self.cache is not None


class Norms(NamedTuple):
    """The norms of an attention or of a feed-forward network, each where there is one.

    Attributes:
        before: of what it is given.
        after: of what it gives, before the residual is added.
        summed: of the sum with the residual.
    """

    before: nn.Module | None = None
    after: nn.Module | None = None
    summed: nn.Module | None = None


@dataclass
class TransformerBlock:
    """The layers of a block, in the order in which they compute.

    Attributes:
        attention: the module that attends, with the settings that transformers' attention functions read there.
        qkv: the projections of queries, keys and values, or the one that is all of them in this order.
        o: that of what was attended.
        up, down: those of the feed-forward network.
        gate: the third one there, or None.
        activation: what stands behind `gate`, or else `up`.
        attention_norms: those around the attention.
        network_norms: those around the feed-forward network.
        head_norms: of queries and keys, or nothing.
        head_dim: width of a head.
        rotates_halves: whether positions turn the halves of a head against one another, which a kernel does; else the
            model's own function is called.
    """

    attention: nn.Module
    qkv: tuple[nn.Module, ...]
    o: nn.Module
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    activation: nn.Module
    attention_norms: Norms
    network_norms: Norms
    head_norms: tuple[nn.Module, ...]
    head_dim: int
    rotates_halves: bool
    _chains: BlockChains | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chains": None}

    @property
    def uses_sdpa(self) -> bool:
        """Whether the model is set to attend by `torch.nn.functional.scaled_dot_product_attention`."""
        config = self.attention.__dict__.get("config")
        # What the property reads, which takes as long as a small product.
        told = getattr(config, "__dict__", {}).get("_attn_implementation_internal")
        return (told or getattr(config, "_attn_implementation", None)) == _ATTENTION

    @cached_property
    def _is_native(self) -> bool:
        return may_chain(self)

    @property
    def linear(self) -> list[nn.Module]:
        """All layers that multiply."""
        return [layer for layer in (*self.qkv, self.o, self.up, self.gate, self.down) if layer is not None]

    @property
    def norms(self) -> list[nn.Module]:
        """All norms."""
        return [norm for norm in (*self.attention_norms, *self.network_norms, *self.head_norms) if norm is not None]

    def run(self, x: torch.Tensor, given: Given) -> torch.Tensor:
        """Map states `x` (batch, tokens, hidden) to new ones; without dropout, and without a backward pass."""
        if self._is_native and x.dtype is torch.float32 and x.is_contiguous():
            chains = self._chains
            held = None if chains is None else chains.copies()
            if held is None:
                chains = self._chains = block_chains(self)
                held = None if chains is None else chains.copies()
            if chains is not None and held is not None:
                projected = chains.before(x, *(self._rotary_of(x, given) if self.rotates_halves else ()))
                y = self._attend(*self._heads(projected, given, ready=self.rotates_halves), given)
                return chains.behind(y, x)[0]
        return self._run_layers(x, given)

    def _run_layers(self, x: torch.Tensor, given: Given) -> torch.Tensor:
        norms = self.attention_norms
        states = _normed(norms.before, x)
        y = self._attend(*self._heads([layer.forward(states) for layer in self.qkv], given), given)
        attended = _normed(norms.summed, _normed(norms.after, self.o.forward(y)).add_(x))
        norms = self.network_norms
        states = _normed(norms.before, attended)
        if self.gate is None:
            inner = self.activation.forward(self.up.forward(states))
        else:
            inner = self.activation.forward(self.gate.forward(states)).mul_(self.up.forward(states))
        return _normed(norms.summed, _normed(norms.after, self.down.forward(inner)).add_(attended))

    def _heads(
        self, projected: Sequence[torch.Tensor], given: Given, *, ready: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each as (batch, heads, tokens, head_dim); normalized and rotated, unless they are `ready`."""
        if len(projected) == 1:
            asked = cast(int, self.o.in_features)
            rest = (projected[0].shape[-1] - asked) // 2
            projected = projected[0].split((asked, rest, rest), dim=-1)
        q, k, v = projected
        heads = (*q.shape[:2], -1, self.head_dim)
        q, k = q.view(heads), k.view(heads)
        if self.head_norms and not ready:
            q, k = self.head_norms[0].forward(q), self.head_norms[1].forward(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if given.rotary is not None and not ready:
            q, k = self._rotate(q, k, *given.rotary)
        return q, k, v.view(heads).transpose(1, 2)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: Given) -> torch.Tensor:
        attention = self.attention
        if given.cache is not None:
            k, v = given.cache.update(k, v, attention.layer_idx, *given.cache_options)
        scaling, mask = attention.__dict__.get("scaling"), given.mask
        if k.shape[1] != q.shape[1]:
            y = _attend_in_groups()(attention, q, k, v, mask, dropout=0.0, scaling=scaling)[0]
        else:
            causal = mask is None and q.shape[2] > 1 and getattr(attention, "is_causal", True)
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, is_causal=causal).transpose(1, 2)
        return cast(torch.Tensor, y.reshape(*y.shape[:2], -1))

    def _rotary_of(self, x: torch.Tensor, given: Given) -> Rotary:
        # One row for all of a batch, where all have the same positions.
        cos, sin = (part.expand(*x.shape[:2], -1).contiguous() for part in given.rotary or ())
        return cos, sin

    @property
    def _rotate(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        # Families differ in it; each has its own beside its attention, under this name.
        return cast(Any, sys.modules[type(self.attention).__module__]).apply_rotary_pos_emb


@cache
def _attend_in_groups() -> Callable[..., tuple[torch.Tensor, None]]:
    """Return transformers' own way, which knows which of torch's kernels take fewer keys than queries."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return cast(Any, sdpa_attention_forward)


def find_parts(model: PreTrainedModel, path: str) -> Iterator[TransformerBlock]:
    """Yield what the block at `path` may be; nothing where there is a layer in it that no `TransformerBlock` has.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> next(find_parts(tiny_model("bert"), "bert.encoder.layer.0")).up
        Linear(in_features=64, out_features=128, bias=True)
    """
    block = model.get_submodule(path)
    owners = {name: module for name, module in block.named_modules() if module._parameters or module._buffers}
    linear = {name: module for name, module in owners.items() if _is_linear(module)}
    norms = {name: module for name, module in owners.items() if is_norm(module)}
    roles: dict[str, str] = {}
    others = []
    for name in linear:
        role = attention_role(name)
        if role in roles:
            return
        if role is None:
            others.append(name)
        else:
            roles[role] = name
    if len(linear) + len(norms) != len(owners) or set(roles) not in ({"q", "k", "v"}, {"qkv"}):
        return
    asks = [roles[role] for role in ("q", "k", "v", "qkv") if role in roles]
    attention = asks[0].rpartition(".")[0]
    functions = {module for module in block.modules() if isinstance(module, Activation) or is_function(module)}
    if len(others) not in (3, 4) or len(functions) != 1 or not attention:
        return
    activation = functions.pop()
    o = max(others, key=lambda name: _shared(name, asks[0]))
    inner = [name for name in others if name != o]
    gates = [name for name in inner if is_gate(name)] if len(inner) == 3 else []
    left = [name for name in inner if name not in gates]
    own = [name for name in norms if name.startswith(f"{attention}.")]
    outside = [module for name, module in norms.items() if name not in own]
    if len(left) != 2 or linear[left[0]].out_features != linear[left[1]].in_features or len(own) not in (0, 2):
        return
    # A fused projection gives no rows of queries and of keys alone, which the kernel rotates.
    ways = (True, False) if len(asks) == 3 else (False,)
    for (first, second), rotates_halves in itertools.product(_placed(outside), ways):
        yield TransformerBlock(
            attention=block.get_submodule(attention),
            qkv=tuple(linear[name] for name in asks),
            o=linear[o],
            up=linear[left[0]],
            down=linear[left[1]],
            gate=linear[gates[0]] if gates else None,
            activation=activation,
            attention_norms=first,
            network_norms=second,
            head_norms=tuple(norms[name] for name in sorted(own, reverse=True)),
            head_dim=head_dim_of(model, f"{path}.{attention}", cast(int, linear[o].in_features)),
            rotates_halves=rotates_halves,
        )


def _placed(norms: Sequence[nn.Module]) -> Iterator[tuple[Norms, Norms]]:
    """Yield where the norms of a block, in the order of its modules, may stand."""
    if len(norms) == 2:
        for place in Norms._fields:
            yield Norms(**{place: norms[0]}), Norms(**{place: norms[1]})
    elif len(norms) == 4:
        yield Norms(before=norms[0], after=norms[1]), Norms(before=norms[2], after=norms[3])


def _normed(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else cast(torch.Tensor, norm.forward(x))


def _is_linear(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _shared(one: str, other: str) -> int:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), 0)
