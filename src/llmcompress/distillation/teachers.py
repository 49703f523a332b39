"""Teachers: which ones a step names, what they are before their weights are read, and their answers as one."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..anatomy.find import anatomy
from ..anatomy.kept import modes_kept
from ..compressor import Cut
from ..errors import ConfigError, UnsupportedModelError
from .answers import Answers
from .heads import Batch, Head, model_inputs
from .observation import Observed, Observer, Teacher, observing
from .reading import OwnTexts, OwnTokens
from .sources import InMemory, Source, read_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .objective import Objective

ORIGINAL = "original"
"""What the untouched model is called among several teachers."""

Teachers: TypeAlias = Source | tuple[Source, ...] | dict[Source, float] | None
_FIELD = "KnowledgeDistillation.teacher"


def read_teachers(value: Any) -> Teachers:
    """Return what the field `teacher` holds: None, one source, several, or sources with their weights.

    Raises:
        ConfigError: it is none of these, names a teacher twice, or a weight is not above 0.

    Example:
        >>> read_teachers(["big", "original"]), read_teachers({"big": 3, "original": 1})
        (('big', 'original'), {'big': 3.0, 'original': 1.0})
    """
    if value is None or value == ORIGINAL:
        return None
    if isinstance(value, Mapping) and "in_memory" not in value:
        wrong = [weight for weight in value.values() if not isinstance(weight, (int, float)) or not weight > 0]
        if not value or wrong or not all(map(math.isfinite, value.values())):
            raise ConfigError(f"{_FIELD} must give each teacher a weight above 0, got {dict(value)!r}.")
        return dict(zip(_different(value), map(float, value.values()), strict=True))
    if isinstance(value, (list, tuple)):
        return _different(value)
    return read_source(value, _FIELD)


def _different(values: Collection[Any]) -> tuple[Source, ...]:
    found = tuple(read_source(entry, _FIELD) for entry in values)
    # 'big', 'big/' and './big' are one folder.
    paths = {os.path.normpath(source) if isinstance(source, str) else source for source in found}
    if not found or len(paths) < len(found):
        raise ConfigError(
            f"{_FIELD} must name one teacher or several different ones, got {list(values)!r}; name each once, with a "
            f"weight if it shall count more."
        )
    return found


def weights_of(teachers: Teachers) -> list[tuple[Source, float]]:
    """Return each teacher with its share of the answer; the shares add up to 1.

    Example:
        >>> weights_of(None), weights_of({"big": 3.0, "original": 1.0})
        ([('original', 1.0)], [('big', 0.75), ('original', 0.25)])
    """
    if teachers is None:
        return [(ORIGINAL, 1.0)]
    if isinstance(teachers, dict):
        return [(name, weight / sum(teachers.values())) for name, weight in teachers.items()]
    several = teachers if isinstance(teachers, tuple) else (teachers,)
    return [(source, 1 / len(several)) for source in several]


def is_original(source: Source) -> bool:
    """Tell whether a source is the model as the caller passed it."""
    return not isinstance(source, InMemory) and source == ORIGINAL


def fitting_cuts(teacher: PreTrainedModel, history: Sequence[Cut]) -> list[Cut]:
    """Return the history without cuts of blocks and heads where a teacher other than the original has other numbers.

    Args:
        teacher: may have no weights.
        history: what earlier steps cut.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> cuts = [Cut("model.layers", "layers", (0, 3), 4), Cut("model.embed_tokens", "vocabulary", (0, 2), 128)]
        >>> [cut.axis for cut in fitting_cuts(tiny_model("llama"), cuts)]
        ['vocabulary']
    """
    if not any(cut.axis in ("layers", *_HEADS) for cut in history):
        return list(history)
    try:
        stacks = anatomy(teacher).stacks
    except UnsupportedModelError:
        return [cut for cut in history if cut.axis not in ("layers", *_HEADS)]
    other: set[str] = set()
    for blocks in stacks:
        path, left = blocks[0].path.rpartition(".")[0], len(blocks)
        heads = next((cut for cut in history if cut.axis in _HEADS and _is_in(cut.path, path)), None)
        own = next((part for block in blocks for part in block.attentions if not part.cross), None)
        if heads is not None and (own is None or heads.of != _HEADS[heads.axis](own)):
            other.add(path)
        for cut in history:
            if cut.axis == "layers" and cut.path == path:
                if cut.of != left:
                    other.add(path)
                left = len(cut.kept)
    return [
        cut
        for cut in history
        if cut.axis not in ("layers", *_HEADS) or not any(_is_in(cut.path, path) for path in other)
    ]


def _is_in(path: str, stack: str) -> bool:
    return f"{path}.".startswith(f"{stack}.")


# What the first cut of each kind counts in an attention that is whole.
_HEADS = {"heads": lambda attention: attention.kv_heads, "query_heads": lambda attention: attention.heads}


@dataclass(frozen=True)
class Member:
    """One teacher, loaded.

    Attributes:
        model: where it shall run.
        share: of the answer, in (0, 1].
        objective: how its answers are laid beside the student's.
        reads: how it reads a batch, where its tokenizer is another one than the student's.
        pad: the token by which it knows padding, where it may be another one than the student's.
    """

    model: PreTrainedModel
    share: float
    objective: Objective
    reads: OwnTexts | OwnTokens | None = None
    pad: int | None = None


class LiveTeacher:
    """Teachers that run over each batch; called with it, they answer as one.

    The probabilities of several are averaged (of a regression the numbers), each weighed by its share, and the
    logarithm of that is the answer; the temperature is applied to it as to any logits.

    Args:
        members: at least one.
        observers: of each.
    """

    def __init__(self, members: Sequence[Member], observers: Sequence[Observer]) -> None:
        self._members, self._observers = members, observers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Observed:
        """Return what the teachers answer to a batch of the student's."""
        if len(self._members) == 1 and self._members[0].reads is None:
            return self._ask(0, batch)
        answers = [self._laid(index, batch) for index in range(len(self._members))]
        if len(answers) == 1:
            return Observed(outputs=None, answers=answers[0])
        shares = [member.share for member in self._members]
        head = self._members[0].objective.head
        return Observed(outputs=None, answers=Answers(averaged(head, [one.logits for one in answers], shares)))

    def _ask(self, index: int, batch: Batch) -> Observed:
        member = self._members[index]
        if member.model.training:
            # A teacher is asked in eval mode: this one is the model that Trainer has put into training mode.
            raise ConfigError(
                f"{_FIELD} must stay as it is, got the {type(member.model).__name__} that is trained in place; leave "
                f"inplace=True out, or pass a copy of it."
            )
        inputs = member.objective.for_teacher(model_inputs(batch)) if member.reads is None else member.reads(batch)
        if member.reads is None and member.pad is not None:
            # The classifiers of decoders find the end of a text by this token, and RoBERTa counts positions by it.
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, member.pad)
        return self._observers[index]({name: value.to(member.model.device) for name, value in inputs.items()})

    def _laid(self, index: int, batch: Batch) -> Answers:
        member, seen = self._members[index], self._ask(index, batch)
        answers = member.objective.answers(seen, batch)
        return answers if member.reads is None else member.reads.lay(answers.logits, batch)


