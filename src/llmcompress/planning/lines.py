"""Many actions in few lines: those that say the same of parts whose paths differ only in numbers are one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..compressor import Action

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def lines(actions: Iterable[Action]) -> list[str]:
    """Return one line for all parts of which the same is said.

    Example:
        >>> layers = [f"h.{block}.{name}" for block in range(12) for name in ("up", "down")]
        >>> lines([Action(path=path, does="int8") for path in layers] + [Action(path="head", reason="tied")])
        ['h.0..11: up, down: int8', 'head left alone: tied']
    """
    said: dict[tuple[str | None, str | None], list[str]] = {}
    for action in actions:
        said.setdefault((action.does, action.reason), []).append(action.path)
    return [_line(does, reason, paths) for (does, reason), paths in said.items()]


def _line(does: str | None, reason: str | None, paths: Sequence[str]) -> str:
    where = ", ".join(_ranges(path for path in paths if path))
    told = f"{does} ({reason})" if does and reason else does or reason or ""
    if not where:
        return told
    return f"{where}: {told}" if does else f"{where} left alone: {told}"


def _ranges(paths: Iterable[str]) -> list[str]:
    """Write paths that differ only in numbers as one, and those of the same blocks behind these."""
    alike: dict[str, list[tuple[int, ...]]] = {}
    for path in paths:
        alike.setdefault(_NUMBER.sub("*", path), []).append(tuple(map(int, _NUMBER.findall(path))))
    found: dict[str, list[str]] = {}
    for pattern, numbers in alike.items():
        runs = iter([_run(sorted(set(column))) for column in zip(*numbers, strict=True)])
        parts = [next(runs) if part == "*" else part for part in pattern.split(".")]
        last = max((place for place, part in enumerate(pattern.split(".")) if part == "*"), default=-1) + 1
        found.setdefault(".".join(parts[:last]), []).append(".".join(parts[last:]))
    return [
        ": ".join(filter(None, (block, ", ".join(filter(None, rest))))) if block else ", ".join(rest)
        for block, rest in found.items()
    ]


def _run(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if first == last:
        return str(first)
    if list(numbers) == list(range(first, last + 1)):
        return f"{first}..{last}"
    return "{" + ",".join(map(str, numbers)) + "}"
