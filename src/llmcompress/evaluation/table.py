"""One table, three renderings: a terminal's, Markdown, and a notebook's."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. The first column is aligned left, the others right.

    Cells are text and never markup: each rendering escapes what its format would read as such.

    Example:
        >>> print(Table(("model", "size"), (("a|b", "1 MB"),)).markdown())
        | model | size |
        |:---|---:|
        | a\\|b | 1 MB |
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    def text(self, width: int | None = None) -> str:
        """Draw it with box characters, for a terminal of `width` columns (None: as wide as it needs)."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, title=Text(self.title) if self.title else None, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        # In a notebook rich would display what it only shall draw.
        console = Console(width=width or 500, force_terminal=False, force_jupyter=False, color_system=None)
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().strip("\n").splitlines()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """Write it as a GitHub-flavoured Markdown table."""
        lines = [f"**{_markdown_cell(self.title)}**", ""] if self.title else []
        lines.append(_markdown_row(self.header))
        lines.append("|:---|" + "---:|" * (len(self.header) - 1))
        lines += [_markdown_row(row) for row in self.rows]
        if self.notes:
            lines += ["", self.bullets()]
        return "\n".join(lines)

    def bullets(self) -> str:
        """Write only the notes, as a Markdown list."""
        return "\n".join(f"- {_markdown_cell(note)}" for note in self.notes)

    def html(self) -> str:
        """Write it as an HTML table for a notebook cell."""
        align = ["left"] + ["right"] * (len(self.header) - 1)

        def row(tag: str, cells: Sequence[str]) -> str:
            inner = "".join(
                f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(align, cells, strict=True)
            )
            return f"<tr>{inner}</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "".join(row("td", cells) for cells in self.rows)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<table>{caption}<thead>{row('th', self.header)}</thead><tbody>{body}</tbody></table>"
            f"{f'<ul>{notes}</ul>' if notes else ''}"
        )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |"


def _markdown_cell(cell: str) -> str:
    """Escape what Markdown would read as markup: pipes, tags, emphasis."""
    escaped = cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    for sign in "*_`[]":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
