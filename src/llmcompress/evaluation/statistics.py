"""How sure a score is, and how two models differ on the same examples."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field
from scipy import stats

CONFIDENCE = 0.95
"""Level of every interval in the library."""


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


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927).

    Example:
        >>> low, high = wilson(90, 100)
        >>> round(low, 4), round(high, 4)
        (0.8256, 0.9448)
    """
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


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
    p_value = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Flips(
        examples=len(same), agreement=sum(same) / len(same), right_to_wrong=lost, wrong_to_right=won, p_value=p_value
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a distribution-free 95 % interval of the median, from the order statistics.

    With fewer than six values there is none at this level: the extremes are returned.

    Example:
        >>> median_interval([5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 7.0])
        (1.0, 7.0)
    """
    ordered = sorted(values)
    # The largest k with P(Binomial(n, 1/2) < k) <= 2.5 %: the interval from the k-th lowest to the k-th highest.
    k = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5))
    k = max(k - 1, 0)
    return ordered[k], ordered[-1 - k]
