"""Which parts of the teacher the student has, too: layers, tokens, hidden features and heads, by what steps cut."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..anatomy.find import anatomy
from ..compressor import Action, Cut, still_there
from .layer_map import Pairs
from .loss_choice import reads_of
from .losses.table import Reads
from .schedule import Scheduled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Alignment:
    """How what the teacher puts out is laid beside what the student puts out.

    Attributes:
        pairs: for each stack, which student block is compared with which teacher block; from `layer_map`.
        classes: compare only the first so many classes: the tokens that are real where vocabularies are padded to
            different sizes. None compares all.
        tokens: the teacher's id of each of the student's tokens, where an earlier step cut the student's vocabulary;
            None where both have the same.
        width: the teacher's number of each of the student's hidden features, where an earlier step cut the residual
            stream; None where both have the same.
        heads: the teacher's number of each of the student's query heads, by (stack, teacher block), where some went.
    """

    pairs: Sequence[Pairs] = field(default_factory=tuple)
    classes: int | None = None
    tokens: torch.Tensor | None = None
    width: torch.Tensor | None = None
    heads: Mapping[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def state(self, state: torch.Tensor) -> torch.Tensor:
        """Return those of a teacher's hidden features that the student has, too."""
        return state if self.width is None else state[..., self.width.to(state.device)]

    def attention(self, maps: torch.Tensor, stack: int, block: int) -> torch.Tensor:
        """Return those of a teacher block's attention maps (rows, heads, queries, keys) that the student has, too."""
        kept = self.heads.get((stack, block))
        return maps if kept is None else maps[:, kept.to(maps.device)]


def align(
    teacher: PreTrainedModel,
    history: Sequence[Cut],
    *,
    pairs: Sequence[Pairs],
    classes: int | None,
    reads: Collection[Reads],
) -> Alignment:
    """Return how a teacher is laid beside its student, by what earlier steps cut.

    Args:
        teacher: the teacher.
        history: what was cut of the teacher to make the student.
        pairs: blocks that are compared; from `layer_map`.
        classes: number of tokens to compare where vocabularies are padded; None compares all.
        reads: what of the inside is compared.
    """
    tokens, width = (still_there(history, axis) for axis in ("vocabulary", "hidden"))
    return Alignment(
        pairs=pairs,
        classes=classes,
        tokens=None if tokens is None else torch.tensor(tokens),
        width=None if width is None else torch.tensor(width),
        heads=heads_left(teacher, history) if "attention" in reads else {},
    )


def feature_actions(
    features: Mapping[str, Scheduled],
    pairs: Sequence[Pairs],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    history: Sequence[Cut],
) -> Iterator[Action]:
    """Tell for the plan which blocks are compared, where projections are learned, and what attention maps ask for."""
    read = reads_of(features)
    for own in pairs if read else ():
        compared = ", ".join(f"{mine} with {theirs}" for mine, theirs in own)
        yield Action(path="", does=f"compare {' and '.join(features)} of blocks {compared}")
    ours, theirs = (getattr(model.config.get_text_config(), "hidden_size", None) for model in (student, teacher))
    if read & {"states", "embeddings"} and ours != theirs and still_there(history, "hidden") is None:
        yield Action(path="", does=f"learn projections {ours} -> {theirs}", reason="thrown away afterwards")
    if "attention" in read:
        yield Action(path="", does="train with eager attention and without its dropout", reason="for its maps")


def heads_left(teacher: PreTrainedModel, history: Sequence[Cut]) -> dict[tuple[int, int], torch.Tensor]:
    """Return which query heads of a teacher's self-attention earlier steps left, by (stack, block), where some went.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> cuts = [Cut("model.layers", "layers", (1,), 2), Cut("model.layers.0.self_attn", "heads", (1,), 2)]
        >>> heads_left(tiny_model("llama"), cuts)  # two query heads to each key head
        {(0, 1): tensor([2, 3])}
    """
    body = anatomy(teacher)
    left: dict[tuple[int, int], list[int]] = {}
    for number, blocks in enumerate(body.stacks):
        path = blocks[0].path.rpartition(".")[0]
        there = list(range(len(blocks)))
        for cut in history:
            if cut.axis == "layers" and cut.path == path:
                there = [there[index] for index in cut.kept]
            elif cut.axis in ("heads", "query_heads") and f"{cut.path}.".startswith(f"{path}."):
                index = cut.path[len(path) + 1 :].partition(".")[0]
                # A cut of the whole stack is one of heads that all its blocks share.
                for block in [there[int(index)]] if index else there:
                    own = next((part for part in blocks[block].attentions if not part.cross), None)
                    if own is None or (index and own.path.partition(f"{path}.{block}")[2] != _below(cut.path, path)):
                        continue
                    heads = left.get((number, block), list(range(own.heads)))
                    size = len(heads) // cut.of
                    left[number, block] = [heads[head * size + i] for head in cut.kept for i in range(size)]
    return {place: torch.tensor(heads) for place, heads in left.items()}


def _below(path: str, stack: str) -> str:
    """Return what of a path comes behind the block's number: `.self_attn` of `layers.3.self_attn`."""
    _, dot, rest = path[len(stack) + 1 :].partition(".")
    return dot + rest
