"""How chains of a search are trained: from the original's answers, kept once, on as much data as there is time for."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..anatomy import anatomy
from ..data import Example, encode
from ..distillation.cache import TeacherCache
from ..distillation.distillation import KnowledgeDistillation
from ..distillation.heads import LANGUAGE_MODELS, Head, head_of
from ..distillation.labels import check_labels
from ..distillation.random_spans import RandomSpans
from ..errors import MissingInputError, UnsupportedModelError
from ..evaluation.units import count_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import Task

BATCH = 16
"""Rows a step."""

# So many rounds of the texts are worth it at most; of the texts with their spans, where there are any.
_MOST_EPOCHS, _MOST_WITH_SPANS = 12, 3
# Of each text, where there is time for so many; more have shown no gain.
_MOST_SPANS = 5
# Tokens of a span, as a share of its text's, about.
_SPAN = 0.6
_LENGTH = 128
# Of a model of 384 features; wider ones take smaller steps.
_RATE, _WIDTH = 5e-4, 384
# Hidden states of the teacher take so many bytes at most, and of what is free on the disk so large a share.
_MOST_BYTES, _MOST_FREE = 2**32, 0.25
_SAMPLED = 200
# Share of the budget in which the teacher must have answered all rows.
_TEACHER_SHARE = 0.15
_UNCACHED: frozenset[Head] = frozenset({"masked_lm"})
# A run of words has an answer of its own there, which the teacher gives.
_OF_WHOLE_TEXTS: frozenset[Head] = frozenset({"classification", "multi_label", "regression"})


def find_recovery(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    most_rows: int,
    notes: list[str],
) -> tuple[KnowledgeDistillation | None, int]:
    """Return the training, without its steps, and how many steps are worth it; None where the model has no such head.

    Args:
        model: the base, which is the teacher.
        task: tells how long texts are.
        examples: what will be trained on.
        tokenizer: the base's.
        folder: where the teacher's answers are kept.
        most_rows: that the teacher can answer in its share of the time; beyond the examples, spans of them.
        notes: is told why nothing is trained.
    """
    try:
        head = head_of(model)
    except UnsupportedModelError as error:
        notes.append(f"nothing is trained: {error}")
        return None, 0
    length = length_of(task)
    spans = min(most_rows // len(examples) - 1, _MOST_SPANS) if head in _OF_WHOLE_TEXTS else 0
    tokens = tokens_each(model, task, examples, tokenizer) * len(examples)
    rows = tokens / length if head == "causal_lm" else len(examples)
    body = anatomy(model)
    layers = len(body.stacks[0])
    size, room = tokens * body.hidden * 2 * layers, min(_MOST_BYTES, _MOST_FREE * shutil.disk_usage(folder).free)
    inside = size <= room and len(body.stacks) == 1 and head not in _UNCACHED
    if inside and spans:
        spans = min(spans, int((room / size - 1) / _SPAN))
    cache = None
    if head not in _UNCACHED:
        cache = TeacherCache(folder=folder, hidden=tuple(range(1, layers + 1)) if inside else ())
    labelled = _labelled(head, examples)
    if not labelled and (bare := sum(one.label is None for one in examples)) < len(examples):
        notes.append(f"labels are not trained on: {count_text(bare)} of {count_text(len(examples))} examples have none")
    training = KnowledgeDistillation(
        steps=1,
        alpha=0.5 if labelled and not spans else 1.0,
        features={"hidden": 1.0} if inside else {},
        augment=RandomSpans(copies=spans) if spans else None,
        dropout=0.0 if spans else None,
        cache=cache,
        learning_rate=_RATE * min(1.0, _WIDTH / body.hidden),
        batch_size=BATCH,
        max_length=length,
    )
    epochs = max(_MOST_EPOCHS, _MOST_WITH_SPANS * (1 + spans))
    return training, max(round(epochs * rows / BATCH), 1)


def length_of(task: Task) -> int:
    """Return how many tokens of a text are trained on: as many as the task reads."""
    return int(getattr(task, "max_length", None) or getattr(task, "window", None) or _LENGTH)


def tokens_each(
    model: PreTrainedModel, task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Return how many tokens an example has on average, as it is trained on; running text is not cut, but joined."""
    drawn = random.Random(0).sample(list(examples), min(len(examples), _SAMPLED))
    length = None if _head(model) == "causal_lm" else length_of(task)
    return sum(len(row["input_ids"]) for row in encode(drawn, tokenizer, max_length=length)) / len(drawn)


def check_rows(model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows that cannot be trained on: all of them, before any work, and by their numbers in the data.

    Raises:
        MissingInputError: a row has no text, or no target text where the model writes one.
        ConfigError: a label is none of the model's.
    """
    head = _head(model)
    if head is None:
        return  # nothing is trained
    bare = next((index for index, one in enumerate(examples) if not one.pair), None)
    if head == "seq2seq_lm" and bare is not None:
        raise MissingInputError(
            f"fit needs target texts to train {type(model).__name__}, and data[{bare}] has none; pass rows with 'text' "
            f"and 'text_pair'."
        )
    for index, one in enumerate(examples):
        # Running text is joined; elsewhere special tokens may be enough.
        blank = head != "causal_lm" and one.words is None and not one.text.strip()
        if blank and not encode([one], tokenizer)[0]["input_ids"]:
            raise MissingInputError(
                f"fit needs a text of at least one token in each row, and that of data[{index}] has none; fill it in, "
                f"or remove the row."
            )
    if _labelled(head, examples):
        check_labels(head, model, examples)


def answered_rows(seconds_each: float, budget: float) -> int:
    """Return how many rows the teacher can answer in its share of the budget.

    Example:
        >>> answered_rows(1.0, 200.0)
        30
    """
    return max(int(_TEACHER_SHARE * budget / max(seconds_each, 1e-9)), BATCH)


def affordable(examples: Sequence[Example], most: int, seed: int, notes: list[str]) -> list[Example]:
    """Return as many examples as the teacher can answer, drawn at random.

    Example:
        >>> notes = []
        >>> len(affordable([Example("a")] * 100, 30, 0, notes)), notes
        (30, ['trained on 30 of 100 examples: the teacher answers no more in this budget'])
    """
    if most >= len(examples):
        return list(examples)
    notes.append(
        f"trained on {count_text(most)} of {count_text(len(examples))} examples: the teacher answers no more in this "
        f"budget"
    )
    chosen = sorted(random.Random(seed).sample(range(len(examples)), most))
    return [examples[index] for index in chosen]


def _head(model: PreTrainedModel) -> Head | None:
    try:
        return head_of(model)
    except UnsupportedModelError:
        return None


def _labelled(head: Head, examples: Sequence[Example]) -> bool:
    return head in LANGUAGE_MODELS or all(one.label is not None for one in examples)
