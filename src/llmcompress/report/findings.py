"""What a comparison says in words: one headline a candidate, and the notes that an honest reader needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.units import change_text, ratio_text, score_text

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry
    from ..evaluation.latency import Speedup

# Ratios nearer to one than this are told as "the same": it is what the tables' digits can show.
_SAME = 0.05
# Above this share of zeros a model counts as pruned, and the reader is told what zeros do not save.
_MANY_ZEROS = 0.05
SIGNIFICANT = 0.05
"""A difference with a smaller p-value counts as more than chance."""

# A 95 % interval wider than this (in points, to one side) cannot tell good from bad compression.
_WIDE_INTERVAL = 0.03


def headline(comparison: Comparison, entry: Entry) -> str:
    """Return for instance "3.9x smaller, 2.4x faster, accuracy -0.3 points"."""
    if entry.change is None:
        return "the base"
    parts = [size_text(entry.change.smaller_on_disk)]
    if entry.change.faster:
        parts.append(speed_text(entry.change.faster[0].ratio))
    for ours, theirs in zip(comparison.base.evaluation.scores, entry.evaluation.scores, strict=True):
        parts.append(f"{theirs.primary} {change_text(theirs.value, ours.value, fraction=theirs.fraction)}")
    return ", ".join(parts)


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


def notes(comparison: Comparison) -> list[str]:
    """Return what must be said beside the numbers: no speed-up, zeros that save nothing, differences within chance."""
    warned: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for text in (text for score in entry.evaluation.scores for text in score.warnings):
            warned.setdefault(text, []).append(entry.name)
    found = []
    for text, names in warned.items():
        who = "all models" if len(names) == len(comparison.entries) else ", ".join(names)
        found.append(f"{who}: {text}.")
    for entry in comparison.candidates:
        found += [*_speed_notes(comparison, entry), *_size_notes(entry), *_quality_notes(comparison, entry)]
    for score in comparison.base.evaluation.scores:
        interval = score.intervals.get(score.primary)
        if interval and (interval[1] - interval[0]) / 2 > _WIDE_INTERVAL:
            half = 100 * (interval[1] - interval[0]) / 2
            found.append(
                f"The {score.primary} rests on {len(score.examples)} examples, which tells it to about "
                f"±{half:.0f} points; use more for a finer comparison."
            )
    return found


def _in_words(ratio: float, more: str, same: str, less: str) -> str:
    if abs(ratio - 1) < _SAME:
        return same
    return f"{ratio_text(ratio)} {more}" if ratio > 1 else f"{ratio_text(1 / ratio)} {less}"


def _speed_notes(comparison: Comparison, entry: Entry) -> list[str]:
    assert entry.change is not None
    device = "CPU" if entry.evaluation.latency and entry.evaluation.latency[0].device == "cpu" else "device"
    slower = [one for one in entry.change.faster if one.high < 1 and one.ratio < 1 - _SAME]
    found = []
    if slower:
        where = " and ".join(f"{ratio_text(one.ratio)} at {shape_text(one)}" for one in slower)
        found.append(
            f"{entry.name} is slower than {comparison.base.name} on this {device}: {where} of the base's speed."
        )
    elif entry.change.faster and not any(one.low > 1 and one.ratio > 1 + _SAME for one in entry.change.faster):
        found.append(f"{entry.name} is no faster than {comparison.base.name} on this {device}.")
    return found


def shape_text(one: Speedup) -> str:
    """Write the shape of a batch: `1x128 tokens`."""
    return f"{one.batch_size}x{one.tokens} tokens"


def _size_notes(entry: Entry) -> list[str]:
    assert entry.change is not None
    size = entry.evaluation.size
    zeros = 1 - size.nonzero / size.parameters if size.parameters else 0.0
    if zeros < _MANY_ZEROS or entry.change.smaller_on_disk > 1 + _SAME:
        return []
    return [
        f"{entry.name} has {zeros:.0%} zeros, which its dense file stores and its dense kernels multiply like any "
        "other number: by themselves they save neither bytes nor time."
    ]


def _quality_notes(comparison: Comparison, entry: Entry) -> list[str]:
    assert entry.change is not None
    found = []
    scores = zip(entry.change.flips, comparison.base.evaluation.scores, entry.evaluation.scores, strict=True)
    for flip, ours, theirs in scores:
        if flip is None:
            continue
        change = change_text(theirs.value, ours.value, fraction=theirs.fraction)
        lost, won = flip.right_to_wrong, flip.wrong_to_right
        evidence = f"{lost} answers lost, {won} won of {flip.examples}; McNemar p = {flip.p_value:.2g}"
        if flip.p_value < SIGNIFICANT:
            found.append(f"{entry.name}: {theirs.primary} {change} is more than chance ({evidence}).")
        elif lost + won:
            found.append(f"{entry.name}: {theirs.primary} {change} is within chance ({evidence}).")
    return found


def value_text(comparison: Comparison, entry: Entry, task: int) -> str:
    """Write the primary score of task number `task` with its change: `88.2 % (-0.3 points)`."""
    score = entry.evaluation.scores[task]
    text = score_text(score.value, fraction=score.fraction)
    if entry.change is None:
        return text
    base = comparison.base.evaluation.scores[task]
    return f"{text} ({change_text(score.value, base.value, fraction=score.fraction)})"
