"""How sure a score is, and how two models differ on the same examples."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import scipy  # its parts are imported when they are first used, for more than a second
from pydantic import BaseModel, Field

from .resampling import CONFIDENCE, RESAMPLES, Floats, Metrics, Resampled, resample, unseen_changes, unseen_share

Scale = Literal["points", "difference", "ratio"]
"""How two values of a metric are compared: shares of [0, 1] in points, other numbers by difference, or by ratio."""

_Z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2)
_POWER = 0.8
# Of the ratios that a float holds.
_LARGEST_LOG = math.log(sys.float_info.max)
# A sample that finds no change smaller than a thousandfold ratio finds none that anyone asks for.
_LARGEST_DETECTABLE_LOG = math.log(1000)


class Flips(BaseModel, frozen=True, extra="forbid"):
    """What changed, example by example, from the base to a candidate.

    Two models can have one accuracy and yet disagree on many examples; the flips show it ("Accuracy is Not All You
    Need", arXiv 2407.09141).
    """

    examples: int = Field(description="examples that both models answered")
    agreement: float = Field(description="share of equal predictions, in [0, 1]")
    right_to_wrong: int = Field(description="examples that the base had right and the candidate has wrong")
    wrong_to_right: int = Field(description="the other way round")
    p_value: float = Field(description="exact McNemar test, two-sided: how likely so uneven flips are by chance alone")


class PairedTest(BaseModel, frozen=True, extra="forbid"):
    """One metric of a candidate against the base's, on the same examples."""

    metric: str
    scale: Scale = Field(description="what change, low, high and detectable are: candidate - base, or candidate / base")
    change: float = Field(description="the change that was seen")
    low: float | None = Field(description="lower end of its 95 % interval; None where the sample cannot tell one")
    high: float | None = Field(description="upper end of its 95 % interval")
    p_value: float = Field(description="how likely so large a change is by chance alone, two-sided")
    p_holm: float = Field(description="the same, corrected for the number of candidates (Holm 1979)")
    method: Literal["exact McNemar", "paired bootstrap", "rule of three"] = Field(
        description="what p-value and interval are from; the rule of three bounds what no example of the sample showed"
    )
    detectable: float | None = Field(
        description="smallest true change that a sample like this finds at the 5 % level in 80 of 100 cases"
    )
    units: int = Field(description="independent examples (or groups of them) the test rests on")

    def losses(self, *, lower_is_better: bool) -> tuple[float, float | None, float | None]:
        """Return by how much the candidate is worse: what was seen, and the ends of its 95 % interval, low and high.

        A ratio counts relatively: 0.01 is a perplexity that is 1 % higher. Below 0 the candidate is better.
        """
        unit, sign = (1.0 if self.scale == "ratio" else 0.0), (1 if lower_is_better else -1)
        ends = (self.low, self.high) if lower_is_better else (self.high, self.low)
        # No loss is 0, not -0.
        low, high = (None if end is None else (end - unit) * sign + 0.0 for end in ends)
        return (self.change - unit) * sign + 0.0, low, high


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927).

    Example:
        >>> low, high = wilson(90, 100)
        >>> round(low, 4), round(high, 4)
        (0.8256, 0.9448)
    """
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(lost: int, won: int) -> float:
    """Return the p-value of the exact two-sided McNemar test: `lost` and `won` are equally likely under the null.

    Example:
        >>> round(mcnemar(8, 1), 4)
        0.0391
    """
    return float(scipy.stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def flips(base: Sequence[bool], candidate: Sequence[bool], same: Sequence[bool]) -> Flips:
    """Compare two models on the same examples.

    Args:
        base: whether the base has each example right.
        candidate: whether the candidate has.
        same: whether their predictions are equal.

    Example:
        >>> found = flips([True, True, True, False], [True, False, False, True], [True, False, False, False])
        >>> found.right_to_wrong, found.wrong_to_right, found.agreement
        (2, 1, 0.25)
    """
    lost = sum(b and not c for b, c in zip(base, candidate, strict=True))
    won = sum(c and not b for b, c in zip(base, candidate, strict=True))
    return Flips(
        examples=len(same),
        agreement=sum(same) / len(same),
        right_to_wrong=lost,
        wrong_to_right=won,
        p_value=mcnemar(lost, won),
    )


def paired_proportions(metric: str, base: Sequence[bool], candidate: Sequence[bool]) -> PairedTest:
    """Test the difference of two proportions on the same examples.

    The p-value is McNemar's exact one; the interval is the adjusted Wald interval for paired data of Bonett and Price
    2012 (Journal of Educational and Behavioral Statistics 37, 479-488), which stays honest with few or no flips.

    Example:
        >>> found = paired_proportions("accuracy", [True] * 9 + [False], [True] * 8 + [False] * 2)
        >>> round(found.change, 3), found.p_value, found.low < found.change < found.high
        (-0.1, 1.0, True)
    """
    lost = sum(b and not c for b, c in zip(base, candidate, strict=True))
    won = sum(c and not b for b, c in zip(base, candidate, strict=True))
    n = len(base)
    down, up = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    error = math.sqrt((down + up - (up - down) ** 2) / (n + 2))
    p_value = mcnemar(lost, won)
    return PairedTest(
        metric=metric,
        scale="points",
        change=(won - lost) / n,
        low=max(up - down - _Z * error, -1.0),
        high=min(up - down + _Z * error, 1.0),
        p_value=p_value,
        p_holm=p_value,
        method="exact McNemar",
        detectable=_detectable_share(min(down, up), n),
        units=n,
    )


def paired_metrics(
    base: Metrics,
    candidate: Metrics,
    examples: int,
    scales: Mapping[str, Scale],
    *,
    groups: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[PairedTest]:
    """Test the change of every metric in `scales` by the paired bootstrap: both models meet the same drawn examples.

    Where a metric is the same on all draws, as it is of equal answers, the bootstrap would call the change certain,
    however few examples there are. Its interval is then what the rule of three leaves room for (`unseen_changes`), and
    none where that cannot be told either.

    Args:
        base: the base's metrics as functions of the examples' counts.
        candidate: the candidate's.
        examples: how many examples both answered.
        scales: how each metric is compared. Ratios are tested as logarithms.
        groups: for each example the number of its group, drawn together; None where examples are independent.
        resamples: bootstrap samples.
        seed: of the draws.
    """

    def changes(counts: Floats) -> dict[str, Floats]:
        ours, theirs = base(counts), candidate(counts)
        return {
            name: np.log(theirs[name]) - np.log(ours[name]) if scale == "ratio" else theirs[name] - ours[name]
            for name, scale in scales.items()
        }

    def logarithms(counts: Floats) -> dict[str, Floats]:
        values = base(counts)
        return {name: np.log(values[name]) if scale == "ratio" else values[name] for name, scale in scales.items()}

    resampled = resample(changes, examples, groups=groups, resamples=resamples, seed=seed)
    alike = any(math.isfinite(found.value) and not found.varies for found in resampled.values())
    unseen = unseen_changes(logarithms, examples, groups=groups, seed=seed) if alike else {}
    tests = []
    for name, found in resampled.items():
        scale = scales[name]
        ends = found.interval(corrected=False)
        bounded = name in unseen and not found.varies and math.isfinite(found.value)
        if bounded:
            # A share of [0, 1] may move by as much as all of the examples that may differ, whatever these few show.
            room = max(unseen[name], unseen_share(found.units) if scale == "points" else 0.0)
            ends = found.value - room, found.value + room
        p_value = found.p_value() if found.units > 1 and math.isfinite(found.value) else 1.0
        tests.append(
            PairedTest(
                metric=name,
                scale=scale,
                change=_told(found.value, scale),
                low=_told(ends[0], scale) if ends else None,
                high=_told(ends[1], scale) if ends else None,
                p_value=p_value,
                p_holm=p_value,
                method="rule of three" if bounded else "paired bootstrap",
                detectable=_detectable(found, scale),
                units=found.units,
            )
        )
    return tests


def _told(value: float, scale: Scale) -> float:
    """Return a change as a `PairedTest` tells it: ratios are tested as logarithms, and points lie in [-1, 1]."""
    if scale == "ratio":
        return math.exp(value) if not value > _LARGEST_LOG else math.inf
    return min(max(value, -1.0), 1.0) if scale == "points" else value


def _detectable(found: Resampled, scale: Scale) -> float | None:
    """Return the smallest change that a test of such a sample finds in 80 of 100 cases, or None."""
    reach = _reach(found.degrees_of_freedom) * found.standard_error
    if not math.isfinite(reach) or (scale == "ratio" and reach > _LARGEST_DETECTABLE_LOG):
        return None
    return math.exp(reach) if scale == "ratio" else reach


def _detectable_share(rest: float, examples: int) -> float | None:
    """The smallest drop (or gain) of a proportion that McNemar's exact test finds in 80 of 100 samples, or None.

    Args:
        rest: share of examples that flip the other way, which a drop does not change.
        examples: how many there are.
    """

    def power(drop: float) -> float:
        flipped = 2 * rest + drop
        low, high = scipy.stats.binom.ppf([1e-9, 1 - 1e-9], examples, flipped)
        counts = np.arange(int(low), int(high) + 1)
        # The most flips back that the test still calls uneven.
        most = scipy.stats.binom.ppf((1 - CONFIDENCE) / 2, counts, 0.5)
        most -= scipy.stats.binom.cdf(most, counts, 0.5) > (1 - CONFIDENCE) / 2
        found = scipy.stats.binom.cdf(most, counts, rest / flipped)
        return float((scipy.stats.binom.pmf(counts, examples, flipped) * found).sum())

    if power(1 - 2 * rest) < _POWER:
        return None
    return float(scipy.optimize.brentq(lambda drop: power(drop) - _POWER, 1e-9, 1 - 2 * rest, xtol=1e-5))


def _reach(degrees_of_freedom: float) -> float:
    """How many standard errors a true change must be for a test at the 5 % level to find it in 80 of 100 samples."""
    level, power = scipy.stats.t.ppf([1 - (1 - CONFIDENCE) / 2, _POWER], degrees_of_freedom)
    return float(level + power)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of several tests so that one false alarm among all of them has the level (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a distribution-free 95 % interval of the median, from the order statistics.

    With fewer than six values there is none at this level: the extremes are returned.

    Example:
        >>> median_interval([5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 7.0])
        (1.0, 7.0)
    """
    ordered = sorted(values)
    # The largest k with P(Binomial(n, 1/2) < k) <= 2.5 %: the interval from the k-th lowest to the k-th highest.
    k = int(scipy.stats.binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5))
    k = max(k - 1, 0)
    return ordered[k], ordered[-1 - k]
