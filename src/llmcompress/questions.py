"""Questions about a text, in the layouts that SQuAD and its kin are published in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, MissingInputError


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        question: what is asked.
        context: the text that holds the answer.
        answers: every answer that counts as right; empty where the context holds none.
        start: the character of the context at which the first answer stands, where the data tells it.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    start: int | None = None


def read_questions(rows: Iterable[Any], name: str) -> list[Question]:
    """Read questions from rows, or from the nested files of SQuAD (data, paragraphs, qas), version 1.1 or 2.0.

    Args:
        rows: dicts with `question`, `context` and `answers` (a text, a list of texts, the hub's
            `{"text": [...], "answer_start": [...]}`, SQuAD's `[{"text": ...}]`), or `(question, context, answers)`.
        name: what to call the argument in messages.

    Raises:
        ConfigError: a row has no question or no context.
        MissingInputError: a row has no answers; an unanswerable question has an empty list of them.

    Example:
        >>> row = {"question": "Where?", "context": "In Rome.", "answers": {"text": ["Rome"], "answer_start": [3]}}
        >>> read_questions([row], "data")
        [Question(question='Where?', context='In Rome.', answers=('Rome',), start=3)]
    """
    return [_question(row, index, name) for index, row in enumerate(unfold(rows))]


def unfold(rows: Iterable[Any]) -> Iterator[Any]:
    """Unfold articles into paragraphs and these into questions; other rows are left as they are."""
    for row in rows:
        if not isinstance(row, Mapping):
            yield row
        elif "qas" in row:
            for question in row["qas"]:
                # What SQuAD 2.0 calls impossible lists plausible answers in another column, and none here.
                yield {"context": row.get("context"), **question}
        elif "paragraphs" in row or "data" in row:
            yield from unfold(row.get("paragraphs", row.get("data", [])))
        else:
            yield row


def _question(row: Any, index: int, name: str) -> Question:
    if isinstance(row, Question):
        return row
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 3:
        row = dict(zip(("question", "context", "answers"), row, strict=True))
    if not isinstance(row, Mapping):
        raise ConfigError(f"{name}[{index}] must be a dict or (question, context, answers), got {row!r:.80}.")
    question, context = row.get("question"), row.get("context")
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{name}[{index}] must have a text in the column 'question', got {question!r}.")
    if not isinstance(context, str) or not context.strip():
        raise ConfigError(f"{name}[{index}] must have a text in the column 'context', got {context!r}.")
    given = row.get("answers", row.get("answer"))
    if given is None:
        raise MissingInputError(
            f"{name}[{index}] has no answers; pass rows with a column 'answers', [] where the context holds no answer."
        )
    return Question(question, context, _answers(given, index, name), _start(given))


def _answers(given: Any, index: int, name: str) -> tuple[str, ...]:
    if isinstance(given, Mapping):
        given = given.get("text")
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, Iterable):
        found: list[Any] = [text.get("text") if isinstance(text, Mapping) else text for text in texts]
        if all(isinstance(text, str) for text in found):
            return tuple(dict.fromkeys(found))
    raise ConfigError(
        f"{name}[{index}] must have texts as answers, got {given!r:.80}; pass for instance ['Rome'] or "
        "{'text': ['Rome'], 'answer_start': [3]}."
    )


def _start(given: Any) -> int | None:
    """Return where the first answer starts, in the hub's or SQuAD's own layout."""
    if isinstance(given, Mapping):
        starts = given.get("answer_start") or [None]
        first = starts[0] if isinstance(starts, Sequence) else starts
    else:
        first = given[0].get("answer_start") if given and isinstance(given[0], Mapping) else None
    return first if isinstance(first, int) else None