def averaged(head: Head, logits: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Return the logarithm of the weighted mean of probabilities; for a regression the weighted mean.

    Example:
        >>> sure, unsure = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> averaged("classification", [sure, unsure], [0.5, 0.5]).exp()
        tensor([[0.7500, 0.2500]])
    """
    device = logits[0].device
    if head == "regression":
        return torch.stack([share * one.to(device) for one, share in zip(logits, shares, strict=True)]).sum(0)
    logs = [one.to(device).float().log_softmax(-1) + math.log(share) for one, share in zip(logits, shares, strict=True)]
    return torch.stack(logs).logsumexp(0)


@contextmanager
def asking(members: Sequence[Member], *, autocast: bool, states: bool = False) -> Iterator[Teacher]:
    """Return the teachers as one, in eval mode; afterwards they are as before.

    Args:
        members: at least one.
        autocast: whether matrix products are in bfloat16, as those of the student.
        states: whether hidden states are wanted that no feature compares.
    """
    with ExitStack() as undo:
        observers = []
        for member in members:
            undo.enter_context(modes_kept(member.model))
            member.model.eval()
            blocks = [{theirs for _, theirs in pairs} for pairs in member.objective.alignment.pairs]
            reads = {*member.objective.reads, *(("states",) if states else ())}
            observers.append(undo.enter_context(observing(member.model, reads, blocks)))
        teacher = LiveTeacher(members, observers)
        device = members[0].model.device.type

        def ask(batch: Batch) -> Observed:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return teacher(batch)

        yield ask
