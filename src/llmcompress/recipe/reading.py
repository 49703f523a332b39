"""Recipe files: read into steps, each fault told with its file, line and key."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..compressor import Compressor
from ..errors import CompressionError, ConfigError, did_you_mean
from ..registry import compressors
from .document import MOST_BYTES, Node, read
from .renames import VERSION, renamed

_CHAIN = "pipeline"
_CHAIN_KEYS = ("name", "steps", "recover")
_FILE_KEYS = ("version", "description")


def read_recipe(path: str | Path) -> Compressor:
    """Read a file into the step it describes: a `Pipeline`, or any other strategy.

    Raises:
        CompressionError: a branch of it, naming file, line and key: no YAML, a key that stands twice, an unknown name
            or field (with the nearest one), a value out of range, a file that a newer release wrote.
    """
    path = Path(path)
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else None
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {str(path)!r}.") from None
    except OSError as error:
        raise ConfigError(f"the recipe {str(path)!r} cannot be read: {error.strerror}.") from None
    if content is None:
        raise ConfigError(
            f"{path} must be a recipe of at most {MOST_BYTES >> 10} KiB, got {path.stat().st_size} bytes."
        )
    return parse_recipe(content, str(path))


def parse_recipe(content: bytes, source: str) -> Compressor:
    """Read the bytes of a recipe file; `source` is what messages call it.

    Raises:
        CompressionError: as `read_recipe`.

    Example:
        >>> print(parse_recipe(b"steps:\\n- name: gptq\\n  group_size: 32", "recipe.yaml"))
        GPTQ(group_size=32)
        >>> parse_recipe(b"steps:\\n- name: gptq\\n  bitz: 4", "recipe.yaml")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: recipe.yaml, line 3 (steps[0].bitz): GPTQ has no field 'bitz'; did you ...
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}, line {line}: a recipe must be UTF-8, got the byte {content[error.start]:#04x}."
        ) from None
    try:
        root = read(text)
    except ConfigError as error:
        raise ConfigError(f"{source}, {error}") from None
    return _Recipe(root, source).read()


class _Recipe:
    """One file on its way to its steps; knows where each thing stands."""

    def __init__(self, root: Node, source: str) -> None:
        self._root = root
        self._source = source

    def read(self) -> Compressor:
        root = self._root
        with self._faults_at(()):
            if not isinstance(root.value, dict):
                raise ConfigError("a recipe must be a mapping with the key 'steps', got no mapping.")
            self._check_version(root.value.get("version"))
        value = {key: node for key, node in root.value.items() if key not in _FILE_KEYS}
        return self._step(Node(value, root.line), ())

    def _check_version(self, node: Node | None) -> None:
        if node is None:
            return
        if type(node.value) is not int or node.value < 1:
            raise ConfigError(f"version must be {VERSION}, got {node.plain()!r}.", location=("version",))
        if node.value > VERSION:
            raise ConfigError(
                f"version must be at most {VERSION}, got {node.value}; it was written for a newer llmcompress: upgrade "
                f"it with pip.",
                location=("version",),
            )

    def _step(self, node: Node, at: tuple[str | int, ...]) -> Compressor:
        fields = node.value
        if isinstance(fields, str):
            fields = {"name": node}
        with self._faults_at(at):
            if not isinstance(fields, dict):
                raise ConfigError("a step must be a name or a mapping with the key 'name', got neither.")
            chain = "steps" in fields and "name" not in fields
            name = _CHAIN if chain else _name_of(fields)
        if name == _CHAIN:
            return self._chain(fields, at)
        with self._faults_at(at):
            try:
                strategy = compressors.get(name)
            except CompressionError as error:
                raise _told(error, str(error), ("name",)) from None
            given, replaced = renamed(name, {key: one.plain() for key, one in fields.items() if key != "name"})
            step: Compressor = strategy(**given)
        for old, now in replaced:
            line, path = self._root.at((*at, old))
            warnings.warn(
                f"{self._source}, line {line} ({path}): {old!r} of {name} is written as `{now}` now; it was read so.",
                FutureWarning,
                stacklevel=2,
            )
        return step

    def _chain(self, fields: Mapping[str, Node], at: tuple[str | int, ...]) -> Compressor:
        with self._faults_at(at):
            for key in fields:
                if key not in _CHAIN_KEYS:
                    known = (*_CHAIN_KEYS, *(_FILE_KEYS if not at else ()))
                    hint = did_you_mean(key, known) or "."
                    raise ConfigError(f"a recipe has no key {key!r}{hint} Keys: {', '.join(known)}.", location=(key,))
            steps = fields.get("steps")
            if steps is None or not isinstance(steps.value, tuple) or not steps.value:
                raise ConfigError("steps must be a list of at least one step.", location=("steps",))
        built = [self._step(step, (*at, "steps", index)) for index, step in enumerate(steps.value)]
        recover = fields.get("recover")
        recovery = None if recover is None or recover.value is None else self._step(recover, (*at, "recover"))
        with self._faults_at(at):
            try:
                chain: Any = compressors.create({"name": _CHAIN, "steps": built, "recover": recovery})
            except ConfigError as error:
                raise _told(error, str(error), ("recover",)) from None
            if not at:
                self._check_order(chain)
        built_chain: Compressor = chain
        return built_chain

    @staticmethod
    def _check_order(chain: Any) -> None:
        try:
            chain.flatten()
        except CompressionError as error:
            raise _told(error, str(error), error.location or ("steps",)) from None

    @contextmanager
    def _faults_at(self, at: tuple[str | int, ...]) -> Iterator[None]:
        """Tell faults of the step at `at` with file, line and key."""
        try:
            yield
        except CompressionError as error:
            line, path = self._root.at((*at, *error.location))
            where = f"{self._source}, line {line}" + (f" ({path})" if path else "")
            raise _told(error, f"{where}: {error}") from None


def _name_of(fields: Mapping[str, Node]) -> str:
    node = fields.get("name")
    if node is not None and isinstance(node.value, str):
        return node.value
    if node is not None:
        raise ConfigError(f"name must be that of a strategy, got {node.plain()!r}.", location=("name",))
    first = next(iter(fields), None)
    if len(fields) == 1 and first in compressors:
        raise ConfigError(f"a step must have the key 'name'; write `name: {first}`, and its fields below.")
    for wanted in ("name", "steps"):
        near = next((key for key in fields if did_you_mean(key, [wanted])), None)
        if near is not None:
            raise ConfigError(
                f"a step must have the key 'name', got {near!r}; did you mean {wanted!r}?", location=(near,)
            )
    raise ConfigError(f"a step must have the key 'name', got {', '.join(map(repr, fields)) or 'no key'}.")


def _told(error: CompressionError, message: str, location: tuple[str | int, ...] = ()) -> CompressionError:
    """Return the error with another message, in its own branch of the tree if that is one of the library's."""
    branch = type(error) if type(error).__module__ == CompressionError.__module__ else ConfigError
    found = branch(message)
    found.location = location
    return found
