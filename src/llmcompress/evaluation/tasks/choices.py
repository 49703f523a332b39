"""Questions with answers to choose from, in the formats that data sets have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from string import ascii_uppercase
from typing import Any

from ...errors import ConfigError, MissingInputError

_QUESTION = ("question", "question_stem", "query", "goal", "ctx", "prompt")
_CHOICES = ("choices", "options", "endings")
_ANSWER = ("answer", "answerKey", "label", "gold")


@dataclass(frozen=True)
class Question:
    """A question, the answers to choose from, and which is right.

    Attributes:
        question: the text.
        choices: at least two texts.
        answer: index of the right one, from 0.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


def read_question(row: Any, where: str) -> Question:
    """Read a row; `where` names it in messages.

    Raises:
        MissingInputError: it has no answer.
        ConfigError: it has no question, fewer than two choices, or an answer that is none of them.

    Example:
        >>> arc = {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
        >>> read_question(arc, "data[0]")
        Question(question='2 + 2?', choices=('3', '4'), answer=1)
    """
    if isinstance(row, Question):
        return row
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 3:
        row = dict(zip(("question", "choices", "answer"), row, strict=True))
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} must be a dict or (question, choices, answer), got {row!r:.80}.")
    question, choices, answer = (
        next((row[key] for key in keys if row.get(key) is not None), None) for keys in (_QUESTION, _CHOICES, _ANSWER)
    )
    if not isinstance(question, str):
        raise ConfigError(f"{where} must have a text in one of the columns {', '.join(_QUESTION)}, got {sorted(row)}.")
    labels: list[str] = []
    if isinstance(choices, Mapping):
        labels, choices = [str(label) for label in choices.get("label", [])], choices.get("text")
    elif choices is None and "sol1" in row:
        choices = [row["sol1"], row.get("sol2")]
    if (
        not isinstance(choices, Sequence)
        or isinstance(choices, str)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise ConfigError(
            f"{where} must have a list of at least two texts in one of the columns {', '.join(_CHOICES)}, got "
            f"{choices!r:.80}."
        )
    if answer is None or answer in ("", -1, "-1"):
        raise MissingInputError(f"{where} has no answer; pass it in one of the columns {', '.join(_ANSWER)}.")
    return Question(question, tuple(choices), _index(answer, choices, labels, where))


def letters(count: int) -> list[str]:
    """Return the names of choices: A, B, C, and so on; numbers behind Z.

    Example:
        >>> letters(3)
        ['A', 'B', 'C']
    """
    return [ascii_uppercase[index] if index < 26 else str(index + 1) for index in range(count)]


def _index(answer: Any, choices: Sequence[str], labels: Sequence[str], where: str) -> int:
    """Return the index of the right choice, which a row gives as its label, letter, index or text."""
    names = letters(len(choices))
    text = str(answer).strip()
    number = isinstance(answer, Integral) and not isinstance(answer, bool)
    if text in labels and (number or isinstance(answer, str)):
        return labels.index(text)
    if number and 0 <= answer < len(choices):
        return int(answer)
    if isinstance(answer, str):
        indices = [str(index) for index in range(len(choices))]
        readings = [("a letter", names), ("an index", indices), ("a text", choices)]
        found = {what: list(known).index(text) for what, known in readings if text in known}
        if len(set(found.values())) > 1:
            meant = " and ".join(f"choice {index} as {what}" for what, index in found.items())
            raise ConfigError(
                f"{where} must have an answer that can be read in one way, got {answer!r}, which is {meant}, counted "
                "from 0; pass the index as an integer."
            )
        if found:
            return next(iter(found.values()))
    raise ConfigError(
        f"{where} must have as answer one of its {len(choices)} choices: a letter ({names[0]} to {names[-1]}), an "
        f"index from 0 to {len(choices) - 1}{', a label (' + ', '.join(labels) + ')' if labels else ''}, or its text, "
        f"got {answer!r:.80}."
    )
