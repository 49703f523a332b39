"""The bootstrap: how far a metric could be off, whatever it is made of.

A metric here is a function of how often each example counts, so that one code serves means, F1, correlations and
corpus BLEU, and a thousand resamples are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

Metrics = Callable[[Floats], dict[str, Floats]]
"""Counts of each example, of shape (resamples, examples), to the value of each metric, of shape (resamples,)."""

RESAMPLES = 2000
CONFIDENCE = 0.95
"""Level of every interval in the library."""

# Counts of so many examples are held at a time (64 MiB).
_MOST_COUNTS = 2**23
# Leaving out each of very many units in turn would cost more than the bootstrap: they are left out in blocks.
_MOST_JACKKNIVES = 400


@dataclass(frozen=True)
class Resampled:
    """A metric's value on the sample, on bootstrap samples, and with parts of the sample left out.

    Attributes:
        value: on the sample itself.
        draws: on each bootstrap sample, NaN left out.
        jackknife: with each unit (or block of units) left out in turn.
        units: what was drawn: examples, or groups of them.
    """

    value: float
    draws: Floats
    jackknife: Floats
    units: int

    @property
    def standard_error(self) -> float:
        """Standard deviation of the draws; NaN where there are fewer than two."""
        return float(self.draws.std(ddof=1)) if len(self.draws) > 1 else math.nan

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval, bias-corrected and accelerated, or None where the sample cannot tell one.

        BCa after Efron 1987; its level is widened for small samples as Student's t is wider than the normal
        distribution (Hesterberg 2015, https://arxiv.org/abs/1411.5279, section 3.2 of the supplement).
        """
        if self.units < 2 or len(self.draws) < 2 or not math.isfinite(self.value):
            return None
        if np.ptp(self.draws) == 0:
            return self.value, self.value
        below = (np.sum(self.draws < self.value) + 0.5 * np.sum(self.draws == self.value)) / len(self.draws)
        edge = 1 / (len(self.draws) + 1)
        bias = stats.norm.ppf(min(max(below, edge), 1 - edge))
        left = self.jackknife.mean() - self.jackknife
        left = left / max(np.abs(left).max(initial=0.0), np.finfo(float).tiny)  # the cube of a large one overflows
        spread = (left**2).sum()
        acceleration = (left**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
        tail = stats.t.ppf((1 - CONFIDENCE) / 2, self.units - 1) * math.sqrt(self.units / (self.units - 1))
        reach = bias + np.array([tail, -tail])
        levels = stats.norm.cdf(bias + reach / np.maximum(1 - acceleration * reach, 1e-3))
        low, high = np.quantile(self.draws, levels)
        return float(low), float(high)

    def p_value(self, null: float = 0.0) -> float:
        """Return how likely a value so far from `null` is by chance alone, two-sided, from the draws beyond it.

        At least 1 / (draws + 1): so many draws cannot tell less.
        """
        below, above = (int(np.sum(beyond)) for beyond in (self.draws <= null, self.draws >= null))
        return min(1.0, 2 * (min(below, above) + 1) / (len(self.draws) + 1))


def resample(
    metrics: Metrics,
    examples: int,
    *,
    groups: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Resampled]:
    """Draw bootstrap samples of examples (or of whole groups of them) and compute every metric on each.

    Args:
        metrics: the metrics, as a function of counts.
        examples: how many there are, at least 1.
        groups: for each example the number of its group; examples of one text are drawn together, since they are not
            independent. None draws examples.
        resamples: bootstrap samples.
        seed: of the draws; the same seed gives the same numbers.

    Example:
        >>> import numpy as np
        >>> heights = np.array([1.62, 1.75, 1.81, 1.68, 1.90, 1.77, 1.73, 1.66, 1.84, 1.79])
        >>> found = resample(lambda counts: {"mean": counts @ heights / counts.sum(1)}, len(heights))["mean"]
        >>> low, high = found.interval()
        >>> low < heights.mean() == found.value < high
        True
    """
    unit_of = np.arange(examples) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(unit_of.max()) + 1
    random = np.random.default_rng(seed)
    value = metrics(np.ones((1, examples)))
    rows = max(1, _MOST_COUNTS // max(examples, units))

    def counted(draw: Callable[[int], Floats], number: int) -> dict[str, Floats]:
        found: dict[str, list[Floats]] = {name: [] for name in value}
        for start in range(0, number, rows):
            for name, values in metrics(draw(min(rows, number - start))[:, unit_of]).items():
                found[name].append(values)
        return {name: np.concatenate(values) for name, values in found.items()}

    def drawn(number: int) -> Floats:
        picked = random.integers(0, units, (number, units)) + np.arange(number)[:, None] * units
        return np.bincount(picked.ravel(), minlength=number * units).reshape(number, units).astype(float)

    blocks = min(units, _MOST_JACKKNIVES)
    block_of = random.permutation(units) % blocks
    left_out = iter(range(blocks))

    def without(number: int) -> Floats:
        return np.stack([(block_of != next(left_out)).astype(float) for _ in range(number)])

    with np.errstate(divide="ignore", invalid="ignore"):
        draws = counted(drawn, resamples)
        jackknives = counted(without, blocks) if units > 1 else {name: np.zeros(0) for name in value}
    return {
        name: Resampled(
            value=float(value[name][0]),
            draws=draws[name][np.isfinite(draws[name])],
            jackknife=jackknives[name][np.isfinite(jackknives[name])],
            units=units,
        )
        for name in value
    }
