"""What a comparison must show to pass: claims proven by intervals, and conditions for a command line's exit status."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ClaimError, ConfigError, did_you_mean
from .evaluation.units import ratio_text, score_text

if TYPE_CHECKING:
    from .comparison import Comparison, Entry
    from .evaluation.latency import Speedup
    from .evaluation.statistics import PairedTest

_CONDITION = re.compile(r"\s*([a-zA-Z][\w,-]*)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """A bound on one number of a candidate, such as `accuracy_drop > 0.01`.

    The numbers are: `METRIC_drop` (base minus candidate, or the other way round where lower is better, in the metric's
    own unit), `METRIC_ratio` (candidate over base), `METRIC` itself, `speedup` (at the first shape), `smaller` (on
    disk), `agreement` and `kl` (fidelity to the base, first task).

    Example:
        >>> Condition.parse("accuracy_drop>0.01")
        Condition(name='accuracy_drop', sign='>', bound=0.01)
    """

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read `NAME SIGN NUMBER`, the sign one of `<`, `<=`, `>`, `>=`.

        Raises:
            ConfigError: it is of another form.
        """
        match = _CONDITION.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            return cls(match[1], match[2], float(match[3]))
        except ValueError:
            raise ConfigError(
                f"a condition must be NAME SIGN NUMBER, such as 'accuracy_drop>0.01' or 'speedup<1.5', got {text!r}."
            ) from None

    def holds(self, comparison: Comparison, entry: Entry) -> bool:
        """Whether it holds for a candidate.

        What is no number (the correlation of a model that answers the same to everything) keeps no bound: of it every
        condition holds, so that a dead model does not pass.

        Raises:
            ConfigError: the comparison has no such number; the message lists those it has.
        """
        value = self.value(comparison, entry)
        return math.isnan(value) or _OPERATORS[self.sign](value, self.bound)

    def told(self, comparison: Comparison, entry: Entry) -> str:
        """Say that it holds for a candidate, and by what number."""
        value = self.value(comparison, entry)
        if math.isnan(value):
            return f"{entry.name}: {self} cannot be ruled out, it is no number (nan)"
        return f"{entry.name}: {self} holds, it is {value:.4g}"

    def value(self, comparison: Comparison, entry: Entry) -> float:
        """Return the number that the condition is about.

        Raises:
            ConfigError: the comparison has no such number.
        """
        numbers = _numbers(comparison, entry)
        if self.name not in numbers:
            hint = did_you_mean(self.name, numbers) or "."
            raise ConfigError(
                f"a condition must be about a number of the comparison, got {self.name!r}{hint} "
                f"There is: {', '.join(numbers)}."
            )
        return numbers[self.name]

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound:g}"


def check_non_inferior(entry: Entry, test: PairedTest, *, margin: float, lower_is_better: bool) -> None:
    """Refuse a candidate whose loss of a metric, by its 95 % interval, may exceed `margin`.

    Args:
        entry: the candidate.
        test: its metric against the base's.
        margin: the largest loss that is accepted: 0.01 is one point of a metric in [0, 1], or a perplexity 1 % higher.
        lower_is_better: direction of the metric.

    Raises:
        ConfigError: `margin` is not a number above 0.
        ClaimError: there is no interval, or it reaches beyond the margin; the message has the numbers.
    """
    if not _is_positive(margin):
        raise ConfigError(
            f"margin must be a number above 0, got {margin!r}: no sample can prove that nothing at all was lost; 0.01 "
            "is one point, or 1 % of a perplexity."
        )
    unit = 1.0 if test.scale == "ratio" else 0.0
    _, _, loss = test.losses(lower_is_better=lower_is_better)
    if loss is not None and loss <= margin:
        return
    seen = _change_text(test.change, test)
    within = (
        f"with the 95 % interval [{_change_text(test.low, test)}, {_change_text(test.high, test)}]"
        if test.low is not None
        else "and no 95 % interval"
    )
    if not math.isfinite(test.change):
        remedy = " The two cannot be compared by it."
    elif test.detectable is None:
        remedy = f" A sample of {test.units} such as this cannot tell what was lost; use more."
    elif abs(test.detectable - unit) > margin:
        remedy = (
            f" The sample of {test.units} can only see changes from {_change_text(test.detectable, test)} on; use more."
        )
    else:
        remedy = ""
    raise ClaimError(
        f"{entry.name}: {test.metric} must not be worse by more than {margin:g}, got {seen} {within}.{remedy}"
    )


