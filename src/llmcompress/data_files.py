"""Rows of .csv, .tsv, .jsonl, .json and .txt files, and the names of columns that tell a header from a row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .class_labels import ClassIndex
from .errors import ConfigError

TEXT = ("text", "sentence", "sentence1", "question1", "premise", "content", "review")
PAIR = ("pair", "text_pair", "sentence2", "question2", "hypothesis")
LABEL = ("label", "labels", "score", "class", "target")
# A question and a sentence that may answer it (GLUE's QNLI): the question is read first.
ASKED = ("question", "sentence")
# Columns of other tasks: a table that names one of them has a header.
OTHER = ("question", "context", "prompt", "reference", "tokens", "choices", "answer", "answers", "source", "summary")


def read_file(path: Path, name: str) -> list[Any]:
    """Read the rows of a file: dicts where it names its columns, tuples or texts where it does not.

    Args:
        path: of a file that is there.
        name: what to call the argument in messages.

    Raises:
        ConfigError: its kind is none of these, or its content not of its kind.
    """
    kind = path.suffix.lower()
    if kind in {".csv", ".tsv"}:
        return _read_table(path, "\t" if kind == ".tsv" else ",", name)
    if kind in {".jsonl", ".json"}:
        return _read_json(path, name)
    if kind == ".txt":
        return [text for text in _decoded(path, name).replace("\r\n", "\n").split("\n\n") if text.strip()]
    raise ConfigError(f"{name} must be a .csv, .tsv, .jsonl, .json or .txt file, got {path.name!r}.")


def _decoded(path: Path, name: str) -> str:
    """Return what stands in a file of UTF-8, without the byte order mark that Excel writes; line ends as they are."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}: {path.name} must be UTF-8, got the byte 0x{error.object[error.start]:02x} in line {line}; "
            "save the file as UTF-8."
        ) from error


def _read_json(path: Path, name: str) -> list[Any]:
    text = _decoded(path, name)
    if path.suffix.lower() == ".json":
        rows = _parsed(text, 1, path, name)
        return rows if isinstance(rows, list) else [rows]
    # Not `splitlines`: a text may hold U+2028, which JSON does not escape.
    return [_parsed(line, number, path, name) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(text: str, line: int, path: Path, name: str) -> Any:
    """Read JSON that begins in `line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ConfigError(f"{name}: {path.name} is not valid JSON at line {line}: {error.msg}.") from error


class _BareTabs(csv.excel_tab):
    """Tab-separated fields without quoting: sentences of the GLUE tables hold bare quotation marks."""

    quoting = csv.QUOTE_NONE


def _read_table(path: Path, delimiter: str, name: str) -> list[Any]:
    rows = _split_rows(path, delimiter, name)
    if not rows:
        return []
    _, first = rows[0]
    header = [cell.strip().lower() for cell in first]
    named = _names_columns(header)
    other = next((one for one in ";,\t" if len(first) == 1 and _names_columns(header[0].split(one))), None)
    if not named and other is not None:
        raise ConfigError(
            f"{name}: {path.name} must have {delimiter!r} between its columns, got {other!r} in its header "
            f"{first[0]!r:.80}; save it with commas as .csv, or with tabs as .tsv."
        )
    for line, row in rows:
        if len(row) != len(first):
            raise ConfigError(
                f"{name}: {path.name}, line {line} must have {len(first)} columns as the first line has, got "
                f"{len(row)}; {_REMEDY[delimiter]}."
            )
    if named:
        if twice := next((column for column in header if column and header.count(column) > 1), None):
            raise ConfigError(
                f"{name}: {path.name} must have one column of each name, got {twice!r} twice; rename one."
            )
        return [
            {key: _number(value) if key in LABEL else value for key, value in zip(header, row, strict=True)}
            for _, row in rows[1:]
        ]
    _check_bare([row for _, row in rows], path, name)
    return [row[0] if len(row) == 1 else (*row[:-1], _number(row[-1])) for _, row in rows]


def _check_bare(rows: Sequence[Sequence[str]], path: Path, name: str) -> None:
    """Refuse a table without a header that seems to have one, or whose first column seems to hold no texts."""
    first, *rest = rows
    for number, cell in enumerate(first):
        if rest and all(_is_number(row[number]) for row in rest) and not _is_number(cell):
            raise ConfigError(
                f"{name}: {path.name} must name the column of its texts {' or '.join(TEXT[:2])}, got {first!r:.80} "
                "as its first line, which names none though numbers follow; rename it, or take the line out."
            )
    if all(_is_number(row[0]) for row in rows):
        raise ConfigError(
            f"{name}: {path.name} must have texts in its first column where no header says otherwise, got numbers, "
            f"{first[0]!r} in its first line; begin it with a line such as id,text,label."
        )


_REMEDY = {
    ",": 'put a text that holds commas, quotes or line ends in "quotes", and double each quote in it',
    "\t": "take tabs out of the texts, or save it as .csv",
}


def _split_rows(path: Path, delimiter: str, name: str) -> list[tuple[int, list[str]]]:
    """Return the rows of a table that are not empty, each with the line it begins in."""
    text = _decoded(path, name)
    rows = []
    line = 1
    most = csv.field_size_limit()
    reader = csv.reader(io.StringIO(text, newline=""), "excel" if delimiter == "," else _BareTabs, strict=True)
    try:
        csv.field_size_limit(max(most, len(text)))  # a document may be longer than csv's 128 KiB; the limit is global
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{name}: {path.name} is no valid table in the row of line {line}: {error}; {_REMEDY[delimiter]}."
        ) from error
    finally:
        csv.field_size_limit(most)
    return rows


def _names_columns(cells: Iterable[str]) -> bool:
    return any(cell.strip() in (*TEXT, *LABEL, *OTHER) for cell in cells)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _number(text: str) -> int | float | str:
    """Read the label of a table's row: a number where it is one, of which the text is kept if it may name a class."""
    if not _is_number(text):
        return text
    return ClassIndex(int(text), text.strip()) if text.strip().lstrip("+-").isdecimal() else float(text)
