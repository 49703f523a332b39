"""What the losses read of a model: its outputs, and what hooks catch on the way (queries, keys, values)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from ..anatomy.find import anatomy
from ..anatomy.parts import Anatomy, Attention
from ..errors import UnsupportedModelError
from .answers import Answers
from .dropout import dropout_of
from .losses.table import Reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Vectors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Observed:
    """What one model put out for one batch.

    Attributes:
        outputs: as transformers returns them; `.logits` and its like.
        states: for each stack the hidden states (rows, tokens, width): what enters the first block, then what leaves
            each block; empty where no loss reads them.
        attention: for each stack the self-attention maps (rows, heads, queries, keys) of each block; or empty.
        relations: queries, keys and values (rows, tokens, width of all heads) by (stack, block); or empty.
        answers: of a teacher, where they are laid beside the student's logits already; then `outputs` is None.
    """

    outputs: Any
    states: Sequence[Sequence[torch.Tensor] | Mapping[int, torch.Tensor]] = ()
    attention: Sequence[Sequence[torch.Tensor]] = ()
    relations: Mapping[tuple[int, int], Vectors] = field(default_factory=dict)
    answers: Answers | None = None


Teacher: TypeAlias = Callable[[Mapping[str, torch.Tensor]], Observed]
"""Answers to a batch that was made for the student."""


class Observer:
    """Runs a model and returns what the losses read; see `observing`.

    Attributes:
        model: the model.
        asked: what it is asked for beside its inputs.
        prefixes: of the names of outputs that each stack has for itself.
    """

    def __init__(self, model: PreTrainedModel, reads: Collection[Reads]) -> None:
        self.model = model
        self._states = bool({"states", "embeddings"} & set(reads))
        self._attention = "attention" in reads
        self._caught: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self.asked: dict[str, bool] = {"use_cache": False} if model.can_generate() else {}
        self.asked |= {"output_hidden_states": True} if self._states else {}
        self.asked |= {"output_attentions": True} if self._attention else {}
        paired = bool(model.config.is_encoder_decoder)
        self.prefixes = ("encoder_", "decoder_") if paired else ("",)

    def __call__(self, inputs: Mapping[str, torch.Tensor], run: Callable[..., Any] | None = None) -> Observed:
        """Run the model, or `run`, which wraps it, over `inputs`."""
        self._caught.clear()
        outputs = (run or self.model)(**inputs, **self.asked)
        relations = {place: (by["q"], by["k"], by["v"]) for place, by in self._caught.items()}
        self._caught.clear()
        return Observed(
            outputs,
            self._each(outputs, "hidden_states") if self._states else (),
            self._each(outputs, "attentions") if self._attention else (),
            relations,
        )

    def _each(self, outputs: Any, name: str) -> list[Sequence[torch.Tensor]]:
        found: list[Any] = [getattr(outputs, f"{prefix}{name}", None) for prefix in self.prefixes]
        if any(one is None or not one or any(part is None for part in one) for one in found):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} must put out its {name.replace('_', ' ')} for such features, and does "
                f"not; use features of another kind, such as 'relations'."
            )
        return found

    def catch(self, place: tuple[int, int], attention: Attention) -> Iterator[Callable[[], None]]:
        """Have the queries, keys and values of one attention caught at each run; yields what ends it."""
        caught = self._caught
        if attention.qkv is not None:
            columns = _columns(attention)

            def split(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                parts = {role: output[..., columns[role].to(output.device)] for role in "qkv"}
                caught.setdefault(place, parts)

            yield self.model.get_submodule(attention.qkv.path).register_forward_hook(split).remove
        for role, part in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            if part is not None:

                def keep(module: nn.Module, inputs: Any, output: torch.Tensor, role: str = role) -> None:
                    caught.setdefault(place, {})[role] = output

                yield self.model.get_submodule(part.path).register_forward_hook(keep).remove


@contextmanager
def observing(
    model: PreTrainedModel,
    reads: Collection[Reads],
    blocks: Sequence[Collection[int]] = (),
    *,
    body: Anatomy | None = None,
) -> Iterator[Observer]:
    """Return an `Observer` of `model`, which is as before afterwards.

    Attention maps are only put out by eager attention, and only without dropout they are distributions: inside, the
    model computes its attention so.

    Args:
        model: the model.
        reads: what the losses read.
        blocks: for each stack, the blocks whose queries, keys and values are read.
        body: the anatomy of `model` from before its layers were wrapped, as adapters do; None where they are not.

    Raises:
        UnsupportedModelError: `relations` are read of a block that has no self-attention, or whose fused projection is
            ordered in an unknown way.

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("gpt2")
        >>> with observing(model, ["relations"], [[1]]) as observe:
        ...     queries, keys, values = observe(tiny_inputs(model)).relations[0, 1]
        >>> tuple(queries.shape)
        (2, 8, 64)
    """
    observer = Observer(model, reads)
    if body is None and {"relations", "attention"} & set(reads):
        body = anatomy(model)
    with ExitStack() as undo:
        if body is not None and "relations" in reads:
            for place, attention in _attentions(body, blocks):
                for end in observer.catch(place, attention):
                    undo.callback(end)
        if body is not None and "attention" in reads:
            undo.enter_context(_eager_attention(model, body))
        yield observer


def _attentions(body: Anatomy, blocks: Sequence[Collection[int]]) -> Iterator[tuple[tuple[int, int], Attention]]:
    for number, (stack, wanted) in enumerate(zip(body.stacks, blocks, strict=True)):
        for index in sorted(wanted):
            own = next((attention for attention in stack[index].attentions if not attention.cross), None)
            if own is None:
                raise UnsupportedModelError(
                    f"features['relations'] need a self-attention in {stack[index].path} of {body.model}, and none "
                    f"was found; name other blocks by layers=..., or use 'hidden'."
                )
            yield (number, index), own


def _columns(attention: Attention) -> dict[str, torch.Tensor]:
    """Return which outputs of a fused projection are queries, keys and values."""
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    roles = torch.tensor([0] * query + [1] * key + [2] * key)
    if attention.layout in ("per head [q|k|v]", "per group [q..|k|v]"):
        runs = [part.view(attention.kv_heads, -1) for part in roles.split([query, key, key])]
        roles = torch.cat(runs, dim=1).flatten()
    elif attention.layout != "[q|k|v]":
        raise UnsupportedModelError(
            f"features['relations'] need to know how the fused projection of {attention.path} orders queries, keys and "
            f"values, and a probe did not find it; use 'hidden'."
        )
    return {role: (roles == number).nonzero().flatten() for number, role in enumerate("qkv")}


@contextmanager
def _eager_attention(model: PreTrainedModel, body: Anatomy) -> Iterator[None]:
    before = {id(part.config): (part.config, part.config._attn_implementation) for part in _with_config(model)}
    paths = [attention.path for block in body.blocks() for attention in block.attentions]
    inside = [module for path in paths for module in model.get_submodule(path).modules()]
    try:
        model.set_attn_implementation("eager")
        # In older transformers (5.17) it does not reach T5's two halves, which have configs of their own.
        for config, _ in before.values():
            config._attn_implementation_internal = "eager"
        with dropout_of(inside, 0.0):
            yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation


def _with_config(model: PreTrainedModel) -> Iterator[Any]:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module
