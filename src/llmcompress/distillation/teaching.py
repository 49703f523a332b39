"""From the teachers that a step names to the one that answers: checked before any work, loaded where they must run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.digest import model_digest
from ..anatomy.vocabulary import rows_needed, vocabulary_size
from ..compressor import Action, Context, Cut, still_there
from ..data import Example, longest_input
from ..errors import ConfigError, UnsupportedModelError
from .alignment import Alignment
from .batches import Row, pad_token, row_length
from .cache import TeacherCache, entry_name, rows_digest
from .cached_teacher import Collator, cached_teacher
from .checks import refuse_missing_states
from .heads import LANGUAGE_MODELS, Head
from .loss_choice import SoftLoss
from .objective import Objective
from .observation import Teacher
from .reading import OwnTexts, OwnTokens
from .sources import InMemory, Source, digest_of, empty_of, load_source, reads_alike, tokenizer_of
from .student import PlannedStudent
from .teachers import ORIGINAL, Member, Teachers, asking, fitting_cuts, is_original, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIELD = "KnowledgeDistillation.teacher"
# Texts on which a tokenizer is tried.
_CHECKED = 8
_ANSWERS_A_TEXT: frozenset[Head] = frozenset({"classification", "multi_label", "regression"})


@dataclass(frozen=True)
class PlannedTeacher:
    """One teacher before its weights are read.

    Attributes:
        source: where it comes from.
        share: of the answer, in (0, 1].
        empty: the model, without weights where it comes from a folder.
        tokenizer: its own, where it reads differently from the student's; else None.
        ids: its id of each of the student's tokens, by the student's, where an earlier step cut the student's
            vocabulary; None where no tokenizer tells.
    """

    source: Source
    share: float
    empty: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    ids: Mapping[int, int] | None = None

    @property
    def name(self) -> str:
        """What it is called in plans."""
        return "the original" if is_original(self.source) else repr(self.source)


def plan_teachers(
    teachers: Teachers,
    original: PreTrainedModel | None,
    head: Head,
    *,
    original_tokenizer: PreTrainedTokenizerBase | None,
    student_tokenizer: PreTrainedTokenizerBase | None,
    pruned_vocabulary: bool,
    soft: SoftLoss,
    features: bool,
) -> list[PlannedTeacher]:
    """Return the teachers without their weights.

    Args:
        teachers: from `read_teachers`.
        original: the untouched model; None leaves it out, as a plan without it does.
        head: the student's.
        original_tokenizer: the one at hand before the step.
        student_tokenizer: the student's.
        pruned_vocabulary: whether an earlier step cut the student's vocabulary out of the original's.
        soft: the loss on their logits.
        features: whether what is inside is compared as well.

    Raises:
        ConfigError: there is no such folder or name, or several teachers whose insides shall be compared.
        UnsupportedModelError: a tokenizer of its own where nothing can be compared.
    """
    planned = []
    for source, share in weights_of(teachers):
        if isinstance(source, InMemory) and source.model is original:
            source = ORIGINAL
        if is_original(source):
            if original is None:
                continue
            empty, tokenizer = original, original_tokenizer
        else:
            empty, tokenizer = empty_of(source, _FIELD), tokenizer_of(source)
        if tokenizer is None or student_tokenizer is None:
            planned.append(PlannedTeacher(source, share, empty))
            continue
        ids = _ids_in(tokenizer, student_tokenizer) if pruned_vocabulary else None
        same = reads_alike(tokenizer, student_tokenizer) or (ids is not None and _reads_uncut(tokenizer, ids, original))
        planned.append(PlannedTeacher(source, share, empty, None if same else tokenizer, ids))
    if len(planned) > 1 and features:
        raise ConfigError(
            f"KnowledgeDistillation.features compares with the inside of one teacher, got {len(planned)} of them; "
            f"leave features out, or name one teacher."
        )
    for teacher in planned:
        if teacher.tokenizer is not None:
            _refuse_tokenizer(teacher, head, len(planned), soft, features)
    return planned


def _ids_in(tokenizer: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> dict[int, int] | None:
    """Return a tokenizer's id of each of the student's tokens, by the student's; None where it lacks one."""
    theirs = tokenizer.get_vocab()
    tokens = sorted(student.get_vocab().items(), key=lambda entry: entry[1])
    return {own: theirs[token] for token, own in tokens} if all(token in theirs for token, _ in tokens) else None


def _reads_uncut(tokenizer: PreTrainedTokenizerBase, ids: Mapping[int, int], original: PreTrainedModel | None) -> bool:
    """Tell whether a tokenizer is the one that the original had before a step cut it."""
    whole = None if original is None else tokenizer_of(InMemory(original))
    if whole is not None:
        return reads_alike(tokenizer, whole)
    # An original that was never saved: what a cut leaves has the order that it had, and the original had all of it.
    fits = original is None or rows_needed(tokenizer) <= vocabulary_size(original)
    return fits and all(first < second for first, second in pairwise(ids.values()))


