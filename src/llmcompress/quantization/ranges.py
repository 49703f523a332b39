"""The range of a layer's inputs that 8-bit codes shall cover: a histogram of them, and four ways to choose from it.

All values are kept (`minmax`), or some are cut off, so that the others get finer steps: a fixed share of them
(`percentile`), as many as makes the squared error least (`mse`), or as many as keeps the distribution most like itself
(`entropy`). The last two weigh what is cut off against what is rounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer

Method = Literal["minmax", "percentile", "mse", "entropy"]
_BINS = 8192
_LEVELS = 255
# How many ends of the range are tried for the least squared error, and for the least divergence.
_ENDS = 64
_THRESHOLDS = 128
# Below this a step could not be divided by any more.
_SMALLEST_STEP = 1e-30


class InputHistogram:
    """How often each value occurs among a layer's inputs, in bins of equal width around 0.

    The bins reach to a power of two above all values. Where a batch brings larger ones the bins double their width, and
    neighbours are added up, so the counts do not depend on how values are split into batches. At least a quarter of
    the bins is in use.

    Attributes:
        count: tokens seen so far.
        counts: how many values each bin holds, shape (8192,), float64.
        reach: the bins cover -reach to reach; 0 before the first value that is not 0.
        low: smallest value, exactly.
        high: largest value, exactly.

    Example:
        >>> seen = InputHistogram()
        >>> seen.update(torch.tensor([[0.5, -1.0], [3.0, 0.0]]))
        >>> seen.count, seen.low, seen.high, int(seen.counts.sum())
        (2, -1.0, 3.0, 4)
    """

    def __init__(self) -> None:
        self.count = 0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.reach = 0.0
        self.low, self.high = 0.0, 0.0

    @classmethod
    def of(cls, layer: WeightLayer) -> InputHistogram:
        """Return an empty one for `layer`."""
        return cls()

    @torch.no_grad()
    def update(self, inputs: torch.Tensor) -> None:
        """Count the values of `inputs` (tokens, features)."""
        values = inputs.float()
        low, high = (float(end) for end in torch.aminmax(values))
        first = self.count == 0
        self.low, self.high = (low, high) if first else (min(self.low, low), max(self.high, high))
        self.count += len(inputs)
        largest = max(-low, high)
        if largest == 0 and self.reach == 0:
            # Without a width there are no bins yet; these all go to the one in the middle.
            self.counts[_BINS // 2] += values.numel()
            return
        reach = math.ldexp(1.0, math.frexp(largest)[1])
        if self.reach == 0:
            self.reach = reach
        while self.reach < reach:
            self._widen()
        for part in values.flatten().split(1 << 22):  # float32 counts are exact up to 2^24
            self.counts += torch.histc(part, _BINS, -self.reach, self.reach).double().cpu()

    def centers(self) -> torch.Tensor:
        """Return the middle of each bin, shape (8192,), float64."""
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 * self.reach / _BINS) - self.reach

    def _widen(self) -> None:
        pairs = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[_BINS // 4 : 3 * _BINS // 4] = pairs
        self.reach *= 2


def choose_range(
    seen: InputHistogram, method: Method, *, symmetric: bool = False, percentile: float = 99.99
) -> tuple[float, float]:
    """Choose which values the codes cover; those outside become the nearest end.

    Args:
        seen: the inputs.
        method: how to choose.
        symmetric: whether both ends must be equally far from 0.
        percentile: for `"percentile"`, how many per cent of the values to cover, in (0, 100].

    Returns:
        The two ends, of which the lower is at most 0 and the upper at least 0: 0 itself is always covered.

    Example:
        >>> seen = InputHistogram()
        >>> seen.update(torch.tensor([[1.0, -2.0, 4.0]]))
        >>> choose_range(seen, "minmax"), choose_range(seen, "minmax", symmetric=True)
        ((-2.0, 4.0), (-4.0, 4.0))
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if seen.reach == 0:
        return 0.0, 0.0
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if method == "percentile":
        return percentile_range(seen, low, high, percentile, symmetric=symmetric)
    if method == "mse":
        return mse_range(seen.counts, seen.centers(), low, high, symmetric=symmetric)
    if method == "entropy":
        threshold = entropy_threshold(_folded(seen.counts)) * seen.reach
        return max(low, -threshold), min(high, threshold)
    return low, high


def coding_of(low: float, high: float, *, symmetric: bool = False) -> tuple[float, int]:
    """Return the scale and the zero point of codes from 0 to 255 that cover `low` to `high`, with 0.0 coded exactly.

    Symmetric codes are 1 to 255 around 128.

    Example:
        >>> coding_of(-1.0, 3.0), coding_of(-127.0, 3.0, symmetric=True)
        ((0.01568627450980392, 64), (1.0, 128))
    """
    if low == high:
        return 1.0, 128 if symmetric else 0
    if symmetric:
        return max(max(-low, high) / 127, _SMALLEST_STEP), 128
    scale = max((high - low) / _LEVELS, _SMALLEST_STEP)
    return scale, min(max(round(-low / scale), 0), _LEVELS)


