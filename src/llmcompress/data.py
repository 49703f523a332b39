"""Texts and labels from wherever the user has them, as a list of `Example`, and their tokens.

One loader serves training, calibration and evaluation: Python lists, dicts, `datasets` objects, CSV, TSV, JSONL and TXT
files, and names of data sets on the Hugging Face hub.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MissingInputError
from .questions import read_questions, unfold
from .sentences import Sentence, class_names, read_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text: from character `start` up to, not including, `end`; empty where none does."""

    start: int
    end: int


Label = int | float | str | tuple[int | str, ...] | Span

_TEXT = ("text", "sentence", "sentence1", "question1", "premise", "content", "review")
_PAIR = ("pair", "text_pair", "sentence2", "question2", "hypothesis")
_LABEL = ("label", "labels", "score", "class", "target")
# Columns of other tasks: a table that names one of them has a header.
_OTHER = ("question", "context", "prompt", "reference", "tokens", "choices", "answer", "answers", "source", "summary")


@dataclass(frozen=True)
class Example:
    """One text (or pair of texts) with its label, if it has one.

    Attributes:
        text: the text, or the first of a pair; a question.
        pair: the second text of a pair, or None; what a text is to be rewritten as; the context of a question.
        label: a class index, a class name, a real-valued score, or None; a tuple for a set of classes (indices or
            names, or 0 and 1 for every class) and for tags (one a word); for a question its answer, a text or a `Span`
            of the context.
        words: the words of the text where it comes cut into them, as it does where each has a tag.
    """

    text: str
    pair: str | None = None
    label: Label | None = None
    words: tuple[str, ...] | None = None


def load_examples(source: Any, *, split: str = "train", name: str = "data") -> list[Example]:
    """Read examples from a list, a `datasets` object, a file, or a data set on the hub.

    Args:
        source: a sequence of strings, of `(text, label)` tuples, of `Example`, of dicts (columns `text`/`sentence`/...,
            `text_pair`/`sentence2`/..., `label`; or `tokens`/`words` and `tags`/`ner_tags`/...; or `question`,
            `context` and `answers`, nested as SQuAD is or not); a `datasets.Dataset`; a path to `.csv`, `.tsv`,
            `.jsonl` or `.txt` (tables may lack a header: text first, label last); or the name of a hub data set.
        split: which split of a hub data set or a `DatasetDict`.
        name: what to call the argument in messages.

    Raises:
        MissingInputError: nothing was passed, or it holds no example.
        ConfigError: a row has no text, or the file's kind is unknown.

    Example:
        >>> load_examples([("good", 1), {"sentence": "bad", "label": 0}])[1]
        Example(text='bad', pair=None, label=0, words=None)
    """
    rows = load_rows(source, split=split, name=name)
    table = source[split] if isinstance(source, Mapping) and split in source else source
    if isinstance(rows[0], Mapping) and (
        {"question", "context"} <= set(rows[0]) or {"paragraphs", "data"} & set(rows[0])
    ):
        return _questions(rows, name)
    tags = class_names(getattr(table, "features", None))
    return [_example(row, index, name, tags) for index, row in enumerate(rows)]


def load_rows(source: Any, *, split: str = "train", name: str = "data") -> list[Any]:
    """Read rows as they are: dicts, tuples or texts, for tasks whose columns are their own.

    Args:
        source: as for `load_examples`.
        split: which split of a hub data set or a `DatasetDict`.
        name: what to call the argument in messages.

    Raises:
        MissingInputError: nothing was passed, or it holds no row.
        ConfigError: the file's kind is unknown, or there is no such split.

    Example:
        >>> load_rows({"test": [{"question": "2 + 2?", "answer": "4"}]}, split="test")
        [{'question': '2 + 2?', 'answer': '4'}]
    """
    if source is None:
        raise MissingInputError(f"{name} is missing; pass texts, rows, a file, or a datasets object.")
    if isinstance(source, (str, Path)):
        source = _read(source, split, name)
    elif isinstance(source, Mapping):
        if split not in source:
            raise ConfigError(f"{name} has no split {split!r}; it has: {', '.join(map(str, source))}.")
        source = source[split]
    rows = list(source)
    if not rows:
        raise MissingInputError(f"{name} is empty; pass at least one example.")
    return rows


