"""What is asked of `lc.fit`, read and checked before any work: sizes, times, a factor, the loss that is allowed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..data import longest_input
from ..errors import ConfigError
from ..evaluation.units import bytes_text, score_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation.tasks import TaskScore

_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", re.IGNORECASE)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Targets:
    """What a chain must come to.

    Attributes:
        size: bytes on disk at most, or None.
        latency: milliseconds a forward pass at most, or None.
        speedup: how many times faster than the base at least, or None.
        max_drop: how much worse the task's primary metric may be, in the metric's own unit.
        shape: rows and tokens at which latency and speedup are measured.
        budget: seconds for all of it.
    """

    size: int | None
    latency: float | None
    speedup: float | None
    max_drop: float
    shape: tuple[int, int]
    budget: float

    @property
    def timed(self) -> bool:
        """Whether a time is asked for."""
        return self.latency is not None or self.speedup is not None

    def milliseconds(self, base: float) -> float | None:
        """Return how long a pass may take where the base takes `base` milliseconds."""
        limits = [self.latency] if self.latency is not None else []
        if self.speedup is not None:
            limits.append(base / self.speedup)
        return min(limits, default=None)

    def hold(self, size: int, latency: float | None, speedup: float | None) -> bool:
        """Tell whether a model of these numbers is small and fast enough."""
        return (
            (self.size is None or size <= self.size)
            and (self.latency is None or (latency is not None and latency <= self.latency))
            and (self.speedup is None or (speedup is not None and speedup >= self.speedup))
        )

    def text(self) -> str:
        """Say what is asked for, without the loss.

        Example:
            >>> Targets(12_000_000, None, 4.0, 0.01, (1, 128), 600.0).text()
            'at most 12.0 MB on disk and at least 4x faster at 1x128 tokens'
        """
        at = f"at {self.shape[0]}x{self.shape[1]} tokens"
        parts = [f"at most {bytes_text(self.size)} on disk"] if self.size is not None else []
        if self.latency is not None:
            parts.append(f"at most {self.latency:g} ms {at}")
        if self.speedup is not None:
            parts.append(f"at least {self.speedup:g}x faster {at}")
        return " and ".join(parts)


def read_targets(
    *,
    size: str | int | None,
    latency: str | None,
    speedup: float | None,
    max_drop: float,
    shape: tuple[int, int],
    budget: str,
) -> Targets:
    """Return what is asked for as numbers.

    Raises:
        ConfigError: no target is given, or one of them is no quantity or out of range.

    Example:
        >>> asked = {"latency": None, "speedup": None, "max_drop": 0.01, "shape": (1, 128), "budget": "10 min"}
        >>> found = read_targets(size="12 MB", **asked)
        >>> found.size, found.budget
        (12000000, 600.0)
    """
    if size is None and latency is None and speedup is None:
        raise ConfigError("fit must have a target, got none; pass size='12 MB', latency='3 ms' or speedup=4.")
    if speedup is not None and not (_is_number(speedup) and speedup > 1):
        raise ConfigError(f"fit.speedup must be a number above 1, got {speedup!r}.")
    if not (_is_number(max_drop) and max_drop >= 0):
        raise ConfigError(
            f"fit.max_drop must be a number in [0, inf), in the unit of the task's metric, got {max_drop!r}."
        )
    pair = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(pair) != 2 or not all(type(count) is int and count >= 1 for count in pair):
        raise ConfigError(f"fit.shape must be (rows, tokens) such as (1, 128), got {shape!r}.")
    seconds = _quantity("latency", latency, _SECONDS, "3 ms") if latency is not None else None
    return Targets(
        size=None if size is None else _bytes(size),
        latency=None if seconds is None else 1e3 * seconds,
        speedup=None if speedup is None else float(speedup),
        max_drop=float(max_drop),
        shape=(pair[0], pair[1]),
        budget=_quantity("budget", budget, _SECONDS, "10 min"),
    )


def check_shape(shape: tuple[int, int], model: PreTrainedModel) -> None:
    """Refuse a shape that is longer than the model reads.

    Raises:
        ConfigError: it is.
    """
    most = longest_input(model)
    if most is not None and shape[1] > most:
        raise ConfigError(f"fit.shape must have at most {most} tokens for {type(model).__name__}, got {shape!r}.")


def drop_of(base: TaskScore, score: TaskScore) -> float:
    """Return how much worse a score is than the base's, in the unit of the primary metric; negative where better."""
    loss = base.value - score.value
    return loss if base.higher_is_better else -loss


def drop_text(drop: float, base: TaskScore) -> str:
    """Write a loss as people read it: in points where the metric is a share, else as a number."""
    if not base.fraction:
        return score_text(drop, fraction=False)
    points = 100 * drop
    # A limit below what one digit shows is no limit of zero.
    return f"{points:.1f} points" if points == 0 or abs(points) >= 0.05 else f"{points:.1g} points"


def _bytes(size: str | int) -> int:
    if type(size) is int and size > 0:
        return size
    return max(int(_quantity("size", size, _BYTES, "12 MB", ", or an integer of bytes")), 1)


def _quantity(name: str, given: Any, units: dict[str, Number], example: str, other: str = "") -> float:
    match = _QUANTITY.fullmatch(given) if isinstance(given, str) else None
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None or not 0 < float(match[1]) * factor < math.inf:
        raise ConfigError(
            f"fit.{name} must be a quantity such as {example!r}, in one of {', '.join(units)}{other}, got {given!r}."
        )
    return float(match[1]) * factor


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
