"""What a comparison says in words: one headline a candidate, and the notes that an honest reader needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..evaluation.units import change_text, count_text, ratio_text
from .reasons import why_no_faster

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry
    from ..evaluation.latency import Speedup
    from ..evaluation.statistics import PairedTest
    from ..evaluation.turns import Ratio

# Ratios nearer to one than this are told as "the same": it is what the tables' digits can show.
_SAME = 0.05
# Above this share of zeros a model counts as pruned, and the reader is told what zeros do not save.
_MANY_ZEROS = 0.05
SIGNIFICANT = 0.05
"""A difference with a smaller p-value, after Holm's correction, counts as more than chance."""

# A 95 % interval wider than this (in points, to one side) cannot tell good from bad compression.
_WIDE_INTERVAL = 0.03
_COLLAPSE = "collapse"
_INCOMPARABLE = "cannot be compared"


def headline(comparison: Comparison, entry: Entry) -> str:
    """Return for instance "3.9x smaller, 2.4x faster, accuracy -0.3 points [-1.2, +0.6] within chance".

    A model that no longer answers at all is called COLLAPSED before anything else.
    """
    if entry.change is None:
        return "the base"
    parts = [size_text(entry.change.smaller_on_disk)]
    if entry.change.faster:
        parts.append(faster_text(entry.change.faster[0]))
    parts += [quality_text(comparison, entry, task) for task in range(len(entry.evaluation.scores))]
    return ("COLLAPSED: " if collapses(entry) else "") + ", ".join(parts)


def size_text(ratio: float) -> str:
    """Write a ratio of sizes in words: `3.9x smaller`, `same size`, `1.2x larger`.

    Example:
        >>> size_text(3.94), size_text(1.0), size_text(0.5)
        ('3.9x smaller', 'same size', '2.0x larger')
    """
    return _in_words(ratio, "smaller", "same size", "larger")


def speed_text(ratio: float) -> str:
    """Write a ratio of speeds in words: `2.4x faster`, `same speed`, `2.5x slower`."""
    return _in_words(ratio, "faster", "same speed", "slower")


def faster_text(speedup: Ratio) -> str:
    """Write a measured ratio of speeds in words, and say so where its interval cannot tell faster from slower."""
    text = speed_text(speedup.ratio)
    return f"{text} within noise" if within_noise(speedup) and not text.startswith("same") else text


def within_noise(speedup: Ratio) -> bool:
    """Whether the interval of a speed-up holds 1."""
    return speedup.low <= 1 <= speedup.high


def shape_text(one: Speedup) -> str:
    """Write the shape of a batch: `1x128 tokens`."""
    return f"{one.batch_size}x{one.tokens} tokens"


def quality_text(comparison: Comparison, entry: Entry, task: int) -> str:
    """Write what task number `task` says of a candidate: the change, its paired interval, and whether it is chance."""
    metric = metric_name(comparison, task)
    test = primary_test(entry, task)
    if test is None:
        return f"{metric} {_unpaired(comparison, entry, task)}"
    if not math.isfinite(test.change):
        return f"{metric} {_INCOMPARABLE}, {_values(comparison, entry, task)}"
    return f"{metric} {effect_text(test)} {verdict(test)}"


def metric_name(comparison: Comparison, task: int) -> str:
    """Return the name of a task's primary metric, with the task's where another task's has the same."""
    scores = comparison.base.evaluation.scores
    score = scores[task]
    alone = sum(other.primary == score.primary for other in scores) == 1
    return score.primary if alone else f"{score.primary} ({score.task})"


def primary_test(entry: Entry, task: int) -> PairedTest | None:
    """Return the paired test of a task's primary metric; None for the base, and where nothing could be paired."""
    if entry.change is None:
        return None
    primary = entry.evaluation.scores[task].primary
    return next((test for test in entry.change.tests[task] if test.metric == primary), None)


def effect_text(test: PairedTest) -> str:
    """Write a change with its 95 % interval: `-0.3 points [-1.2, +0.6]`, or as a ratio `x1.043 [1.03, 1.06]`."""
    return f"{change_words(test)} {interval_text(test)}".strip()


def change_words(test: PairedTest, value: float | None = None) -> str:
    """Write the change of a test, or another `value` of its scale: `-0.3 points`, `-0.012`, `x1.043`."""
    number = change_number(test, test.change if value is None else value)
    return f"x{number}" if test.scale == "ratio" else f"{number} points" if test.scale == "points" else number


def interval_text(test: PairedTest) -> str:
    """Write the 95 % interval of a change: `[-1.2, +0.6]`; empty where the sample cannot tell one."""
    if test.low is None or test.high is None:
        return ""
    for digits in (3, 4, 5):
        low, high = (change_number(test, end, digits=digits) for end in (test.low, test.high))
        if low != high or test.low == test.high:
            break
    return f"[{low}, {high}]"


def change_number(test: PairedTest, value: float, *, digits: int = 4) -> str:
    """Write a change, or an end of its interval, as a bare number in the test's own scale."""
    if test.scale == "points":
        return f"{100 * value:+.1f}".replace("-0.0", "+0.0")
    if test.scale == "difference":
        return f"{value:+#.{digits - 1}g}".rstrip(".")
    return f"{value:#.{digits}g}".rstrip(".") if value < 1000 else count_text(value)


def verdict(test: PairedTest) -> str:
    """Say whether a change is more than chance, by the p-value corrected for the number of candidates.

    What is no number (a correlation where all answers are alike, a ratio to 0) is neither.
    """
    if not math.isfinite(test.change):
        return _INCOMPARABLE
    if test.p_holm < SIGNIFICANT:
        return "more than chance"
    return "within chance"


