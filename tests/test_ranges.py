"""Ranges of activations: the histogram batch by batch, and each way to choose from it against brute force."""

import math

import pytest
import torch

from llmcompress.quantization.ranges import (
    InputHistogram,
    choose_range,
    coding_divergence,
    coding_of,
    entropy_threshold,
)


def histogram_of(values, batches=1):
    seen = InputHistogram()
    for part in values.reshape(-1, 8).chunk(batches):
        seen.update(part)
    return seen


def values_of(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    if kind == "gelu":
        return torch.nn.functional.gelu(x * 2)
    if kind == "heavy":
        return x * torch.randn(4000, 8, generator=generator).abs().pow(3)
    return x + 0.3


def squared_error(values, low, high, *, symmetric):
    scale, zero = coding_of(low, high, symmetric=symmetric)
    codes = (torch.round(values.double() / scale) + zero).clamp(0, 255)
    return float(((codes - zero) * scale - values).square().sum())


def test_bins_widen_without_losing_or_moving_a_value():
    generator = torch.Generator().manual_seed(0)
    # Middles of bins of every width on the way, so that no rounding decides where a value goes.
    small = (torch.randint(-4096, 4096, (64, 8), generator=generator) + 0.5) / 4096
    large = (torch.randint(-4096, 4096, (64, 8), generator=generator) + 0.5) / 4096 * 16
    small[0, 0], large[0, 0] = 0.75, -12.0
    seen = InputHistogram()
    for part in (torch.zeros(3, 8), small, large, torch.zeros(2, 8)):
        seen.update(part)
    assert (seen.count, seen.reach, seen.high) == (133, 16.0, float(large.max()))
    assert seen.low == float(large.min())
    whole = torch.cat([torch.zeros(5, 8), small, large])
    assert torch.equal(seen.counts, torch.histc(whole, 8192, -16.0, 16.0).double())
    assert seen.centers()[4096] == 16 / 8192


def test_the_order_of_batches_does_not_matter():
    values = values_of("normal")
    values = values * torch.linspace(0.1, 40, len(values)).unsqueeze(1)
    one, many = histogram_of(values), histogram_of(values, batches=7)
    assert one.reach == many.reach
    # A value on the border of two bins may be rounded into either.
    assert (one.counts.cumsum(0) - many.counts.cumsum(0)).abs().max() <= 3
    assert one.counts.sum() == values.numel()


@pytest.mark.parametrize("kind", ["normal", "gelu", "heavy"])
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentiles_are_those_of_the_values(kind, percentile):
    values = values_of(kind)
    seen = histogram_of(values, batches=3)
    outside = (1 - percentile / 100) * values.numel()
    low, high = choose_range(seen, "percentile", percentile=percentile)
    # Up to what one bin holds.
    assert abs(int((values > high).sum()) - outside / 2) < 3
    if kind != "gelu":  # which has very many values in the lowest bin
        assert abs(int((values < low).sum()) - outside / 2) < 3
    low, high = choose_range(seen, "percentile", percentile=percentile, symmetric=True)
    assert low == -high
    assert abs(int((values.abs() > high).sum()) - outside) < 3


def test_all_per_cent_is_what_minmax_covers():
    seen = histogram_of(values_of("heavy"))
    for symmetric in (True, False):
        given = choose_range(seen, "percentile", percentile=100, symmetric=symmetric)
        assert given == pytest.approx(choose_range(seen, "minmax", symmetric=symmetric), rel=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["normal", "gelu", "heavy"])
def test_the_squared_error_is_the_least_that_brute_force_finds(kind, symmetric):
    values = values_of(kind)
    seen = histogram_of(values, batches=3)
    found = squared_error(values, *choose_range(seen, "mse", symmetric=symmetric), symmetric=symmetric)
    low, high = choose_range(seen, "minmax", symmetric=symmetric)
    shares = [share / 40 for share in range(1, 41)]
    pairs = [(a, a) for a in shares] if symmetric else [(a, b) for a in shares for b in shares]
    least = min(squared_error(values, low * a, high * b, symmetric=symmetric) for a, b in pairs)
    assert found < 1.02 * least
    if kind == "heavy":
        assert found < squared_error(values, low, high, symmetric=symmetric)


def divergence_by_hand(counts, within, levels):
    """The same in plain loops over Python numbers."""
    inside = counts[:within]
    reference = [*inside[:-1], inside[-1] + sum(counts[within:])]
    coded = [0.0] * within
    for level in range(levels):
        bins = [i for i in range(within) if i * levels // within == level]
        filled = [i for i in bins if inside[i] > 0]
        for i in filled:
            coded[i] = sum(inside[j] for j in bins) / len(filled)
    total_p, total_q = sum(reference), sum(coded)
    return sum(
        p / total_p * math.log((p / total_p) / max(q / total_q, 1e-12))
        for p, q in zip(reference, coded, strict=True)
        if p > 0
    )


def test_the_divergence_is_the_least_that_plain_loops_find():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator).abs()
    counts = torch.histc(values, 96, 0, float(values.max())).double()
    counts[90] += 2  # far out
    by_hand = {within: divergence_by_hand(counts.tolist(), within, 16) for within in range(16, 97)}
    for within, expected in by_hand.items():
        assert coding_divergence(counts, within, 16) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    best = min(by_hand, key=by_hand.__getitem__)
    assert entropy_threshold(counts, 16) == best / 96
    assert best < 96


def test_far_out_values_are_cut_off_by_all_but_minmax():
    values = values_of("normal")
    values[5, 5] = 500.0
    seen = histogram_of(values)
    assert choose_range(seen, "minmax")[1] == 500.0
    for method in ("percentile", "entropy"):
        low, high = choose_range(seen, method)
        assert 2 < high < 20, method
        assert -20 < low < -2
    # One value of 500 costs more to cut off than all others gain, so the least squared error keeps it.
    assert choose_range(seen, "mse")[1] > 400


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_odd_inputs(method):
    for values in (torch.zeros(4, 8), torch.full((4, 8), 3.0), torch.full((4, 8), -1e-20), values_of("gelu").relu()):
        seen = histogram_of(values)
        low, high = choose_range(seen, method)
        assert low <= 0 <= high
        scale, zero = coding_of(low, high)
        assert scale > 0
        assert 0 <= zero <= 255
        if values.min() >= 0:
            assert zero == 0


@pytest.mark.parametrize("ends", [(-1.0, 3.0), (0.0, 5.0), (-4.0, 0.0), (-1e-3, 100.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_coding_covers_its_range_and_codes_zero_exactly(ends, symmetric):
    scale, zero = coding_of(*ends, symmetric=symmetric)
    for end in ends:
        code = min(max(round(end / scale) + zero, 0), 255)
        assert abs((code - zero) * scale - end) <= 0.51 * scale
    assert isinstance(zero, int)
    assert not symmetric or zero == 128
