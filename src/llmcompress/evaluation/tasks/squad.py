"""SQuAD's questions, in the layouts they are published in, and its metrics as the official script defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, MissingInputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        question: what is asked.
        context: the text that holds the answer.
        answers: every answer that counts as right; empty where the context holds none.
    """

    question: str
    context: str
    answers: tuple[str, ...]


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
        [Question(question='Where?', context='In Rome.', answers=('Rome',))]
    """
    return [_question(row, index, name) for index, row in enumerate(_flat(rows))]


def normalize_answer(text: str) -> str:
    """Lower the case, drop punctuation and the articles a, an, the, and make every white space one blank.

    As the official script does, https://rajpurkar.github.io/SQuAD-explorer, evaluate-v2.0.py.

    Example:
        >>> normalize_answer("  The U.S.  Army, an\\tarmy")
        'us army army'
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalised prediction is one of the answers, else 0; no answers are answered by no text.

    Example:
        >>> exact_match("the Rome.", ["Milan", "Rome"]), exact_match("Rome", [])
        (1.0, 0.0)
    """
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in _real(answers)})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the words shared with the answer that shares most, in [0, 1].

    Example:
        >>> round(f1("in old Rome", ["Rome", "the old Rome"]), 4)
        0.8
    """
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in _real(answers))


def _real(answers: Sequence[str]) -> Sequence[str]:
    # The script leaves out answers of which normalising leaves nothing; where none is left, the right answer is none.
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer))


def _flat(rows: Iterable[Any]) -> Iterator[Any]:
    """Unfold articles into paragraphs and these into questions; other rows are left as they are."""
    for row in rows:
        if not isinstance(row, Mapping):
            yield row
        elif "qas" in row:
            for question in row["qas"]:
                # What SQuAD 2.0 calls impossible lists plausible answers in another column, and none here.
                yield {"context": row.get("context"), **question}
        elif "paragraphs" in row or "data" in row:
            yield from _flat(row.get("paragraphs", row.get("data", [])))
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
    return Question(question, context, _answers(given, index, name))


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
