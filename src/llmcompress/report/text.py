"""A comparison as text: for a terminal, in Markdown, and as a notebook's table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.table import Table
from ..evaluation.units import bytes_text, count_text, milliseconds_text, ratio_text, score_text
from .findings import headline, notes, value_text

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry


def to_terminal(comparison: Comparison) -> str:
    """Return headlines, table and notes with box characters."""
    table = summary(comparison)
    return "\n".join(
        [
            *(f"{entry.name}: {headline(comparison, entry)}" for entry in comparison.candidates),
            "",
            table.text(),
            "",
            *(f"- {note}" for note in notes(comparison)),
            f"Measured on {comparison.machine}.",
            *protocol_lines(comparison),
        ]
    )


def to_markdown(comparison: Comparison) -> str:
    """Return headlines, table, notes and protocol in Markdown."""
    escaped = Table(("", ""), (), notes=[f"{e.name}: {headline(comparison, e)}" for e in comparison.candidates])
    remarks = [*notes(comparison), f"Measured on {comparison.machine}.", *protocol_lines(comparison)]
    table = summary(comparison)
    blocks = [escaped.bullets(), Table(table.header, table.rows, notes=remarks).markdown()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_notebook(comparison: Comparison) -> str:
    """Return the table and the notes as HTML for a notebook cell."""
    table = summary(comparison)
    return Table(table.header, table.rows, notes=notes(comparison)).html()


def summary(comparison: Comparison) -> Table:
    """Return one row a model: scores, size, weights, latency, throughput, each with its ratio to the base."""
    base = comparison.base.evaluation
    header = ["model", *(score.primary for score in base.scores), "on disk", "weights, non-zero"]
    if base.latency:
        first, last = base.latency[0], base.latency[-1]
        header += [f"latency {first.batch_size}x{first.tokens}", f"tokens/s at {last.batch_size}x{last.tokens}"]
    if base.memory:
        header.append("peak memory")
    return Table(header, [_row(comparison, entry) for entry in comparison.entries])


def _row(comparison: Comparison, entry: Entry) -> list[str]:
    found, change = entry.evaluation, entry.change
    row = [entry.name, *(value_text(comparison, entry, task) for task in range(len(found.scores)))]
    row.append(bytes_text(found.size.disk_bytes) + _ratio(change.smaller_on_disk if change else None, " smaller"))
    row.append(count_text(found.size.nonzero) + _ratio(change.fewer_weights if change else None, " fewer"))
    if found.latency:
        row.append(
            milliseconds_text(found.latency[0].median_ms)
            + _ratio(change.faster[0].ratio if change else None, " faster")
        )
        row.append(
            count_text(found.latency[-1].tokens_per_second) + _ratio(change.faster[-1].ratio if change else None, "")
        )
    if found.memory:
        row.append(bytes_text(max(found.memory.load_peak_bytes, found.memory.inference_peak_bytes)))
    return row


def _ratio(ratio: float | None, word: str) -> str:
    if ratio is None:
        return ""
    # "0.41x faster" reads as a gain: below one the bare ratio stands, and the notes say it in words.
    return f" ({ratio_text(ratio)}{word if ratio_text(ratio) != '1.0x' and ratio > 1 else ''})"


def protocol_lines(comparison: Comparison) -> list[str]:
    """Return one line a task that says what was done, and one for the timing."""
    lines = []
    for score in comparison.base.evaluation.scores:
        interval = score.intervals.get(score.primary)
        settings = ", ".join(f"{key} {value}" for key, value in score.protocol.items() if value is not None)
        ends = [score_text(end, fraction=score.fraction) for end in interval] if interval else []
        within = f"; base {score.primary} within [{', '.join(ends)}] at 95 %" if ends else ""
        lines.append(f"{score.task}: {settings!s}{within}.".replace("\n", "\\n"))
    if comparison.base.evaluation.latency:
        first = comparison.base.evaluation.latency[0]
        lines.append(
            f"Latency: median of {first.repeats} forward passes after {first.warmup} of warm-up, {first.threads} "
            f"thread(s), {first.device}; the models took turns (ABBA) and ratios are medians over rounds."
        )
    return lines
