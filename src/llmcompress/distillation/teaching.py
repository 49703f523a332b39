"""From the teachers that a step names to the one that answers: checked before any work, loaded where they must run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.digest import model_digest
from ..compressor import Action, Context, Cut
from ..data import Example, longest_input
from ..errors import ConfigError, UnsupportedModelError
from .alignment import Alignment
from .batches import Row
from .cache import TeacherCache, entry_name, rows_digest
from .cached_teacher import Collator, cached_teacher
from .heads import LANGUAGE_MODELS, Head
from .loss_choice import SoftLoss
from .objective import Objective
from .observation import Teacher
from .reading import OwnTexts, OwnTokens
from .sources import Source, digest_of, empty_of, load_source, reads_alike, tokenizer_of
from .student import PlannedStudent
from .teachers import Member, Teachers, asking, is_original, weights_of

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
    """

    source: Source
    share: float
    empty: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None

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
        if is_original(source):
            if original is None:
                continue
            empty, tokenizer = original, original_tokenizer
        else:
            empty, tokenizer = empty_of(source, _FIELD), tokenizer_of(source)
        # A cut vocabulary has the original's tokens under other numbers, which the history tells.
        same = tokenizer is None or student_tokenizer is None or reads_alike(tokenizer, student_tokenizer)
        planned.append(PlannedTeacher(source, share, empty, None if same or pruned_vocabulary else tokenizer))
    if len(planned) > 1 and features:
        raise ConfigError(
            f"KnowledgeDistillation.features compares with the inside of one teacher, got {len(planned)} of them; "
            f"leave features out, or name one teacher."
        )
    for teacher in planned:
        if teacher.tokenizer is not None:
            _refuse_tokenizer(teacher, head, len(planned), soft, features)
    return planned


def _refuse_tokenizer(teacher: PlannedTeacher, head: Head, count: int, soft: SoftLoss, features: bool) -> None:
    if features:
        raise UnsupportedModelError(
            f"{_FIELD} must have the student's tokenizer where features compare token by token, and {teacher.name} has "
            f"another one; leave features out."
        )
    if head in _ANSWERS_A_TEXT:
        return
    if head != "causal_lm" or count > 1:
        raise UnsupportedModelError(
            f"{_FIELD} must have the student's tokenizer for a head of {head} answers"
            f"{' and several teachers' if count > 1 else ''}, and {teacher.name} has another one."
        )
    if soft.name != "uld":
        raise UnsupportedModelError(
            f"teacher and student must share a tokenizer for soft={soft.name!r}, and {teacher.name} has another one "
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
    def live(self) -> Iterator[Teacher]:
        """Return the teachers as one, loaded; afterwards they are as before, and what was loaded is gone."""
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
            members.append(Member(model, teacher.share, replace(self.objective, alignment=alignment), reads))
        with asking(members, autocast=self.autocast) as teacher_of_all:
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
            heat = self.objective.temperature
            temperature = heat if isinstance(heat, float) else 0.0  # a changing one needs none: see refuse_uncacheable
            about = self._about(cache, temperature)
            found = cached_teacher(
                self.live, cache, entry_name(about), about, self.rows, self.objective,
                collator=self.collator, temperature=temperature, batch_size=batch_size, progress=context.progress,
            )  # fmt: skip
            size = f"{found.nbytes / 1e6:.3g} MB, {found.nbytes / max(found.positions, 1):.4g} bytes an answer"
            context.tell(Action(path="", does=f"read the teacher's answers from {cache.folder}", reason=size))
            yield found

    def _reader(self, teacher: PlannedTeacher) -> OwnTexts | OwnTokens:
        tokenizer = teacher.tokenizer
        assert tokenizer is not None
        longest = longest_input(teacher.empty, tokenizer)
        length = min(self.max_length, longest) if longest is not None else self.max_length
        if self.objective.head in _ANSWERS_A_TEXT:
            return OwnTexts(self.examples, tokenizer, length)
        _refuse_unfaithful(self.tokenizer, self.examples)
        # The same text may take more tokens than the student's.
        return OwnTokens(self.tokenizer, tokenizer, longest or 4 * self.max_length)

    def _about(self, cache: TeacherCache, temperature: float) -> dict[str, Any]:
        """Return all that decides what is in an entry."""
        classes = classes_of(self.objective.head, self.planned[0].empty, self.alignments[0])
        whole = cache.keeps_all(self.objective.head, classes)
        tokens = self.alignments[0].tokens
        return {
            "teachers": [[self._digest(one), one.share, _vocabulary(one.tokenizer)] for one in self.planned],
            "rows_sha256": rows_digest(self.objective.head, self.rows),
            "texts": len(self.examples) if any(one.tokenizer for one in self.planned) else None,
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
        width = int(getattr(teachers[0].empty.config.get_text_config(), "hidden_size", 0) or 0)
        taken = cache.bytes_per_token(head, classes_of(head, teachers[0].empty, alignments[0]), width)
        yield Action(
            path="", does=f"keep the teacher's answers in {cache.folder}", reason=f"{taken:.4g} bytes an answer"
        )


def history_of(teacher: PlannedTeacher, history: Sequence[Cut]) -> list[Cut]:
    """Return what of the history tells about a teacher: of the original all of it, of others what fits their sizes."""
    if is_original(teacher.source):
        return list(history)
    config = teacher.empty.config.get_text_config()
    sizes = {"hidden": getattr(config, "hidden_size", None), "vocabulary": config.vocab_size}
    first = {axis: next((cut.of for cut in history if cut.axis == axis), None) for axis in sizes}
    return [cut for cut in history if cut.axis not in sizes or first[cut.axis] == sizes[cut.axis]]


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


def _vocabulary(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    return None if tokenizer is None else _short(sorted(tokenizer.get_vocab().items()))


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
