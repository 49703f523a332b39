"""Sentences cut into words, each with its tag, in the formats that data sets have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, MissingInputError

_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "labels", "pos_tags")


@dataclass(frozen=True)
class Sentence:
    """A text cut into words, each with its tag.

    Attributes:
        words: the words.
        tags: of each, a name or a class index.
    """

    words: tuple[str, ...]
    tags: tuple[str | int, ...]


def class_names(features: Any, columns: Sequence[str] = _TAGS) -> tuple[str, ...] | None:
    """Return the names of the classes in the first of `columns` that a data set has, where it declares them."""
    found = {str(name).lower(): feature for name, feature in (features or {}).items()}
    feature = next((found[name] for name in columns if name in found), None)
    # Of a column of lists, the classes are those of what the lists hold.
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(names) if names else None


def read_sentence(row: Any, where: str, names: tuple[str, ...] | None = None) -> Sentence:
    """Read a row; `where` names it in messages, and `names` are those of the classes, if they are declared.

    Raises:
        MissingInputError: it has no tags.
        ConfigError: it has no words, or not one tag a word.

    Example:
        >>> read_sentence({"tokens": ["ada", "wrote"], "ner_tags": [1, 0]}, "data[0]", ("O", "B-PER"))
        Sentence(words=('ada', 'wrote'), tags=('B-PER', 'O'))
    """
    if isinstance(row, Sentence):
        return row
    if isinstance(row, Mapping):
        words, tags = (next((row[key] for key in keys if key in row), None) for keys in (_WORDS, _TAGS))
        if words is None:
            raise ConfigError(f"{where} must have words in one of the columns {', '.join(_WORDS)}, got {sorted(row)}.")
        if tags is None:
            raise MissingInputError(f"{where} has no tags; pass them in one of the columns {', '.join(_TAGS)}.")
    elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
        words, tags = row
    else:
        raise ConfigError(f"{where} must be a dict with words and tags, or (words, tags), got {row!r:.80}.")
    if not _is_list(words, str) or not _is_list(tags, (str, int)) or len(words) != len(tags):
        raise ConfigError(f"{where} must have a list of words and one tag a word, got {words!r:.60} and {tags!r:.60}.")
    if names is not None and any(isinstance(tag, int) and not 0 <= tag < len(names) for tag in tags):
        raise ConfigError(f"{where} must have tags in [0, {len(names)}), got {tags!r:.80}.")
    return Sentence(tuple(words), tuple(names[tag] if names and isinstance(tag, int) else tag for tag in tags))


def _is_list(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(one, kinds) for one in value)
    )
