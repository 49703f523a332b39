"""Files of texts and labels: what is read as it is meant, and what is refused with its line and the way out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from llmcompress.data import Example, load_examples, load_rows, read_labels
from llmcompress.errors import ConfigError, MissingInputError
from llmcompress.testing import tiny_model

FILMS = [Example("a good film", label=1), Example("so dull", label=0)]


def written(place: Path, name: str, content: str | bytes) -> Path:
    file = place / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("films.csv", "text,label\na good film,1\nso dull,0\n"),
        ("films.csv", "\ufefftext,label\r\n\r\na good film,1\r\nso dull,0\r\n"),
        ("films.csv", "a good film,1\nso dull,0"),
        ("films.csv", "Label, Text\n1,a good film\n0,so dull\n"),
        ("films.tsv", "text\tlabel\na good film\t1\nso dull\t0\n"),
        ("films.jsonl", '\ufeff{"text": "a good film", "label": 1}\r\n\r\n{"text": "so dull", "label": 0}\r\n'),
        ("films.json", '\ufeff[{"text": "a good film", "label": 1},\n{"text": "so dull", "label": 0}]'),
    ],
)
def test_every_kind_of_file_gives_the_same(tmp_path: Path, name: str, content: str) -> None:
    assert load_examples(written(tmp_path, name, content)) == FILMS


def test_txt_is_cut_at_empty_lines_however_its_lines_end(tmp_path: Path) -> None:
    assert load_rows(written(tmp_path, "texts.txt", "\ufeffone\r\nline\r\n\r\ntwo\n\nthree")) == [
        "one\nline",
        "two",
        "three",
    ]


def test_quotes_hold_commas_and_lines_and_are_bare_in_tsv(tmp_path: Path) -> None:
    assert load_rows(written(tmp_path, "a.csv", 'text,label\n"so, ""so""\r\ndull",0\n')) == [
        {"text": 'so, "so"\r\ndull', "label": 0}
    ]
    assert load_rows(written(tmp_path, "a.tsv", 'text\tlabel\n"so" dull\t0\n')) == [{"text": '"so" dull', "label": 0}]


def test_a_text_may_be_long_and_hold_any_line_separator(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (row,) = load_rows(written(tmp_path, "long.csv", f"text,label\n{'long ' * 40_000},1\n"))
    assert len(row["text"]) == 200_000
    assert csv.field_size_limit() == limit
    assert load_rows(written(tmp_path, "a.jsonl", '{"text": "one\u2028two"}\n')) == [{"text": "one\u2028two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\n"two\nlines",1\nso, dull,0\n', r"a\.csv, line 4 must have 2 columns .* got 3; put"),
        ("a.csv", "text,pair,label\ngood,1\n", r"line 2 must have 3 columns .* got 2"),
        ("a.csv", "good,1\nso, dull,0\n", r"line 2 must have 2 columns .* got 3"),
        ("a.tsv", "text\tlabel\nso\tdull\t0\n", r"line 2 must have 2 columns .* got 3; take tabs out"),
        ("a.csv", "text;label\ngood;1\n", r"must have ',' between its columns, got ';' in its header 'text;label'"),
        ("a.csv", "text\tlabel\ngood\t1\n", r"must have ',' between its columns, got '\\t'"),
        ("a.tsv", "text,label\ngood,1\n", r"must have '\\t' between its columns, got ','"),
        ("a.csv", 'text,label\ngood,1\n"so dull,0\nbad,0\n', r"in the row of line 3: unexpected end of data; put"),
        ("a.csv", "text,label\ncaf\u00e9,1\n".encode("latin-1"), r"a\.csv must be UTF-8, .* 0xe9 in line 2; save"),
        ("a.txt", "one\n\ncaf\u00e9".encode("latin-1"), r"a\.txt must be UTF-8, got the byte 0xe9 in line 3"),
        ("a.jsonl", "{}\n\n{\n", r"a\.jsonl is not valid JSON at line 3"),
        ("a.json", "[{},\n{},\n{]", r"a\.json is not valid JSON at line 3"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^films: .*{message}"):
        load_examples(written(tmp_path, name, content), name="films")


def test_what_is_neither_file_nor_hub_data_set_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("nofile", "."):
        with pytest.raises(MissingInputError, match="there is no file and no hub data set") as caught:
            load_examples(source)
        assert repr(source) in str(caught.value)
        assert caught.value.__cause__ is not None


def test_labels_that_are_no_class_or_no_number_are_named() -> None:
    model = tiny_model("bert")
    for label in (float("nan"), float("inf"), 10**400, 0.5, 2, -1, "other"):
        with pytest.raises(ConfigError, match=r"data\[1\].label must be a class of Bert.*, got"):
            read_labels(model, [Example("x", label=1.0), Example("y", label=label)])
    for label in (float("nan"), -float("inf"), "good"):
        with pytest.raises(ConfigError, match=r"data\[0\].label must be a finite number .* got"):
            read_labels(model, [Example("x", label=label)], regression=True)