def check_speedup(entry: Entry, found: Speedup, factor: float) -> None:
    """Refuse a candidate that is not proven `factor` times as fast: the lower end of the interval counts.

    Raises:
        ConfigError: `factor` is not a number above 0.
        ClaimError: it is not; the message has the numbers.
    """
    _check_factor(factor)
    if found.low < factor:
        raise ClaimError(
            f"{entry.name}: must be at least {factor}x as fast as the base at {found.batch_size}x{found.tokens} "
            f"tokens, got {found.ratio:.2f}x with the 95 % interval [{found.low:.2f}, {found.high:.2f}]."
        )


def check_smaller(entry: Entry, factor: float) -> None:
    """Refuse a candidate whose files are not `factor` times smaller than the base's.

    Raises:
        ConfigError: `factor` is not a number above 0.
        ClaimError: they are not.
    """
    assert entry.change is not None
    _check_factor(factor)
    if entry.change.smaller_on_disk < factor:
        raise ClaimError(
            f"{entry.name}: must be at least {factor}x smaller on disk than the base, got "
            f"{ratio_text(entry.change.smaller_on_disk)}."
        )


def _is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check_factor(factor: float) -> None:
    if not _is_positive(factor):
        raise ConfigError(f"factor must be a number above 0, got {factor!r}; 1.5 is one and a half times the base's.")


def chosen(comparison: Comparison, candidate: str | None) -> Iterable[Entry]:
    """Return the candidate of this name, or all of them.

    Raises:
        ConfigError: there is none of this name, or it is the base, or there are no candidates.
    """
    if candidate is None:
        if not comparison.candidates:
            raise ConfigError("the comparison must have a candidate besides its base; pass two models to compare().")
        return comparison.candidates
    entry = comparison[candidate]
    if entry.change is None:
        raise ConfigError(f"candidate must be compared with the base, got {candidate!r}, which is the base.")
    return (entry,)


def _numbers(comparison: Comparison, entry: Entry) -> dict[str, float]:
    assert entry.change is not None
    found: dict[str, float] = {}
    for ours, theirs in zip(comparison.base.evaluation.scores, entry.evaluation.scores, strict=True):
        for name in (name for name in ours.metrics if name in theirs.metrics):
            base, value = ours.metrics[name], theirs.metrics[name]
            drop = value - base if ours.kinds[name].lower_is_better else base - value
            found.setdefault(name, value)
            found.setdefault(f"{name}_drop", drop)
            if base:
                found.setdefault(f"{name}_ratio", value / base)
    found["smaller"] = entry.change.smaller_on_disk
    if entry.change.faster:
        found["speedup"] = entry.change.faster[0].ratio
    fidelity = entry.change.fidelity[0] if entry.change.fidelity else None
    if fidelity is not None and fidelity.top1_agreement is not None and fidelity.kl_mean is not None:
        found["agreement"], found["kl"] = fidelity.top1_agreement, fidelity.kl_mean
    return found


def _change_text(value: float | None, test: PairedTest) -> str:
    if value is None:
        return "unknown"
    if test.scale == "ratio":
        return f"x{value:.4g}"
    return (
        f"{100 * value:+.2f} points"
        if test.scale == "points"
        else f"{'+' * (value > 0)}{score_text(value, fraction=False)}"
    )
