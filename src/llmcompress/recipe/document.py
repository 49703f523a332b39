"""YAML read so that every value knows its line, and nothing in a file can do harm.

The subset is what a recipe needs: mappings, lists, and the plain values of YAML 1.2 (so that `2:4`, `no` and `1e-4`
mean what they look like); anchors, but neither tags nor merge keys. Depth and number of values are bounded.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ..errors import ConfigError

MOST_BYTES = 256 << 10
_MOST_VALUES = 20_000
_DEEPEST = 24
_LONGEST_NUMBER = 40

Scalar = str | int | float | bool | None

_WORDS: dict[str, Scalar] = {"": None, "~": None}
for _word, _value in (("null", None), ("true", True), ("false", False)):
    _WORDS.update(dict.fromkeys((_word, _word.title(), _word.upper()), _value))
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def scalar(text: str) -> Scalar:
    """Return what unquoted `text` stands for in YAML 1.2.

    Example:
        >>> [scalar(text) for text in ("2:4", "no", "1e-4", "0x10", "True", "~", "-.inf")]
        ['2:4', 'no', 0.0001, 16, True, None, -inf]
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= _LONGEST_NUMBER else float(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


@dataclass(frozen=True)
class Node:
    """A value of the file.

    Attributes:
        value: a plain value, a tuple of nodes, or a dict of them.
        line: where it stands, from 1; for an entry of a mapping, where its key stands.
        count: values in it, itself included, anchors written out.
    """

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    line: int
    count: int = 1

    def plain(self) -> Any:
        """Return it as Python's own dicts, lists and values."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, tuple) else self.value

    def at(self, location: Iterable[str | int]) -> tuple[int, str]:
        """Return line and path of the innermost value that `location` leads to.

        Parts that lead nowhere are passed over: pydantic also names the branch of a union, which no file does.

        Example:
            >>> read("a: 1\\nb:\\n- {c: 2}").at(["b", "int", 0, "c", "x"])
            (3, 'b[0].c')
        """
        node, path = self, ""
        for part in location:
            if isinstance(node.value, dict) and isinstance(part, str) and part in node.value:
                node, path = node.value[part], f"{path}.{part}" if path else str(part)
            elif isinstance(node.value, tuple) and type(part) is int and 0 <= part < len(node.value):
                node, path = node.value[part], f"{path}[{part}]"
        return node.line, path


def read(text: str) -> Node:
    """Read the one document that `text` holds.

    Raises:
        ConfigError: naming the line: it is no YAML of this subset, has a key twice, or is too deep or too big.
    """
    return _Reader(text).document()


class _Reader:
    def __init__(self, text: str) -> None:
        self._anchors: dict[str, Node | None] = {}
        try:
            self._events = yaml.SafeLoader(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise _wrong(line, f"the character U+{error.character:04X} is not allowed in YAML") from None

    def document(self) -> Node:
        self._next()
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            raise _wrong(1, "the file must hold a recipe, got nothing")
        root = self._node(self._next(), 0)
        self._next()
        behind = self._next()
        if not isinstance(behind, yaml.StreamEndEvent):
            raise _wrong(behind.start_mark.line + 1, "a file must hold one recipe, and here a second document begins")
        return root

    def _next(self) -> Any:
        try:
            return self._events.get_event()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = self._events.line if mark is None else mark.line
            raise _wrong(line + 1, f"no valid YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # PyYAML leaves some escapes to Python: "\UFFFFFFFF" is no character.
            raise _wrong(self._events.line + 1, f"no valid YAML: {error}") from None

    def _node(self, event: Any, depth: int) -> Node:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            return replace(self._anchored(event.anchor, line), line=line)
        if event.tag is not None:
            raise _wrong(line, f"a recipe must have no tags, got {event.tag!r}; leave it out")
        if depth > _DEEPEST:
            raise _wrong(line, f"values must be nested at most {_DEEPEST} deep")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(line, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(line, depth)
        else:
            node = Node(scalar(event.value) if event.implicit[0] else event.value, line)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _anchored(self, name: str | None, line: int) -> Node:
        if name is None or name not in self._anchors:
            raise _wrong(line, f"*{name} must stand behind its &{name}, and there is none before")
        node = self._anchors[name]
        if node is None:
            raise _wrong(line, f"*{name} must not stand inside of its own &{name}")
        return node

    def _sequence(self, line: int, depth: int) -> Node:
        found = []
        count = 1
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            found.append(self._node(event, depth + 1))
            count = _counted(count + found[-1].count, line)
        return Node(tuple(found), line, count)

    def _mapping(self, line: int, depth: int) -> Node:
        found: dict[str, Node] = {}
        count = 1
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            if not isinstance(key.value, str):
                raise _wrong(key.line, f"a key must be a name, got {reprlib.repr(key.plain())}; quote it if it is one")
            if key.value == "<<":
                raise _wrong(key.line, "a recipe must have no merge keys (<<); write the fields out")
            if key.value in found:
                first = found[key.value].line
                raise _wrong(key.line, f"the key {key.value!r} stands here again, first in line {first}; remove one")
            value = self._node(self._next(), depth + 1)
            found[key.value] = replace(value, line=key.line)
            count = _counted(count + 1 + value.count, line)
        return Node(found, line, count)


def _counted(count: int, line: int) -> int:
    if count > _MOST_VALUES:
        raise _wrong(line, f"a recipe must have at most {_MOST_VALUES} values, anchors written out")
    return count


def _wrong(line: int, what: str) -> ConfigError:
    return ConfigError(f"line {line}: {what}.")