def _refuse_tokenizer(teacher: PlannedTeacher, head: Head, count: int, soft: SoftLoss, features: bool) -> None:
    if features:
        raise UnsupportedModelError(
            f"{_FIELD} must have the student's tokenizer where features compare token by token, and {teacher.name} has "
            f"another one; leave features out, or name a teacher with the student's tokenizer."
        )
    if head in _ANSWERS_A_TEXT:
        return
    if head != "causal_lm" or count > 1:
        several = " and several teachers" if count > 1 else ""
        instead = ", or that one alone with soft='uld'" if head == "causal_lm" else ""
        raise UnsupportedModelError(
            f"{_FIELD} must have the student's tokenizer for a head of {head} answers{several}, and {teacher.name} has "
            f"another one; name a teacher with the student's tokenizer{instead}."
        )
    if soft.name != "uld":
        raise UnsupportedModelError(
            f"{_FIELD} and student must share a tokenizer for soft={soft.name!r}, and {teacher.name} has another one "
            f"than the student; use soft='uld', which compares sorted probabilities."
        )


@dataclass(frozen=True)
class Lesson:
    """What a step is about to do, before any weight is read.

    Attributes:
        head: of student and teachers.
        student: what will be trained.
        teachers: what it learns from.
        alignments: for each teacher, how its answers are laid beside the student's.
    """

    head: Head
    student: PlannedStudent
    teachers: Sequence[PlannedTeacher]
    alignments: Sequence[Alignment]


@dataclass(frozen=True)
class Teaching:
    """All that is needed to ask the teachers of one step.

    Attributes:
        planned: the teachers.
        original: the untouched model, or None.
        objective: the step's loss.
        alignments: for each teacher, how its answers are laid beside the student's.
        examples: the data.
        rows: made of them, for the student.
        tokenizer: the student's.
        collator: makes batches of rows.
        device: where the teachers shall run.
        autocast: whether matrix products are in bfloat16.
        max_length: tokens a text.
    """

    planned: Sequence[PlannedTeacher]
    original: PreTrainedModel | None
    objective: Objective
    alignments: Sequence[Alignment]
    examples: Sequence[Example]
    rows: Sequence[Row]
    tokenizer: PreTrainedTokenizerBase
    collator: Collator
    device: torch.device
    autocast: bool
    max_length: int

    @contextmanager
    def live(self, *, states: bool = False) -> Iterator[Teacher]:
        """Return the teachers as one, loaded; afterwards they are as before, and what was loaded is gone.

        With `states` they tell their hidden states, whether features compare them or not.
        """
        members = []
        for teacher, alignment in zip(self.planned, self.alignments, strict=True):
            if is_original(teacher.source):
                assert self.original is not None
                model = self.original
            else:
                model = load_source(teacher.source, _FIELD)
                # A model that the caller holds stays where it is.
                model = model.to(self.device) if isinstance(teacher.source, str) else model
            reads = self._reader(teacher) if teacher.tokenizer is not None else None
            objective, pad = replace(self.objective, alignment=alignment), model.config.get_text_config().pad_token_id
            members.append(Member(model, teacher.share, objective, reads, pad))
        with asking(members, autocast=self.autocast, states=states) as teacher_of_all:
            yield teacher_of_all

    @contextmanager
    def answering(self, cache: TeacherCache | None, *, batch_size: int, context: Context) -> Iterator[Teacher | None]:
        """Return what answers during the training: nobody, the teachers, or what a cache holds of them."""
        if not self.planned:
            yield None
        elif cache is None:
            with self.live() as teacher:
                yield teacher
        else:
            refuse_missing_states(cache, self.planned)
            heat = self.objective.temperature
            temperature = heat if isinstance(heat, float) else 0.0  # a changing one needs none: see refuse_uncacheable
            about = self._about(cache, temperature)
            live = partial(self.live, states=bool(cache.hidden))
            found = cached_teacher(
                live, cache, entry_name(about), about, self.rows, self.objective,
                collator=self.collator, temperature=temperature, batch_size=batch_size, progress=context.progress,
            )  # fmt: skip
            does = f"read the teacher's answers from {cache.folder}"
            context.tell(Action(path="", does=does, reason=found.size))
            yield found

    def _reader(self, teacher: PlannedTeacher) -> OwnTexts | OwnTokens:
        tokenizer = teacher.tokenizer
        assert tokenizer is not None
        pad = pad_token(teacher.empty, tokenizer)
        if self.objective.head in _ANSWERS_A_TEXT:
            return OwnTexts(self.examples, tokenizer, row_length(teacher.empty, tokenizer, self.max_length), pad)
        _refuse_unfaithful(self.tokenizer, self.examples)
        # The same text may take more tokens than the student's.
        longest = longest_input(teacher.empty, tokenizer) or 4 * self.max_length
        return OwnTokens(self.tokenizer, tokenizer, longest, pad)

    def _about(self, cache: TeacherCache, temperature: float) -> dict[str, Any]:
        """Return all that decides what is in an entry."""
        classes = classes_of(self.objective.head, self.planned[0].empty, self.alignments[0])
        whole = cache.keeps_all(self.objective.head, classes)
        tokens = self.alignments[0].tokens
        return {
            "teachers": [[self._digest(one), one.share, self._own_rows(one)] for one in self.planned],
            "rows_sha256": rows_digest(self.objective.head, self.rows),
            "head": self.objective.head,
            "classes": classes,
            "tokens": None if tokens is None else _short(tokens.tolist()),
            "top_k": None if whole else cache.top_k,
            "temperature": None if whole else temperature,
            "hidden": list(cache.hidden),
            "dtype": cache.dtype,
            "bf16": self.autocast,
        }

    def _digest(self, teacher: PlannedTeacher) -> str:
        if is_original(teacher.source):
            assert self.original is not None
            return model_digest(self.original)
        return digest_of(teacher.source, _FIELD)

    def _own_rows(self, teacher: PlannedTeacher) -> str | None:
        """Return a hash of what a teacher reads whose tokenizer is another one than the student's."""
        reads = None if teacher.tokenizer is None else self._reader(teacher)
        return rows_digest(self.objective.head, reads.rows) if isinstance(reads, OwnTexts) else None