def encode(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> list[dict[str, list[int]]]:
    """Tokenise each example by itself, unpadded, cut to `max_length` tokens.

    Returns:
        A dict of `input_ids`, `attention_mask` (and `token_type_ids` where the tokenizer has them) for each example.
    """
    rows = list(examples)
    texts = [row.text for row in rows]
    pairs = [row.pair or "" for row in rows] if any(row.pair is not None for row in rows) else None
    encoded = tokenizer(texts, pairs, truncation=max_length is not None, max_length=max_length, padding=False)
    return [{key: encoded[key][i] for key in encoded} for i in range(len(rows))]


def token_stream(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, join: str = "\n\n") -> list[int]:
    """Join the texts and tokenise them once, without special tokens: the stream that windows are cut from."""
    text = join.join(example.text for example in examples)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_labels(model: PreTrainedModel, examples: Sequence[Example], *, regression: bool = False) -> list[int | float]:
    """Return the label of each example as a classifier wants it: a class index, or for regression a real number.

    Args:
        model: its config names the classes.
        examples: each has a label.
        regression: whether the head puts out a real number.

    Raises:
        ConfigError: a label is not one of the model's classes, or for regression no number.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> read_labels(tiny_model("bert"), [Example("good", label="LABEL_1"), Example("bad", label=0)])
        [1, 0]
    """
    names = {str(name): int(index) for name, index in (model.config.label2id or {}).items()}
    labels: list[int | float] = []
    for index, example in enumerate(examples):
        label = example.label
        if regression:
            if not isinstance(label, (int, float)) or not math.isfinite(label):
                raise ConfigError(f"data[{index}].label must be a finite number for a regression head, got {label!r}.")
            labels.append(float(label))
            continue
        number = names.get(label) if isinstance(label, str) else label
        # The range first: what is in it is finite, and can be made an integer.
        if not isinstance(number, (int, float)) or not 0 <= number < model.config.num_labels or int(number) != number:
            raise ConfigError(
                f"data[{index}].label must be a class of {type(model).__name__} (0 to {model.config.num_labels - 1}, "
                f"or one of {', '.join(list(names)[:8])}), got {label!r}."
            )
        labels.append(int(number))
    return labels


def find_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, who: str
) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or else the one in the folder that `model` was loaded from.

    Raises:
        MissingInputError: there is neither; the message names `who` needs it.
    """
    if tokenizer is not None:
        return tokenizer
    folder = Path(getattr(model.config, "_name_or_path", "") or "missing")
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    raise MissingInputError(
        f"{who} needs a tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...) "
        f"(the model does not come from a local folder that holds one)."
    )


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return how many tokens the model can take, or None where neither model nor tokenizer sets a limit."""
    config = model.config.get_text_config()
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin start counting positions behind the padding index, and lose those rows.
        table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
        offset = getattr(table, "padding_idx", None)
        limits.append(positions - offset - 1 if offset is not None else positions)
    if tokenizer is not None and 0 < tokenizer.model_max_length < 10**9:
        limits.append(tokenizer.model_max_length)
    return min(limits) if limits else None