def gain(entry: Entry, task: int) -> bool | None:
    """Whether a candidate is better than the base by more than chance (True), worse (False), or neither (None)."""
    test = primary_test(entry, task)
    return None if test is None else better(test, lower_is_better=not entry.evaluation.scores[task].higher_is_better)


def better(test: PairedTest, *, lower_is_better: bool) -> bool | None:
    """Whether a change is for the better (True), for the worse (False), or within chance (None)."""
    if test.p_holm >= SIGNIFICANT:
        return None
    return (test.change > (1 if test.scale == "ratio" else 0)) != lower_is_better


def collapses(entry: Entry) -> list[str]:
    """Return, in words, the signs that a model no longer answers at all."""
    found = [warning for score in entry.evaluation.scores for warning in score.warnings]
    if entry.change is not None:
        found += [one.collapse for one in entry.change.fidelity if one is not None and one.collapse]
    signs = (text.partition(":")[2].strip() or text for text in found if text.startswith(_COLLAPSE))
    return list(dict.fromkeys(signs))


def notes(comparison: Comparison) -> list[str]:
    """Return what is said beside the numbers: collapse, failed gates, no speed-up and why, zeros that save nothing."""
    found = [f"{entry.name}: {_COLLAPSE}: {text}." for entry in comparison.entries for text in collapses(entry)]
    warned: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for text in (text for score in entry.evaluation.scores for text in score.warnings):
            if not text.startswith(_COLLAPSE):
                warned.setdefault(text, []).append(entry.name)
    for text, names in warned.items():
        who = "all models" if len(names) == len(comparison.entries) else ", ".join(names)
        found.append(f"{who}: {text}.")
    for entry in comparison.candidates:
        if entry.report is not None:
            found += [f"{entry.name}: {text}." for text in entry.report.failed()]
        found += [*_speed_notes(comparison, entry), *_size_notes(entry)]
    for score in comparison.base.evaluation.scores:
        interval = score.intervals.get(score.primary)
        if interval and score.fraction and (interval[1] - interval[0]) / 2 > _WIDE_INTERVAL:
            half = 100 * (interval[1] - interval[0]) / 2
            found.append(
                f"The {score.primary} rests on {len(score.examples)} examples, which tells it to about "
                f"±{half:.0f} points; use more for a finer comparison."
            )
    return found


def evidence(comparison: Comparison) -> list[str]:
    """Return one line for each candidate and task: the change, and what the test of it rests on."""
    found = []
    for entry in comparison.candidates:
        assert entry.change is not None
        for task, flip in enumerate(entry.change.flips):
            test = primary_test(entry, task)
            if test is None or (flip is not None and flip.right_to_wrong + flip.wrong_to_right == 0):
                continue
            if not math.isfinite(test.change):
                found.append(f"{entry.name}: {quality_text(comparison, entry, task)}.")
                continue
            basis = (
                f"{flip.right_to_wrong} answers lost, {flip.wrong_to_right} won of {flip.examples}"
                if flip is not None
                else f"{test.units} independent units"
            )
            found.append(
                f"{entry.name}: {metric_name(comparison, task)} {effect_text(test)} is {verdict(test)} ({basis}; "
                f"{test.method}, p = {p_text(test.p_value)}, after Holm {p_text(test.p_holm)})."
            )
    return found


def p_text(value: float) -> str:
    """Write a p-value: two digits, and no more than anyone can mean.

    Example:
        >>> p_text(0.0312), p_text(1.0), p_text(7e-84)
        ('0.031', '1', '<0.0001')
    """
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"


def _unpaired(comparison: Comparison, entry: Entry, task: int) -> str:
    ours, theirs = comparison.base.evaluation.scores[task], entry.evaluation.scores[task]
    return f"{change_text(theirs.value, ours.value, fraction=theirs.fraction)} (not paired)"


def _values(comparison: Comparison, entry: Entry, task: int) -> str:
    ours, theirs = comparison.base.evaluation.scores[task].value, entry.evaluation.scores[task].value
    return f"it is {theirs:.4g}, the base's {ours:.4g}"


def _in_words(ratio: float, more: str, same: str, less: str) -> str:
    if abs(ratio - 1) < _SAME:
        return same
    return f"{ratio_text(ratio)} {more}" if ratio > 1 else f"{ratio_text(1 / ratio)} {less}"


def _speed_notes(comparison: Comparison, entry: Entry) -> list[str]:
    assert entry.change is not None
    if not entry.change.faster:
        return []
    device = "CPU" if entry.evaluation.latency[0].device == "cpu" else "device"
    slower = [one for one in entry.change.faster if one.high < 1 and one.ratio < 1 - _SAME]
    faster = [one for one in entry.change.faster if one.low > 1 and one.ratio > 1 + _SAME]
    if slower:
        where = " and ".join(f"{ratio_text(one.ratio)} at {shape_text(one)}" for one in slower)
        said = f"{entry.name} is slower than {comparison.base.name} on this {device}: {where}"
    elif not faster:
        said = f"{entry.name} is no faster than {comparison.base.name} on this {device}"
    else:
        return []
    reasons = why_no_faster(comparison, entry)
    return [f"{said}; {'; '.join(reasons)}." if reasons else f"{said}."]


def _size_notes(entry: Entry) -> list[str]:
    assert entry.change is not None
    size = entry.evaluation.size
    zeros = 1 - size.nonzero / size.parameters if size.parameters else 0.0
    if zeros < _MANY_ZEROS or entry.change.smaller_on_disk > 1 + _SAME:
        return []
    return [f"{entry.name} has {zeros:.0%} zeros, which its dense file stores like any other number: it is no smaller."]
