"""Numbers that may change in the course of the training: a number, or `[start, end]`, linear in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from ..errors import ConfigError

Scheduled: TypeAlias = float | tuple[float, float]


def value_at(scheduled: Scheduled, progress: float) -> float:
    """Return the value when a share `progress` of the training, in [0, 1], is done.

    Example:
        >>> value_at(3.0, 0.5), value_at((4.0, 1.0), 0.0), value_at((4.0, 1.0), 0.5), value_at((4.0, 1.0), 1.0)
        (3.0, 4.0, 2.5, 1.0)
    """
    if not isinstance(scheduled, tuple):
        return scheduled
    start, end = scheduled
    return start + (end - start) * progress


def least(scheduled: Scheduled) -> float:
    """Return the smallest value that is taken in the course of the training."""
    return min(scheduled) if isinstance(scheduled, tuple) else scheduled


def most(scheduled: Scheduled) -> float:
    """Return the largest value that is taken in the course of the training."""
    return max(scheduled) if isinstance(scheduled, tuple) else scheduled


def read_scheduled(where: str, given: Any, *, low: float = 0.0, high: float = float("inf"), above: bool = False) -> Any:
    """Return `given` as a float or a pair of them.

    Args:
        where: the field, for the message.
        given: a number, or a sequence of two.
        low: smallest value allowed.
        high: largest value allowed.
        above: whether `low` itself is refused.

    Raises:
        ConfigError: it is neither, or a value is out of range.

    Example:
        >>> read_scheduled("alpha", [1, 0])
        (1.0, 0.0)
        >>> read_scheduled("alpha", [1, 2], high=1)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: alpha must be in [0, 1], or [start, end] of such numbers, got [1, 2].
    """
    pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    values = list(given) if pair else [given]
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    inside = [value for value in numbers if low <= value <= high and abs(value) < float("inf")]
    if len(inside) < len(values) or (above and low in inside):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if high == float('inf') else ']'}"
        raise ConfigError(f"{where} must be in {interval}, or [start, end] of such numbers, got {given!r}.")
    return (float(values[0]), float(values[1])) if pair else float(given)