def _example(row: Any, index: int, name: str, tags: tuple[str, ...] | None) -> Example:
    if isinstance(row, Example):
        return row
    if isinstance(row, str):
        return Example(row)
    if isinstance(row, Mapping):
        text, pair, label = (_first(row, columns) for columns in (_TEXT, _PAIR, _LABEL))
        if isinstance(text, str):
            return Example(text, pair if isinstance(pair, str) else None, _label(label))
        words = row.get("tokens", row.get("words"))
        if words is not None and label is None and not {"tags", "ner_tags", "pos_tags"} & set(row):
            return Example(" ".join(words), words=tuple(words))
        if words is not None:
            return _tagged(read_sentence(row, f"{name}[{index}]", tags))
        raise ConfigError(
            f"{name}[{index}] must have a text in one of the columns {', '.join(_TEXT)}, got {sorted(row)}."
        )
    if isinstance(row, Sequence) and row and isinstance(row[0], str):
        if len(row) == 2:
            return Example(row[0], None, _label(row[1]))
        if len(row) == 3:
            return Example(row[0], row[1], _label(row[2]))
    if isinstance(row, Sequence) and len(row) == 2 and isinstance(row[0], Sequence):
        return _tagged(read_sentence(row, f"{name}[{index}]", tags))
    raise ConfigError(f"{name}[{index}] must be a text, (text, label), (text, pair, label) or a dict, got {row!r:.80}.")


def _label(label: Any) -> Any:
    return tuple(label) if isinstance(label, Sequence) and not isinstance(label, str) else label


def _tagged(sentence: Sentence) -> Example:
    return Example(" ".join(sentence.words), None, sentence.tags, sentence.words)


def _questions(rows: Sequence[Any], name: str) -> list[Example]:
    """Read questions with their contexts; those without a column of answers have no label."""
    flat = list(unfold(rows))
    bare = [isinstance(row, Mapping) and not {"answer", "answers"} & set(row) for row in flat]
    questions = read_questions(
        [{**row, "answers": []} if no else row for row, no in zip(flat, bare, strict=True)], name
    )
    examples = []
    for index, (question, no) in enumerate(zip(questions, bare, strict=True)):
        first = question.answers[0] if question.answers else ""
        start = question.start if question.start is not None else question.context.find(first)
        if question.context[start : start + len(first)] != first or start < 0:
            raise ConfigError(f"{name}[{index}] must have an answer that stands in its context, got {first!r:.80}.")
        label = None if no else Span(start, start + len(first)) if first else Span(0, 0)
        examples.append(Example(question.question, question.context, label))
    return examples


def _first(row: Mapping[str, Any], columns: Iterable[str]) -> Any:
    lowered = {str(key).lower(): value for key, value in row.items()}
    return next((lowered[column] for column in columns if column in lowered), None)


def _read(source: str | Path, split: str, name: str) -> Iterable[Any]:
    path = Path(source)
    if path.is_file():
        kind = path.suffix.lower()
        if kind in {".csv", ".tsv"}:
            return _read_table(path, "\t" if kind == ".tsv" else ",", name)
        if kind in {".jsonl", ".json"}:
            return _read_json(path, name)
        if kind == ".txt":
            return [text for text in _decoded(path, name).replace("\r\n", "\n").split("\n\n") if text.strip()]
        raise ConfigError(f"{name} must be a .csv, .tsv, .jsonl, .json or .txt file, got {path.name!r}.")
    if path.suffix.lower() in {".csv", ".tsv", ".jsonl", ".json", ".txt"}:
        raise MissingInputError(f"{name}: there is no file {str(path)!r}.")
    import datasets

    try:
        return datasets.load_dataset(str(source), split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MissingInputError(
            f"{name}: there is no file and no hub data set {str(source)!r} with a split {split!r} that can be read; "
            f"pass the path of a .csv, .tsv, .jsonl, .json or .txt file, or look at the name. datasets says: {reason}"
        ) from error


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
        return [
            {key: _number(value) if key in _LABEL else value for key, value in zip(header, row, strict=True)}
            for _, row in rows[1:]
        ]
    return [row[0] if len(row) == 1 else (*row[:-1], _number(row[-1])) for _, row in rows]


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
    return any(cell.strip() in (*_TEXT, *_LABEL, *_OTHER) for cell in cells)


def _number(text: str) -> Label:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
