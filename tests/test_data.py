"""Files of texts and labels: what is read as it is meant, and what is refused with its line and the way out."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path

import numpy as np
import pytest

import llmcompress as lc
from llmcompress.class_labels import ClassIndex, by_class_names, read_labels
from llmcompress.data import Example, encode, load_examples, load_rows
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
        ("a.csv", "id,body\n1,so dull\n2,a good film\n", r"a\.csv must name the column of its texts text or sentence"),
        ("a.csv", "body,stars\nso dull,1\na good film,5\n", r"got \['body', 'stars'\] as its first line"),
        ("a.csv", "1,so dull\n2,a good film\n", r"a\.csv must have texts in its first column .* got numbers, '1'"),
        ("a.csv", "text,text,label\na,b,1\n", r"a\.csv must have one column of each name, got 'text' twice"),
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


# --- what is no file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["the cat sat on the mat. " * 300, "the cat\nsat", "\u732b" * 5000, "a\0 b"], ids=repr
)
@pytest.mark.parametrize("load", [load_examples, lc.TokenClassification, lc.LanguageModeling])
def test_a_text_is_no_name_and_is_to_stand_in_a_list(load, source: str) -> None:
    with pytest.raises(ConfigError, match=r"got a text, .*; pass it in a list, \[text\]"):
        load(source)


@pytest.mark.parametrize("load", [load_examples, lc.TokenClassification, lc.MultipleChoice])
def test_what_holds_no_rows_is_named(load) -> None:
    with pytest.raises(ConfigError, match="must be texts, rows, a file, or a datasets object, got 5"):
        load(5)


@pytest.mark.parametrize("row", [("a", 5, 1), {"text": "a", "pair": 5}, {"text": "a", "hypothesis": ["b"]}])
def test_the_second_of_a_pair_is_a_text(row) -> None:
    with pytest.raises(ConfigError, match=r"films\[1\] must have a text as the second of its pair, got"):
        load_examples(["x", row], name="films")
    assert load_examples([("a", None, 1), {"text": "a", "pair": None}])[1] == Example("a")


def test_a_data_frame_is_read_by_its_rows() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a good film", "so dull"], "label": [1, 0]})
    assert load_examples(frame) == FILMS
    assert load_rows({"test": frame}, split="test")[0] == {"text": "a good film", "label": 1}
    assert load_examples(frame["text"]) == [Example("a good film"), Example("so dull")]


def test_labels_of_numpy_are_numbers() -> None:
    examples = load_examples([("a", np.int64(1)), ("b", np.float32(0.5)), {"text": "c", "label": np.array([0, 1])}])
    assert [example.label for example in examples] == [1, 0.5, (0, 1)]
    assert [type(example.label) for example in examples[:2]] == [int, float]


def test_a_question_with_a_sentence_is_a_pair() -> None:
    # GLUE's QNLI: without the question there is nothing to tell.
    rows = [{"question": "Who sat?", "sentence": "The cat sat.", "label": 0, "idx": 0}]
    assert load_examples(rows) == [Example("Who sat?", "The cat sat.", 0)]


def test_a_text_without_a_pair_stays_one_among_pairs(tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    marks = [("<s>", 2), ("</s>", 3)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=marks
    )
    rows = [Example("a"), Example("b", "c"), Example("d"), Example("e", "")]
    together = encode(rows, tokenizer)
    assert together == [row for one in rows for row in encode([one], tokenizer)]
    assert [len(row["input_ids"]) for row in together] == [3, 5, 3, 4]


# --- names of classes ------------------------------------------------------------------------------------------------


def nli(*names: str):
    """A model that calls its classes so."""
    model = tiny_model("bert")
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def of_columns(**columns):
    """A data set whose labels have names."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=columns["names"])})
    labels = columns["labels"]
    return Dataset.from_dict({"text": ["x"] * len(labels), "label": labels}, features=features)


def test_a_class_index_keeps_its_name_in_copies() -> None:
    label = ClassIndex(2, "spam")
    for one in (copy.deepcopy(label), pickle.loads(pickle.dumps(label))):
        assert one == 2
        assert one.name == "spam"
    assert repr(label) == "2"


def test_names_that_a_data_set_declares_go_before_its_indices() -> None:
    data = of_columns(names=["entailment", "neutral", "contradiction"], labels=[0, 1, 2, -1])
    examples = load_examples(data)
    assert [example.label for example in examples] == [0, 1, 2, -1]
    model = nli("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    assert [one.label for one in by_class_names(examples, model)] == [2, 1, 0, -1]
    assert read_labels(nli("neutral", "entailment", "contradiction"), examples[:2]) == [1, 0]
    # A model that has no names, or others, counts.
    assert by_class_names(examples, tiny_model("bert")) == examples
    # One name is known and counted alike: the others may be spelt otherwise, or be out of range, which is told later.
    assert by_class_names(examples, nli("yes", "neutral", "no")) == examples
    with pytest.raises(
        ConfigError, match=r"got 'entailment', 'contradiction' beside 'neutral', which config\.label2id knows: yes"
    ):
        by_class_names(examples, nli("yes", "no", "neutral"))


def test_training_reads_the_names_too() -> None:
    from llmcompress.inputs import check_inputs

    examples, _ = check_inputs(nli("b", "a"), [], of_columns(names=["a", "b"], labels=[0, 1]), None, None, False)
    assert [example.label for example in examples] == [1, 0]
    assert all(type(example.label) is int for example in examples)


def test_digits_of_a_table_are_a_name_where_the_model_has_a_class_of_this_name(tmp_path: Path) -> None:
    stars = nli("1", "2", "3")
    for file in ("text,label\naa,1\nbb,3\n", "aa,1\nbb, 3\n"):
        examples = load_examples(written(tmp_path, "stars.csv", file))
        assert [example.label for example in examples] == [1, 3]
        assert [one.label for one in by_class_names(examples, stars)] == [0, 2]
        assert [one.label for one in by_class_names(examples, nli("bad", "good"))] == [1, 3]


def test_only_plain_numbers_are_numbers(tmp_path: Path) -> None:
    cells = ["1_000", "nan", "infinity", "1e-2", "-.5", "+3", "1.", "0x1"]
    rows = load_rows(written(tmp_path, "a.csv", "text,label\n" + "".join(f"x,{cell}\n" for cell in cells)))
    assert [row["label"] for row in rows] == ["1_000", "nan", "infinity", 0.01, -0.5, 3, 1.0, "0x1"]