def _refuse_unfaithful(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
    """Refuse a tokenizer whose tokens do not tell the text that the teacher shall read."""
    for example in examples[:_CHECKED]:
        ids = tokenizer(example.text, add_special_tokens=False, verbose=False)["input_ids"]
        text: Any = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != ids:
            raise UnsupportedModelError(
                f"the student's tokenizer must decode what it encodes, for a teacher with another one, and of "
                f"{example.text[:40]!r} it makes {str(text)[:40]!r}; use a tokenizer with a decoder."
            )


def teacher_actions(
    teachers: Sequence[PlannedTeacher], alignments: Sequence[Alignment], head: Head, cache: TeacherCache | None
) -> Iterator[Action]:
    """Tell for the plan who teaches where it is not the original alone, and what a cache takes."""
    if any(not is_original(teacher.source) for teacher in teachers):
        shares = [teacher.name if len(teachers) == 1 else f"{teacher.share:.0%} {teacher.name}" for teacher in teachers]
        reads = ["its own tokenizer reads the texts" for teacher in teachers if teacher.tokenizer is not None]
        yield Action(path="", does=f"learn from {' and '.join(shares)}", reason=next(iter(reads), None))
    if cache is not None and teachers:
        refuse_missing_states(cache, teachers)
        width = int(getattr(teachers[0].empty.config.get_text_config(), "hidden_size", 0) or 0)
        size = f"{cache.bytes_per_answer(head, classes_of(head, teachers[0].empty, alignments[0]))} bytes an answer"
        if cache.hidden:
            both = " that is read or written" if head == "seq2seq_lm" else ""
            size += f" and {cache.bytes_per_token(width)} bytes a token{both}"
        yield Action(path="", does=f"keep the teacher's answers in {cache.folder}", reason=size)


def history_of(teacher: PlannedTeacher, history: Sequence[Cut]) -> list[Cut]:
    """Return what of the history tells about a teacher: of the original all of it, of others what they have as well.

    Tokens are the same in any teacher that reads as the original did. Hidden features are nobody else's, and blocks and
    heads have the same numbers only where there are as many.

    Raises:
        UnsupportedModelError: a teacher knows the student's tokens by numbers that the history does not tell.
    """
    if is_original(teacher.source):
        return list(history)
    left = [cut for cut in history if cut.axis != "hidden" and (cut.axis != "vocabulary" or _was_cut(teacher, history))]
    return fitting_cuts(teacher.empty, left)


def _was_cut(teacher: PlannedTeacher, history: Sequence[Cut]) -> bool:
    """Tell whether a teacher has the vocabulary out of which the student's was cut, padded or not."""
    kept = still_there(history, "vocabulary")
    if kept is None or teacher.tokenizer is not None:
        return False
    if teacher.ids is None:
        # No tokenizer tells; the one that was cut as well has as many tokens as are left.
        return vocabulary_size(teacher.empty) != len(kept)
    if all(kept[own] == theirs for own, theirs in teacher.ids.items()):
        return True
    if all(own == theirs for own, theirs in teacher.ids.items()):
        return False
    raise UnsupportedModelError(
        f"{_FIELD} must know the tokens by the numbers that they had before the student's vocabulary was cut, and "
        f"{teacher.name} has others; name a teacher with the original's tokenizer, or distil before the vocabulary is "
        f"cut."
    )


def classes_of(head: Head, teacher: PreTrainedModel, alignment: Alignment) -> int:
    """Return how many classes of a teacher are compared; of a reader of questions, whose classes are places, one.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> classes_of("classification", tiny_model("bert"), Alignment())
        2
        >>> classes_of("causal_lm", tiny_model("llama"), Alignment(tokens=torch.arange(9)))
        9
    """
    if head in LANGUAGE_MODELS:
        if alignment.tokens is not None:
            return len(alignment.tokens)
        return int(alignment.classes or teacher.config.get_text_config().vocab_size)
    return {"multi_label": 2, "question_answering": 1}.get(head, int(teacher.config.num_labels))


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