def percentile_range(
    seen: InputHistogram, low: float, high: float, percentile: float, *, symmetric: bool
) -> tuple[float, float]:
    """Return ends between which `percentile` per cent of the values lie, half of the rest beyond each.

    Symmetric ends are those of the magnitudes. Within a bin, values are taken to be spread evenly.
    """
    width = 2 * seen.reach / _BINS
    outside = 1 - percentile / 100
    if symmetric:
        end = min(_quantile(_folded(seen.counts), 1 - outside) * width, high)
        return -end, end
    upper = _quantile(seen.counts, 1 - outside / 2) * width - seen.reach
    lower = seen.reach - _quantile(seen.counts.flip(0), 1 - outside / 2) * width
    return min(max(lower, low), 0.0), max(min(upper, high), 0.0)


def mse_range(
    counts: torch.Tensor, centers: torch.Tensor, low: float, high: float, *, symmetric: bool
) -> tuple[float, float]:
    """Return the ends within `low` to `high` whose codes have the least squared error over a histogram.

    Both ends are tried at 64 places each, in turns: the upper one, the lower one, and once more.

    Args:
        counts: how often each value occurs, shape (bins,).
        centers: the values, shape (bins,).
        low: where the lower end begins, at most 0.
        high: where the upper end begins, at least 0.
        symmetric: whether both ends must be equally far from 0.
    """
    used = counts > 0
    counts, centers = counts[used], centers[used]
    shares = torch.arange(1, _ENDS + 1, dtype=torch.float64) / _ENDS
    ends = torch.tensor([low, high], dtype=torch.float64)
    if symmetric:
        tried = shares.unsqueeze(1) * ends
        best = squared_errors(counts, centers, tried, symmetric=True).argmin()
        return float(tried[best, 0]), float(tried[best, 1])
    whole = ends.clone()
    for side in (1, 0, 1, 0):
        if whole[side] == 0:
            continue
        tried = ends.repeat(_ENDS, 1)
        tried[:, side] = shares * whole[side]
        ends = tried[squared_errors(counts, centers, tried, symmetric=False).argmin()]
    return float(ends[0]), float(ends[1])


def squared_errors(counts: torch.Tensor, values: torch.Tensor, ends: torch.Tensor, *, symmetric: bool) -> torch.Tensor:
    """Return the sum of squared errors of coding `values`, each as often as counted, for each pair of ends.

    Args:
        counts: shape (values,).
        values: shape (values,).
        ends: lower and upper ends, shape (tried, 2).
        symmetric: whether codes are symmetric.

    Returns:
        Errors, shape (tried,).
    """
    errors = []
    for low, high in ends.tolist():
        scale, zero = coding_of(low, high, symmetric=symmetric)
        codes = torch.round(values / scale).add_(zero).clamp_(0, _LEVELS)
        errors.append(counts @ ((codes - zero) * scale - values).square_())
    return torch.stack(errors)


def entropy_threshold(counts: torch.Tensor, levels: int = 128) -> float:
    """Return which share of a histogram of magnitudes to cover, so that its codes are distributed most like it.

    For each threshold, the histogram with all beyond it moved into the last bin is compared, by the Kullback-Leibler
    divergence, with the one that `levels` codes leave of what is within (Migacz, 8-bit inference with TensorRT, 2017).

    Args:
        counts: of magnitudes, from 0 up, shape (bins,).
        levels: how many codes magnitudes have.

    Returns:
        The threshold over the end of the last bin, in (0, 1].
    """
    bins = int(counts.nonzero().max()) + 1
    if bins <= levels:
        return bins / len(counts)
    step = max((bins - levels) // _THRESHOLDS, 1)
    tried = sorted({*range(levels, bins, step), bins})
    divergences = [coding_divergence(counts, within, levels) for within in tried]
    return tried[min(range(len(tried)), key=divergences.__getitem__)] / len(counts)


def coding_divergence(counts: torch.Tensor, within: int, levels: int) -> float:
    """Return the divergence of the first `within` bins, all beyond moved into the last, from what `levels` codes leave.

    A code stands for the bins that are rounded to it, and is spread evenly over those of them that hold anything.
    """
    inside = counts[:within]
    reference = inside.clone()
    reference[-1] += counts[within:].sum()
    code = torch.arange(within) * levels // within
    used = (inside > 0).to(counts.dtype)
    sums = torch.zeros(levels, dtype=counts.dtype).index_add_(0, code, inside)
    bins = torch.zeros(levels, dtype=counts.dtype).index_add_(0, code, used)
    coded = (sums / bins.clamp_min(1))[code] * used
    p, q = reference / reference.sum(), coded / coded.sum().clamp_min(1)
    here = p > 0
    # Where only what was cut off lies, the codes have nothing: a very unlikely value instead of an impossible one.
    return float((p[here] * (p[here] / q[here].clamp_min(1e-12)).log()).sum())


def _folded(counts: torch.Tensor) -> torch.Tensor:
    """Return the histogram of the magnitudes."""
    half = len(counts) // 2
    return counts[half:] + counts[:half].flip(0)


def _quantile(counts: torch.Tensor, share: float) -> float:
    """Return how many bins, and which part of the next one, hold `share` of all values."""
    sums = counts.cumsum(0)
    wanted = share * float(sums[-1])
    bin_ = min(int(torch.searchsorted(sums, wanted)), len(counts) - 1)
    before = float(sums[bin_ - 1]) if bin_ else 0.0
    return bin_ + (wanted - before) / max(float(counts[bin_]), 1.0)
