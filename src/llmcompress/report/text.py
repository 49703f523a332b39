"""A comparison as text: for a terminal, in Markdown, and as a notebook's table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..evaluation.table import Table
from ..evaluation.units import score_text
from .findings import collapses, evidence, headline, notes
from .sheets import summary

if TYPE_CHECKING:
    from ..comparison import Comparison


def to_terminal(comparison: Comparison) -> str:
    """Return headlines, table and notes with box characters, without colours."""
    return "\n".join(
        [
            *(f"{entry.name}: {headline(comparison, entry)}" for entry in comparison.candidates),
            "",
            summary(comparison).table().text(),
            "",
            *(f"- {note}" for note in _remarks(comparison)),
            f"Measured on {comparison.machine}.",
            *protocol_lines(comparison),
        ]
    )


def to_rich(comparison: Comparison) -> Any:
    """Return the same as something that rich prints in colours, fitted to the width of its console."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    lines = []
    for entry in comparison.candidates:
        style = "bold red" if collapses(entry) else ""
        lines.append(Text.assemble((entry.name, "bold"), ": ", (headline(comparison, entry), style)))
    sheet = summary(comparison)
    table = RichTable(box=box.SIMPLE_HEAD)
    for index, name in enumerate(sheet.header):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
    for row in sheet.rows:
        cells = []
        for cell in row:
            style = "dim" if cell.good is None else "green" if cell.good else "red"
            cells.append(Text.assemble(cell.text, (f"\n{cell.small}", style) if cell.small else ""))
        table.add_row(*cells)
    remarks = [Text(f"- {note}", style="red" if ": collapse:" in note else "") for note in _remarks(comparison)]
    protocol = [Text(f"Measured on {comparison.machine}."), *map(Text, protocol_lines(comparison))]
    for line in protocol:
        line.stylize("dim")
    return Group(*lines, table, *remarks, *protocol)


def to_markdown(comparison: Comparison) -> str:
    """Return headlines, table, notes and protocol in Markdown."""
    headlines = Table(("", ""), (), notes=[f"{e.name}: {headline(comparison, e)}" for e in comparison.candidates])
    remarks = [*_remarks(comparison), f"Measured on {comparison.machine}.", *protocol_lines(comparison)]
    table = summary(comparison).table()
    blocks = [headlines.bullets(), Table(table.header, table.rows, notes=remarks).markdown()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_notebook(comparison: Comparison) -> str:
    """Return the table and the notes as HTML for a notebook cell."""
    table = summary(comparison).table()
    headlines = [f"{entry.name}: {headline(comparison, entry)}" for entry in comparison.candidates]
    return Table(table.header, table.rows, notes=[*headlines, *notes(comparison)]).html()


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


def _remarks(comparison: Comparison) -> list[str]:
    return [*notes(comparison), *evidence(comparison)]
