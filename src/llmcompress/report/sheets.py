"""The tables of a report: cells with a value, what stands small beside it, and what a column is sorted by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.table import Table
from ..evaluation.units import (
    bytes_text,
    change_text,
    count_text,
    milliseconds_text,
    ratio_text,
    score_text,
)
from .findings import (
    change_words,
    gain,
    interval_text,
    metric_name,
    primary_test,
    within_noise,
)

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry
    from ..evaluation.turns import Ratio


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: the value.
        small: what it is compared with the base, in few words.
        note: more of the same, where there is room: an interval.
        sort: what the column is sorted by; None sorts by the text.
        good: whether `small` tells of a gain (True) or a loss (False).
    """

    text: str
    small: str = ""
    note: str = ""
    sort: float | None = None
    good: bool | None = None

    @property
    def plain(self) -> str:
        """The value with `small` in parentheses."""
        return f"{self.text} ({self.small})" if self.text and self.small else self.text or self.small


@dataclass(frozen=True)
class Sheet:
    """A table with a title and a line that says how to read it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    about: str = ""

    def table(self) -> Table:
        """Return it as text: `small` in parentheses, notes left out."""
        return Table(self.header, [[cell.plain for cell in row] for row in self.rows])


def summary(comparison: Comparison) -> Sheet:
    """Return one row a model: scores, size, weights, latency, throughput, each with its ratio to the base."""
    base = comparison.base.evaluation
    tasks = range(len(base.scores))
    header = ["model", *(metric_name(comparison, task) for task in tasks), "on disk", "weights, non-zero"]
    if base.latency:
        first, last = base.latency[0], base.latency[-1]
        header += [f"latency {first.batch_size}x{first.tokens}", f"tokens/s at {last.batch_size}x{last.tokens}"]
    if base.generation:
        header.append("new token")
    if base.memory:
        header.append("peak memory")
    return Sheet("Side by side", tuple(header), tuple(_summary_row(comparison, one) for one in comparison.entries))


def score_cell(comparison: Comparison, entry: Entry, task: int) -> Cell:
    """Return a primary score with its change from the base, and as note the interval of that change (or of a base)."""
    score = entry.evaluation.scores[task]
    text = score_text(score.value, fraction=score.fraction)
    if entry.change is None:
        ends = score.intervals.get(score.primary)
        note = f"[{', '.join(score_text(end, fraction=score.fraction) for end in ends)}]" if ends else ""
        return Cell(text, note=note, sort=score.value)
    test = primary_test(entry, task)
    base = comparison.base.evaluation.scores[task]
    if test is None:
        return Cell(text, change_text(score.value, base.value, fraction=score.fraction), sort=score.value)
    return Cell(text, change_words(test), interval_text(test), score.value, gain(entry, task))


def _summary_row(comparison: Comparison, entry: Entry) -> tuple[Cell, ...]:
    found, change = entry.evaluation, entry.change
    row = [Cell(entry.name), *(score_cell(comparison, entry, task) for task in range(len(found.scores)))]
    row.append(
        _ratio_cell(
            bytes_text(found.size.disk_bytes), found.size.disk_bytes, change.smaller_on_disk if change else None
        )
    )
    fewer = ratio_words(change.fewer_weights if change else None, "fewer")
    row.append(Cell(count_text(found.size.nonzero), fewer, sort=found.size.nonzero))
    if found.latency:
        for latency, faster in ((0, 0), (-1, -1)):
            one = found.latency[latency]
            speedup = change.faster[faster] if change else None
            text, sort = (
                (milliseconds_text(one.median_ms), one.median_ms)
                if latency == 0
                else (count_text(one.tokens_per_second), one.tokens_per_second)
            )
            note = f"[{speedup.low:.2f}, {speedup.high:.2f}]" if speedup else ""
            good = faster_than_chance(speedup)
            row.append(Cell(text, ratio_words(speedup.ratio if speedup else None, "faster"), note, sort, good))
    if found.generation:
        written, gained = found.generation[0], change.generation[0].token if change else None
        note = f"[{gained.low:.2f}, {gained.high:.2f}]" if gained else ""
        small = ratio_words(gained.ratio if gained else None, "faster")
        row.append(Cell(milliseconds_text(written.token_ms), small, note, written.token_ms, faster_than_chance(gained)))
    if found.memory:
        peak = max(found.memory.load_peak_bytes, found.memory.inference_peak_bytes)
        row.append(Cell(bytes_text(peak), sort=peak))
    return tuple(row)


def _ratio_cell(text: str, sort: float, smaller: float | None) -> Cell:
    good = None if smaller is None or ratio_text(smaller) == "1.0x" else smaller > 1
    return Cell(text, ratio_words(smaller, "smaller"), sort=sort, good=good)


def ratio_words(ratio: float | None, word: str) -> str:
    """Write the ratio to the base, with `word` only where it is true: "0.41x faster" would read as a gain."""
    if ratio is None:
        return ""
    return f"{ratio_text(ratio)} {word}" if ratio_text(ratio) != "1.0x" and ratio > 1 else ratio_text(ratio)


def faster_than_chance(speedup: Ratio | None) -> bool | None:
    """Whether a model is faster (True) or slower (False) by more than chance, and by as much as the digits show."""
    if speedup is None or within_noise(speedup) or ratio_text(speedup.ratio) == "1.0x":
        return None
    return speedup.ratio > 1
