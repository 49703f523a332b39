"""Prompts and the texts that are hoped for, from the columns that public data sets have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, MissingInputError

_PROMPTS = (
    "prompt",
    "source",
    "dialogue",
    "article",
    "document",
    "question",
    "context",
    "instruction",
    "input",
    "text",
)
_REFERENCES = ("references", "reference", "target", "targets", "summary", "highlights", "answers", "answer", "output")

PLACE = re.compile(r"\{(\w+)\}")
"""Where a template names a column."""


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from.

    Attributes:
        prompt: the text it is given.
        references: texts that would be right, at least one.
    """

    prompt: str
    references: tuple[str, ...]


def read_prompts(rows: Iterable[Any], name: str, *, template: str, reference: str | None = None) -> list[Prompt]:
    """Read prompts and references from dicts, or from `(prompt, reference or references)`.

    Args:
        rows: the rows; a dict's columns may also lie one level deeper, in `translation`.
        name: what to call the argument in messages.
        template: the prompt, with `{column}` where a column's text goes; `{prompt}` is the one column that has the name
            of a prompt (prompt, source, dialogue, article, document, question, ...).
        reference: the column of the references. None finds the one that has the name of one (reference, target,
            summary, highlights, answer, ...; summary1, summary2, ... are several references).

    Raises:
        ConfigError: a row has no such column, or several that could be meant.
        MissingInputError: a row has no reference.

    Example:
        >>> row = {"dialogue": "A: Hi. B: Bye.", "summary1": "They meet.", "summary2": "They part."}
        >>> read_prompts([row], "data", template="{prompt} In short:")
        [Prompt(prompt='A: Hi. B: Bye. In short:', references=('They meet.', 'They part.'))]
    """
    return [_prompt(row, f"{name}[{index}]", template, reference) for index, row in enumerate(rows)]


def _prompt(row: Any, where: str, template: str, reference: str | None) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
        row = {"prompt": row[0], reference or "references": row[1]}
    if isinstance(row, str):
        raise MissingInputError(f"{where} has no reference; pass (prompt, reference) or a dict, got {row!r:.80}.")
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} must be (prompt, reference) or a dict, got {row!r:.80}.")
    nested = row.get("translation")
    columns = {**row, **nested} if isinstance(nested, Mapping) else dict(row)

    def filled(place: re.Match[str]) -> str:
        column = place.group(1)
        if column == "prompt":
            column = _only(columns, [key for key in _PROMPTS if key in columns], where, "a prompt", "template")
        text = columns.get(column)
        if not isinstance(text, str):
            raise ConfigError(
                f"{where} must have a text in the column {column!r}, which the template names, got {text!r:.80}; "
                f"it has: {', '.join(map(str, columns))}."
            )
        return text

    # One pass: a text that holds {prompt} itself stays as it is.
    prompt = PLACE.sub(filled, template)
    return Prompt(prompt, _references(columns, where, reference))


def _references(columns: Mapping[str, Any], where: str, reference: str | None) -> tuple[str, ...]:
    if reference is None:
        stems = {key: re.sub(r"_?\d+$", "", str(key)) for key in columns}
        found = [name for name in _REFERENCES if name in stems.values()]
        if not found:
            raise MissingInputError(
                f"{where} has no reference in one of the columns {', '.join(_REFERENCES)}, got {sorted(columns)}; "
                "name its column: reference='...'."
            )
        meant = _only(columns, found, where, "references", "reference")
        given = [columns[key] for key in sorted(key for key, stem in stems.items() if stem == meant)]
    elif reference not in columns:
        raise ConfigError(f"{where} has no column {reference!r}; it has: {', '.join(map(str, columns))}.")
    else:
        given = [columns[reference]]
    texts: list[Any] = []
    for one in given:
        one = one.get("text") if isinstance(one, Mapping) else one
        texts.extend([one] if isinstance(one, str) or not isinstance(one, Iterable) else one)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise MissingInputError(f"{where} must have a text as reference, or several, got {given!r:.80}.")
    return tuple(dict.fromkeys(texts))


def _only(columns: Mapping[str, Any], found: Sequence[str], where: str, what: str, setting: str) -> str:
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"{where} must have one column that can be {what}, got {', '.join(found) or 'none'} of "
        f"{', '.join(map(str, columns))}; say which by {setting}="
        + ("'{" + (found[0] if found else "column") + "}'." if setting == "template" else f"{found[0]!r}.")
    )
