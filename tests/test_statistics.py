"""Intervals and tests: against scipy and closed forms, and by simulation, where the truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from scipy import stats

from llmcompress.evaluation import resampling, statistics
from llmcompress.evaluation.resampling import Metrics, Resampled, resample
from llmcompress.evaluation.statistics import (
    PairedTest,
    holm,
    mcnemar,
    median_interval,
    paired_metrics,
    paired_proportions,
    wilson,
)
from llmcompress.evaluation.tasks.measures import classification

DRAWS = 1000
# 95 % +- 1.5 points: over 1,000 draws the share itself has a standard error of 0.7 points.
COVERS = (0.935, 0.965)
RESAMPLES = 400

Random = np.random.Generator
Draw = Callable[[Random], tuple[Metrics, int]]


def mean_of(values: np.ndarray, weights: np.ndarray | None = None) -> Metrics:
    weights = np.ones(len(values)) if weights is None else weights
    return lambda counts: {"mean": counts @ (weights * values) / (counts @ weights)}


def one(metric: Metrics, examples: int, *, groups: Sequence[int] | None = None, seed: int = 0, **kwargs) -> Resampled:
    return next(iter(resample(metric, examples, groups=groups, seed=seed, **kwargs).values()))


@cache
def proportions(examples: int, lost: int, won: int) -> PairedTest:
    rest = examples - lost - won
    base, candidate = [True] * lost + [False] * won, [False] * lost + [True] * won
    return paired_proportions("accuracy", [*base, *[True] * rest], [*candidate, *[True] * rest])


# --- against scipy and closed forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["normal", "exponential"])
def test_intervals_are_scipys_bca_but_for_small_samples(family: str) -> None:
    values = getattr(np.random.default_rng(0), family)(size=300)
    ours = one(mean_of(values), 300, resamples=20_000).interval()
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)
    few = values[:12]
    low, high = one(mean_of(few), 12, resamples=20_000).interval()
    narrow = stats.bootstrap((few,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    assert high - low > 1.08 * (narrow.high - narrow.low)


def test_small_normal_samples_have_students_interval() -> None:
    values = np.random.default_rng(3).normal(size=15)
    values = np.concatenate([values, -values])  # no skewness to correct
    found = one(mean_of(values), 30, resamples=50_000)
    student = stats.t.interval(0.95, found.degrees_of_freedom, 0, values.std(ddof=1) / math.sqrt(30))
    assert found.interval() == pytest.approx(student, abs=0.02)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(30), rel=0.01)


def test_mcnemar_is_the_binomial_test_of_the_flips() -> None:
    for lost in range(12):
        for won in range(12):
            expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
            assert mcnemar(lost, won) == pytest.approx(expected)
    assert mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert proportions(100, 9, 1).p_value == mcnemar(9, 1)


def test_the_paired_interval_is_bonett_and_prices() -> None:
    # 4 lost, 1 won of 40: p12 = 5/42, p21 = 2/42
    found, down, up = proportions(40, 4, 1), 5 / 42, 2 / 42
    half = 1.959963984540054 * math.sqrt((down + up - (up - down) ** 2) / 42)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
    assert found.change == pytest.approx(-3 / 40)
    assert proportions(3, 3, 0).low == -1


def test_holm_by_hand() -> None:
    # sorted .005, .011, .02, .03, .4 times 5, 4, 3, 2, 1, never falling
    assert holm([0.02, 0.005, 0.4, 0.011, 0.03]) == pytest.approx([0.06, 0.025, 0.4, 0.044, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])


def test_degrees_of_freedom_count_what_varies() -> None:
    random = np.random.default_rng(0)
    normal = one(mean_of(random.normal(size=300)), 300, resamples=10)
    assert 200 < normal.degrees_of_freedom <= 299
    sparse = np.zeros(1000)
    sparse[:10] = random.choice([-1.0, 1.0], 10)
    assert 9 < one(mean_of(sparse), 1000, resamples=10).degrees_of_freedom < 40  # in 400 blocks of the jackknife
    sparse[1:] = 0
    assert one(mean_of(sparse[:300]), 300, resamples=10).degrees_of_freedom == pytest.approx(2, abs=0.1)
    assert one(mean_of(np.ones(50)), 50, resamples=10).degrees_of_freedom == 49


def test_groups_are_drawn_together() -> None:
    groups, seen = [7, 7, 3, 3, 3, 9], []

    def watch(counts: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(counts)
        return {"mean": counts @ np.arange(6.0) / counts.sum(1)}

    found = one(watch, 6, groups=groups, resamples=50)
    assert found.units == 3
    drawn = seen[1]
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 2] == drawn[:, 3]).all()
    assert (drawn[:, [0, 2, 5]].sum(1) == 3).all()  # three groups of three, whatever their sizes
    assert sorted(map(tuple, seen[2])) == [(0, 0, 1, 1, 1, 1), (1, 1, 0, 0, 0, 1), (1, 1, 1, 1, 1, 0)]


def test_seeds_and_slices_of_memory(monkeypatch) -> None:
    metric = mean_of(np.random.default_rng(0).normal(size=40))
    whole = one(metric, 40, resamples=100)
    assert np.array_equal(whole.draws, one(metric, 40, resamples=100).draws)
    assert not np.array_equal(whole.draws, one(metric, 40, resamples=100, seed=1).draws)
    monkeypatch.setattr(resampling, "_MOST_COUNTS", 40 * 7)
    sliced = one(metric, 40, resamples=100)
    assert np.allclose(whole.draws, sliced.draws)
    assert np.allclose(np.sort(whole.jackknife), np.sort(sliced.jackknife))


def test_what_a_sample_cannot_tell() -> None:
    assert one(mean_of(np.array([1.0])), 1).interval() is None
    assert math.isnan(one(mean_of(np.array([1.0])), 1).standard_error)
    # Draws that are all alike say nothing: an interval of no width would be false certainty.
    assert one(mean_of(np.array([2.0, 2.0])), 2).interval() is None
    assert one(mean_of(np.full(50, 0.1)), 50).interval() is None  # alike but for rounding
    assert math.isnan(one(mean_of(np.full(50, 0.1)), 50).standard_error)
    assert one(lambda counts: {"none": np.full(len(counts), math.nan)}, 5).interval() is None
    half = one(lambda counts: {"m": np.where(counts[:, 0] > 0, counts @ np.arange(9.0), math.nan)}, 9)
    assert len(half.draws) < resampling.RESAMPLES  # those without a value are left out
    (alone,) = paired_metrics(mean_of(np.ones(1)), mean_of(np.zeros(1)), 1, {"mean": "difference"})
    assert (alone.p_value, alone.low, alone.detectable) == (1.0, None, None)
    assert proportions(2, 0, 0).detectable is None  # no change at all could be found in two examples


def test_equal_models_are_equal() -> None:
    same = mean_of(np.random.default_rng(0).random(30))
    (test,) = paired_metrics(same, same, 30, {"mean": "ratio"})
    assert (test.change, test.p_value, test.detectable, test.method) == (1, 1, None, "rule of three")
    assert test.low < 1 < test.high


@pytest.mark.parametrize("examples", [5, 20, 200, 2000])
def test_what_no_example_showed_is_bounded_as_for_accuracy(examples: int) -> None:
    # One code bounds F1, ROUGE and perplexity; here it is asked of a mean of right and wrong, whose bound is known.
    right = np.arange(examples) % 4 > 0
    same = mean_of(right.astype(float))
    (found,) = paired_metrics(same, same, examples, {"mean": "points"})
    known = proportions(examples, 0, 0)
    share = stats.binomtest(0, examples).proportion_ci(0.90).high  # at most so many differ: one-sided 95 %, exact
    assert (found.change, found.high) == (0, -found.low)
    assert found.high == pytest.approx(min(share * examples / (examples - 1), 1))
    assert 1 < found.high / known.high < 1.5


def test_rare_classes_leave_more_room_than_common_ones() -> None:
    labels = np.arange(400) % 40 == 0
    given = np.where(np.arange(400) < 80, False, labels)
    rare = binary_f1(labels.astype(int), given.astype(int))
    (found,) = paired_metrics(rare, rare, 400, {"f1": "points"})
    assert found.high > 5 * proportions(400, 0, 0).high
    # All is right: what a wrong answer takes from F1 was not seen, and no share of examples bounds it.
    perfect = binary_f1(labels.astype(int), labels.astype(int))
    (found,) = paired_metrics(perfect, perfect, 400, {"f1": "points"})
    assert (found.low, found.high, found.detectable, found.p_value) == (None, None, None, 1)


def test_a_share_has_never_less_room_than_the_examples_that_may_differ() -> None:
    # One answer to everything: the F1 of the other class, which no example shows, may yet move by more.
    collapsed = classification([0, 1] * 15, [1] * 30)
    same = (lambda counts: {"precision": collapsed(counts)["precision"]},) * 2
    (found,) = paired_metrics(*same, 30, {"precision": "points"})
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 30))


def test_equal_texts_are_drawn_as_groups_and_very_many_units_are_sampled() -> None:
    values, groups = np.random.default_rng(0).random(3000), np.repeat(np.arange(1500), 2)
    alone, grouped = (
        paired_metrics(mean_of(values), mean_of(values), 3000, {"mean": "difference"}, groups=by, resamples=20)[0]
        for by in (None, groups)
    )
    assert alone.high == pytest.approx(3 / 3000, rel=0.02)
    assert grouped.high > 1.5 * alone.high


def test_intervals_of_changes_that_are_seldom_seen_hold_them() -> None:
    # One text of fifty loses its whole ROUGE; in a third of the samples of 60 there is none.
    random, held = np.random.default_rng(0), 0
    for seed in range(300):
        base = random.beta(1, 3, size=60)
        candidate = np.where(random.random(60) < 0.02, 0, base)
        (test,) = paired_metrics(mean_of(base), mean_of(candidate), 60, {"mean": "points"}, resamples=100, seed=seed)
        held += test.low <= -0.02 * 0.25 <= test.high
    assert held > 0.9 * 300


def test_ratios_beyond_all_floats_are_told() -> None:
    # Two windows of a model whose logits grew fifty times too large.
    logs = [mean_of(np.array(nll)) for nll in ([2, 3], [90, 650])]
    models = [lambda counts, m=m: {"ppl": np.exp(m(counts)["mean"])} for m in logs]
    (test,) = paired_metrics(*models, 2, {"ppl": "ratio"})
    assert test.change == pytest.approx(math.exp(367.5))
    assert test.detectable is None


def test_the_test_and_the_interval_say_the_same() -> None:
    random, rejected = np.random.default_rng(0), 0
    for seed in range(200):
        found = one(mean_of(random.normal(0.25, 1, size=60)), 60, resamples=500, seed=seed)
        low, high = found.interval(corrected=False)
        assert (found.p_value() < 0.05) == (not low <= 0 <= high)
        assert found.p_value(low) == pytest.approx(0.05)
        assert found.p_value(high) == pytest.approx(0.05)
        rejected += found.p_value() < 0.05
    assert 50 < rejected < 150


@pytest.mark.parametrize("units", [2, 3, 4])
def test_changes_of_very_few_units_have_students_interval(units: int) -> None:
    # Draws of three units lie between the least and the largest: a range that holds the mean in three of four samples.
    random, held, alarms = np.random.default_rng(0), 0, 0
    for seed in range(400):
        found = one(mean_of(random.normal(size=units)), units, resamples=RESAMPLES, seed=seed)
        low, high = found.interval(corrected=False)
        held += low <= 0 <= high
        alarms += found.p_value() <= 0.05
    assert held / 400 > 0.9
    assert alarms / 400 < 0.1
    far = one(mean_of(np.array([30.0, 31, 32])), 3)
    assert far.interval(corrected=False)[0] > 0
    assert far.p_value() < 0.01


# --- by simulation: do intervals hold the truth as often as they say? ------------------------------------------------


def coverage(draw: Draw, truth: float, *, corrected: bool = True) -> tuple[float, float]:
    """Share of intervals that hold `truth`, and of tests that reject it at the 5 % level."""
    random, held, alarms = np.random.default_rng(1), 0, 0
    for seed in range(DRAWS):
        metric, examples = draw(random)
        found = one(metric, examples, resamples=RESAMPLES, seed=seed)
        low, high = found.interval(corrected=corrected)
        held += low <= truth <= high
        alarms += found.p_value(truth) <= 0.05
    return held / DRAWS, alarms / DRAWS


def binary_f1(labels: np.ndarray, given: np.ndarray) -> Metrics:
    metrics = classification(labels, given, average="binary")
    return lambda counts: {"f1": metrics(counts)["f1"]}


def flipped(random: Random, answers: np.ndarray, share: float) -> np.ndarray:
    return np.where(random.random(len(answers)) < share, 1 - answers, answers)


def mean_normal(random: Random) -> tuple[Metrics, int]:
    return mean_of(random.normal(size=60)), 60


def mean_skewed(random: Random) -> tuple[Metrics, int]:
    return mean_of(random.exponential(size=60)), 60


def mean_rouge(random: Random) -> tuple[Metrics, int]:
    return mean_of(random.beta(1, 3, size=60)), 60


def f1_of_200(random: Random) -> tuple[Metrics, int]:
    labels = (random.random(200) < 0.3).astype(int)
    return binary_f1(labels, flipped(random, labels, 0.2)), 200


def perplexity(random: Random) -> tuple[Metrics, int]:
    tokens = random.integers(50, 200, size=60).astype(float)
    log = mean_of(random.gamma(20, 2 / 20, size=60), tokens)
    return lambda counts: {"perplexity": np.exp(log(counts)["mean"])}, 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (mean_normal, 0.0),
        (mean_skewed, 1.0),
        (mean_rouge, 0.25),
        (f1_of_200, 2 * 0.24 / (0.24 + 0.06 + 0.24 + 0.14)),
        (perplexity, math.exp(2)),
    ],
)
def test_intervals_of_a_score_cover_95_percent(draw: Draw, truth: float) -> None:
    covered, _ = coverage(draw, truth)
    assert COVERS[0] <= covered <= COVERS[1]


def rouge_of_candidates_that_differ_now_and_then(random: Random, share: float, examples: int) -> tuple[Metrics, int]:
    base = random.beta(1, 3, size=examples)
    candidate = np.where(random.random(examples) < share, random.beta(1, 3, size=examples), base)
    return mean_of(candidate - base), examples


def differing_in_a_third(random: Random) -> tuple[Metrics, int]:
    return rouge_of_candidates_that_differ_now_and_then(random, 0.3, 60)


def differing_in_ten(random: Random) -> tuple[Metrics, int]:
    return rouge_of_candidates_that_differ_now_and_then(random, 0.1, 100)


def perplexity_ratio(random: Random) -> tuple[Metrics, int]:
    tokens = random.integers(50, 200, size=60).astype(float)
    # what a window loses is the sum of what its tokens lose, most of them little
    return mean_of(random.gamma(tokens * 0.05, 1 / tokens) - 0.05, tokens), 60


def f1_of_two_models(random: Random) -> tuple[Metrics, int]:
    labels = (random.random(200) < 0.3).astype(int)
    teacher = flipped(random, labels, 0.2)
    base, candidate = (binary_f1(labels, flipped(random, teacher, 0.05)) for _ in range(2))
    return lambda counts: {"f1": candidate(counts)["f1"] - base(counts)["f1"]}, 200


@pytest.mark.slow
@pytest.mark.parametrize("draw", [differing_in_a_third, differing_in_ten, perplexity_ratio, f1_of_two_models])
def test_paired_intervals_cover_95_percent_and_tests_alarm_in_5(draw: Draw) -> None:
    covered, alarms = coverage(draw, 0.0, corrected=False)
    assert COVERS[0] <= covered <= COVERS[1]
    assert 0.035 <= alarms <= 0.065


@pytest.mark.slow
def test_p_values_are_uniform_where_nothing_changed() -> None:
    random = np.random.default_rng(2)
    found = np.array(
        [one(mean_of(random.normal(size=60)), 60, resamples=RESAMPLES, seed=seed).p_value() for seed in range(DRAWS)]
    )
    for level in (0.01, 0.05, 0.2, 0.5, 0.8):
        assert np.mean(found <= level) == pytest.approx(level, abs=0.015 + 0.02 * (0.1 < level < 0.9))


@pytest.mark.slow
def test_texts_of_one_group_make_intervals_wider() -> None:
    random, groups = np.random.default_rng(4), np.repeat(np.arange(40), 5)
    held = {"grouped": 0, "alone": 0}
    for seed in range(DRAWS):
        values = (random.normal(size=(40, 1)) + random.normal(size=(40, 5))).ravel()
        for name, given in (("grouped", groups), ("alone", None)):
            low, high = one(mean_of(values), 200, groups=given, resamples=RESAMPLES, seed=seed).interval()
            held[name] += low <= 0 <= high
    assert COVERS[0] <= held["grouped"] / DRAWS <= COVERS[1]
    assert held["alone"] / DRAWS < 0.8


def test_wilson_covers_95_percent_on_average() -> None:
    examples, covered = 200, []
    intervals = [wilson(right, examples) for right in range(examples + 1)]
    for truth in np.linspace(0.03, 0.97, 95):
        chance = stats.binom.pmf(np.arange(examples + 1), examples, truth)
        covered.append(sum(p for p, (low, high) in zip(chance, intervals, strict=True) if low <= truth <= high))
    assert COVERS[0] <= np.mean(covered) <= COVERS[1]


# Few pairs of counts are drawn, and each of them often.
p_value = cache(mcnemar)


def flips(random: Random, examples: int, lost: float, won: float) -> list[list[int]]:
    return random.multinomial(examples, [lost, won, 1 - lost - won], size=2000)[:, :2].tolist()


@pytest.mark.parametrize(("lost", "won"), [(0.05, 0.05), (0.1, 0.05), (0.2, 0.2)])
def test_paired_differences_of_proportions_cover_95_percent(lost: float, won: float, monkeypatch) -> None:
    # Not asked for here, and most of the time.
    monkeypatch.setattr(statistics, "_detectable_share", lambda rest, examples: None)
    test_of = cache(proportions.__wrapped__)
    tests = [test_of(200, *each) for each in flips(np.random.default_rng(5), 200, lost, won)]
    assert COVERS[0] <= np.mean([test.low <= won - lost <= test.high for test in tests]) <= COVERS[1]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_mcnemar_alarms_in_at_most_5_of_100(share: float) -> None:
    drawn = flips(np.random.default_rng(6), 200, share, share)
    assert np.mean([p_value(*each) <= 0.05 for each in drawn]) <= 0.05


def test_median_intervals_cover_at_least_95_percent() -> None:
    draws = np.random.default_rng(7).exponential(size=(DRAWS, 31))
    held = [low <= math.log(2) <= high for low, high in map(median_interval, draws.tolist())]
    assert 0.94 <= np.mean(held) <= 0.985  # order statistics jump: the next shorter interval covers less than 95 %


# --- by simulation: is the smallest difference that could be seen, seen? ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "share"), [(100, 0.05), (200, 0.05), (500, 0.15), (1000, 0.01)])
def test_a_detectable_drop_of_accuracy_is_found_in_80_of_100(examples: int, share: float) -> None:
    random = np.random.default_rng(8)
    pilots = random.multinomial(examples, [share, share, 1 - 2 * share], size=40)
    drop = float(np.median([proportions(examples, int(down), int(up)).detectable for down, up, _ in pilots]))
    found = np.mean([p_value(*each) <= 0.05 for each in flips(random, examples, share + drop, share)])
    assert 0.74 <= found <= 0.88


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_a_detectable_change_of_a_mean_is_found_in_80_of_100(scale: str) -> None:
    random = np.random.default_rng(9)

    def test_of(change: float, seed: int) -> PairedTest:
        base = random.gamma(20, 0.1, size=80)
        candidate = base + random.normal(change, 0.3, size=80)
        models = (mean_of(base), mean_of(candidate))
        if scale == "ratio":
            models = tuple(lambda counts, m=m: {"mean": np.exp(m(counts)["mean"])} for m in models)
        return paired_metrics(*models, 80, {"mean": scale}, resamples=RESAMPLES, seed=seed)[0]

    detectable = float(np.median([test_of(0, seed).detectable for seed in range(50)]))
    change = math.log(detectable) if scale == "ratio" else detectable
    found = np.mean([test_of(change, seed).p_value <= 0.05 for seed in range(1000)])
    assert 0.75 <= found <= 0.85
