"""The bootstrap: how far a metric could be off, whatever it is made of.

A metric here is a function of how often each example counts, so that one code serves means, F1, correlations and
corpus BLEU, and a thousand resamples are one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when they are first used, for more than a second
from numpy.typing import NDArray

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
# Values nearer to each other than this part of themselves differ by rounding.
_ROUNDING = 1e-12


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
    def varies(self) -> bool:
        """Whether the draws differ. If not, they say nothing of how far the metric could be off."""
        return _differ(self.draws)

    @property
    def standard_error(self) -> float:
        """Of the metric, from the spread of the draws; NaN where it cannot be told."""
        if self.units < 2 or not self.varies:
            return math.nan
        return float(self.draws.std(ddof=1)) * self._inflation

    @property
    def degrees_of_freedom(self) -> float:
        """How many normal units would tell the standard error as well as these do, in [1, units - 1].

        By Satterthwaite's rule (Biometrics Bulletin 2, 1946): two over the squared coefficient of variation of the
        estimated variance, which for a mean is (kurtosis - 1) / units. Where two models differ on ten of a thousand
        examples, it is about ten.
        """
        left = self._deviations
        count, spread = len(left), float((left**2).sum())
        if count < 2 or spread == 0:
            return float(max(self.units - 1, 1))
        kurtosis = count * float((left**4).sum()) / spread**2
        # For normal units, of kurtosis 3, this is units - 1.
        found = 2 * count / max(kurtosis - (count - 3) / (count - 1), 2 * count / self.units)
        return float(min(max(found, 1.0), self.units - 1))

    def interval(self, *, corrected: bool = True) -> tuple[float, float] | None:
        """Return the 95 % interval, or None where the sample cannot tell one: one unit, or draws that are all alike.

        It is a bootstrap percentile interval, widened for small samples as Student's t is wider than the normal
        distribution (Hesterberg 2015, https://arxiv.org/abs/1411.5279, section 3.2 of the supplement), with
        `degrees_of_freedom` in place of units - 1.

        Args:
            corrected: whether bias and skewness are corrected (BCa, Efron 1987). It is right for the score of one
                model. Not for the change between two that agree on most examples: there the skewness is estimated from
                the few that differ, and correcting for it makes the interval too short. A change has no bounds of its
                own, and where its interval ends beyond all draws, as of two or three units, the end is Student's.
        """
        if self.units < 2 or not self.varies or not math.isfinite(self.value):
            return None
        tail = float(scipy.stats.t.ppf((1 - CONFIDENCE) / 2, self.degrees_of_freedom)) * self._inflation
        reach = np.array([tail, -tail])
        if corrected:
            bias, acceleration = self._bias_and_acceleration()
            reach = bias + (bias + reach) / np.maximum(1 - acceleration * (bias + reach), 1e-3)
        low, high = map(float, np.quantile(self.draws, scipy.stats.norm.cdf(reach)))
        if not corrected and scipy.stats.norm.cdf(tail) < 1 / (len(self.draws) + 1):
            spread = float(self.draws.std(ddof=1))
            low, high = min(low, self.value + tail * spread), max(high, self.value - tail * spread)
        return low, high

    def p_value(self, null: float = 0.0) -> float:
        """Return how likely a value so far from `null` is by chance alone, two-sided.

        The level at which the uncorrected interval just reaches `null`: below 5 % where that of 95 % leaves it out.
        """
        beyond = min(_level_of(null, self.draws), _level_of(-null, -self.draws))
        # So many draws cannot tell less; beyond all of them Student's t goes on.
        share = max(beyond, 1 / (len(self.draws) + 1))
        distance = max(-float(scipy.stats.norm.ppf(share)) / self._inflation, 0.0)
        if not beyond and self.varies:
            distance = max(distance, abs(self.value - null) / self.standard_error)
        return 2 * float(scipy.stats.t.sf(distance, self.degrees_of_freedom))

    @property
    def _inflation(self) -> float:
        # Draws vary around the sample, whose own variance is smaller than the population's by this much.
        return math.sqrt(self.units / (self.units - 1))

    @property
    def _deviations(self) -> Floats:
        """The jackknife's deviations from its mean, the largest being 1: cubes of a huge perplexity overflow."""
        if not len(self.jackknife):
            return self.jackknife
        deviations = self.jackknife - self.jackknife.mean()
        return np.asarray(deviations / max(np.abs(deviations).max(), np.finfo(float).tiny))

    def _bias_and_acceleration(self) -> tuple[float, float]:
        below = (np.sum(self.draws < self.value) + 0.5 * np.sum(self.draws == self.value)) / len(self.draws)
        edge = 1 / (len(self.draws) + 1)
        left = -self._deviations
        spread = (left**2).sum()
        acceleration = (left**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
        return float(scipy.stats.norm.ppf(min(max(below, edge), 1 - edge))), float(acceleration)


def _level_of(value: float, draws: Floats) -> float:
    """Return up to which level the quantiles of `draws` are at most `value`, in [0, 1]: what `np.quantile` inverts."""
    ordered = np.sort(draws)
    at = int(np.searchsorted(ordered, value, side="right"))
    if at in (0, len(ordered)):
        return float(at > 0)
    step = (value - ordered[at - 1]) / (ordered[at] - ordered[at - 1])
    return float((at - 1 + step) / (len(ordered) - 1))


def _differ(values: Floats) -> bool:
    """Whether `values` differ by more than rounding."""
    return len(values) > 1 and bool(np.ptp(values) > _ROUNDING * np.abs(values).max())


def _units(examples: int, groups: Sequence[int] | None) -> tuple[NDArray[np.intp], int]:
    """Return the unit of each example, and how many there are."""
    unit_of = np.arange(examples) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    return unit_of, int(unit_of.max()) + 1


def _in_slices(metrics: Metrics, draw: Callable[[int], Floats], number: int, width: int) -> dict[str, Floats]:
    """Compute metrics on `number` rows of counts of `width`, a slice of memory at a time."""
    rows = max(1, _MOST_COUNTS // width)
    parts = [metrics(draw(min(rows, number - start))) for start in range(0, number, rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
    unit_of, units = _units(examples, groups)
    random = np.random.default_rng(seed)
    value = metrics(np.ones((1, examples)))

    def counted(draw: Callable[[int], Floats], number: int) -> dict[str, Floats]:
        return _in_slices(metrics, lambda rows: draw(rows)[:, unit_of], number, max(examples, units))

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


def unseen_share(units: int) -> float:
    """Return the largest share of all units that can differ, at 95 % confidence, if none of a sample of `units` does.

    The rule of three (Hanley and Lippman-Hand 1983, JAMA 249, 1743-1745): about 3 / units.

    Example:
        >>> round(unseen_share(5), 3), round(unseen_share(1000), 5)
        (0.451, 0.00299)
    """
    return float(1 - (1 - CONFIDENCE) ** (1 / units))


def unseen_changes(
    metrics: Metrics, examples: int, *, groups: Sequence[int] | None = None, seed: int = 0
) -> dict[str, float]:
    """Bound how far each metric could change between two models, though on no unit of the sample it does.

    At most `unseen_share` of all units differ. Each that does is taken to move the metric by what it moves where the
    unit of the sample that speaks most for it gives its place to the one that speaks most against it: for a mean of
    right and wrong the bound is that share itself. Left out is a metric to which all units are alike: what moves it was
    not seen.

    Args:
        metrics: the base's, as a function of counts.
        examples: how many there are.
        groups: as for `resample`.
        seed: of the draw of the units that are looked at, where there are very many.

    Example:
        >>> right = np.array([1.0] * 15 + [0.0] * 5)
        >>> found = unseen_changes(lambda counts: {"accuracy": counts @ right / counts.sum(1)}, 20)
        >>> round(found["accuracy"], 3), round(unseen_share(20), 3)
        (0.146, 0.139)
    """
    unit_of, units = _units(examples, groups)
    picked = iter(np.random.default_rng(seed).permutation(units)[:_MOST_JACKKNIVES])

    def without(rows: int) -> Floats:
        return np.stack([(unit_of != next(picked)).astype(float) for _ in range(rows)])

    with np.errstate(divide="ignore", invalid="ignore"):
        left = _in_slices(metrics, without, min(units, _MOST_JACKKNIVES), examples) if units > 1 else {}
    finite = {name: values[np.isfinite(values)] for name, values in left.items()}
    weight = unseen_share(units) * units
    return {name: weight * float(np.ptp(values)) for name, values in finite.items() if _differ(values)}
