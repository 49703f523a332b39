"""Texts and labels from wherever the user has them, as a list of `Example`, and their tokens.

One loader serves training, calibration and evaluation: Python lists, dicts, `datasets` objects, CSV, TSV, JSONL and TXT
files, and names of data sets on the Hugging Face hub.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, MissingInputError
from .questions import read_questions, unfold
from .sentences import Sentence, class_names, read_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text: from character `start` up to, not including, `end`; empty where none does."""

    start: int
    end: int


class ClassIndex(int):
    """A class index that the data also has a name for: that of a `datasets` column, or the digits in a table's cell.

    It is read by its name where the model has a class of this name, since the model may count its classes otherwise.

    Example:
        >>> ClassIndex(1, "spam") == 1, ClassIndex(1, "spam").name
        (True, 'spam')
    """

    name: str

    def __new__(cls, index: int, name: str) -> ClassIndex:
        """Put a name to an index."""
        found = super().__new__(cls, index)
        found.name = name
        return found

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        return int(self), self.name  # so that it can be copied


Label = int | float | str | tuple[int | str, ...] | Span

_TEXT = ("text", "sentence", "sentence1", "question1", "premise", "content", "review")
_PAIR = ("pair", "text_pair", "sentence2", "question2", "hypothesis")
_LABEL = ("label", "labels", "score", "class", "target")
# A question and a sentence that may answer it (GLUE's QNLI): the question is read first.
_ASKED = ("question", "sentence")
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
            `text_pair`/`sentence2`/..., `label`; or `question` and `sentence`; or `tokens`/`words` and
            `tags`/`ner_tags`/...; or `question`, `context` and `answers`, nested as SQuAD is or not); a
            `datasets.Dataset` or a pandas `DataFrame`; a path to `.csv`, `.tsv`, `.jsonl` or `.txt` (tables may lack a
            header: text first, label last); or the name of a hub data set.
        split: which split of a hub data set or a `DatasetDict`.
        name: what to call the argument in messages.

    Raises:
        MissingInputError: nothing was passed, or it holds no example.
        ConfigError: a row has no text, the file's kind is unknown, or `source` is none of the above.

    Example:
        >>> load_examples([("good", 1), {"sentence": "bad", "label": 0}])[1]
        Example(text='bad', pair=None, label=0, words=None)
    """
    rows, features = load_table(source, split=split, name=name)
    if isinstance(rows[0], Mapping) and (
        {"question", "context"} <= set(rows[0]) or {"paragraphs", "data"} & set(rows[0])
    ):
        return _questions(rows, name)
    tags, classes = class_names(features), class_names(features, _LABEL)
    return [_example(row, index, name, tags, classes) for index, row in enumerate(rows)]


def load_rows(source: Any, *, split: str = "train", name: str = "data") -> list[Any]:
    """Read rows as they are: dicts, tuples or texts, for tasks whose columns are their own.

    Args:
        source: as for `load_examples`.
        split: which split of a hub data set or a `DatasetDict`.
        name: what to call the argument in messages.

    Raises:
        MissingInputError: nothing was passed, or it holds no row.
        ConfigError: the file's kind is unknown, there is no such split, or `source` holds no rows at all.

    Example:
        >>> load_rows({"test": [{"question": "2 + 2?", "answer": "4"}]}, split="test")
        [{'question': '2 + 2?', 'answer': '4'}]
    """
    return load_table(source, split=split, name=name)[0]


def load_table(source: Any, *, split: str = "train", name: str = "data") -> tuple[list[Any], Any]:
    """Read rows as `load_rows` does, with the features that a `datasets` object declares; None of others."""
    if source is None:
        raise MissingInputError(f"{name} is missing; pass texts, rows, a file, or a datasets object.")
    if isinstance(source, (str, Path)):
        source = _read(source, split, name)
    elif isinstance(source, Mapping):
        if split not in source:
            raise ConfigError(f"{name} has no split {split!r}; it has: {', '.join(map(str, source))}.")
        source = source[split]
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        # What iterates over a DataFrame gets the names of its columns.
        source = source.to_dict("records")
    if not isinstance(source, Iterable):
        raise ConfigError(f"{name} must be texts, rows, a file, or a datasets object, got {source!r:.80}.")
    rows = list(source)
    if not rows:
        raise MissingInputError(f"{name} is empty; pass at least one example.")
    return rows, getattr(source, "features", None)


def encode(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> list[dict[str, list[int]]]:
    """Tokenise each example by itself, unpadded, cut to `max_length` tokens.

    Returns:
        A dict of `input_ids`, `attention_mask` (and `token_type_ids` where the tokenizer has them) for each example.
    """
    rows = list(examples)
    found: list[dict[str, list[int]]] = [{} for _ in rows]
    # A text by itself is no pair with an empty text, which would end in one more mark.
    alone = [number for number, row in enumerate(rows) if row.pair is None]
    paired = [number for number, row in enumerate(rows) if row.pair is not None]
    for numbers, seconds in ((alone, None), (paired, [rows[number].pair for number in paired])):
        if not numbers:
            continue
        firsts = [rows[number].text for number in numbers]
        encoded = tokenizer(
            firsts, seconds, truncation=max_length is not None, max_length=max_length, padding=False, verbose=False
        )
        for place, number in enumerate(numbers):
            found[number] = {key: encoded[key][place] for key in encoded}
    return found


def token_stream(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, join: str = "\n\n") -> list[int]:
    """Join the texts and tokenise them once, without special tokens: the stream that windows are cut from."""
    text = join.join(example.text for example in examples)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def class_indices(model: PreTrainedModel) -> dict[str, int]:
    """Return the index of each class by its name, as the model's config has them."""
    return {str(name): int(index) for name, index in (getattr(model.config, "label2id", None) or {}).items()}


def by_class_names(examples: Sequence[Example], model: PreTrainedModel) -> list[Example]:
    """Return `examples` with every `ClassIndex` as the model counts its classes, where it has classes of these names.

    Upper and lower case are one. Where the model knows none of the names, or counts those it knows as the data does,
    the indices stay as they are.

    Raises:
        ConfigError: the model knows some of the names and counts them otherwise, and others it does not know.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> model.config.label2id = {"SPAM": 0, "HAM": 1}
        >>> by_class_names([Example("Dear sir", label=ClassIndex(1, "spam"))], model)[0].label
        0
    """
    used, known = _used_names(examples, model)
    if all(known[name] == used[name] for name in known):
        return [_mapped(one, int) for one in examples]
    if unknown := [name for name in used if name not in known]:
        raise ConfigError(
            f"data must name its classes as {type(model).__name__} does, got {', '.join(map(repr, unknown))} beside "
            f"{', '.join(map(repr, known))}, which config.label2id knows: {', '.join(class_indices(model))}; rename "
            "the classes in one of the two."
        )

    return [_mapped(one, lambda label: known[label.name]) for one in examples]


def _mapped(example: Example, index: Callable[[ClassIndex], int]) -> Example:
    """Put plain indices in place of an example's `ClassIndex`, if it has any."""

    def of(label: Any) -> Any:
        return index(label) if isinstance(label, ClassIndex) else label

    label = example.label
    return replace(example, label=tuple(map(of, label)) if isinstance(label, tuple) else of(label))


def foreign_names(examples: Sequence[Example], model: PreTrainedModel) -> str | None:
    """Return what a reader should know of labels that are read by their index though both sides name their classes."""
    used, known = _used_names(examples, model)
    theirs = class_indices(model)
    if known or all(name.isdecimal() for name in used) or all(_is_generic(*one) for one in theirs.items()):
        return None
    return (
        f"the data calls its classes {', '.join(used)} and the model {', '.join(theirs)}: labels were read by their "
        "index"
    )


def _is_generic(name: str, index: int) -> bool:
    return name in (f"LABEL_{index}", str(index))


def _used_names(examples: Iterable[Example], model: PreTrainedModel) -> tuple[dict[str, int], dict[str, int]]:
    """Return the names that labels come with, and those of them that the model knows, with the indices of each."""
    labels = (one for row in examples for one in (row.label if isinstance(row.label, tuple) else (row.label,)))
    used = {label.name: int(label) for label in labels if isinstance(label, ClassIndex)}
    exact = class_indices(model) if used else {}
    folded = {name.casefold(): index for name, index in exact.items()}
    if len(folded) < len(exact):
        folded = exact  # two classes that differ by their case alone
    found = {name: exact.get(name, folded.get(name.casefold())) for name in used}
    return used, {name: index for name, index in found.items() if index is not None}


def labels_are_flags(labels: Mapping[int, Sequence[Any]], classes: int) -> bool:
    """Tell whether sets of classes are given as 0 or 1 of every class; else they list the classes. All, or none.

    Read row by row, (0, 1) of two classes would be the second one also where all other rows list classes.

    Args:
        labels: of each row of the data that has one.
        classes: how many the model has.

    Raises:
        ConfigError: some rows can only be of the one form, and others only of the other.

    Example:
        >>> labels_are_flags({0: (0, 1), 1: (1, 1)}, 2), labels_are_flags({0: (0, 1), 1: (1,)}, 2)
        (True, False)
    """
    flags = {row for row, one in labels.items() if len(one) == classes and all(flag in (0, 1) for flag in one)}
    listed = next((row for row in labels if row not in flags), None)
    if listed is None:
        return True
    for row in sorted(flags):
        if len(set(labels[row])) < len(labels[row]):
            raise ConfigError(
                f"data[{row}].label must be a list of classes as that of data[{listed}], {labels[listed]!r}, got "
                f"{labels[row]!r}, a 0 or 1 of each class; write all rows in one of the two forms."
            )
    return False


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
    names = class_indices(model)
    labels: list[int | float] = []
    for index, example in enumerate(by_class_names(examples, model)):
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
        ConfigError: `tokenizer` is none, but for instance the name of one.
        CheckpointError: the one in the model's folder cannot be read.
    """
    if tokenizer is not None:
        if not callable(tokenizer):
            raise ConfigError(
                f"tokenizer must be a tokenizer of transformers, got {tokenizer!r:.80}; pass "
                "AutoTokenizer.from_pretrained(...)."
            )
        return tokenizer
    folder = Path(getattr(model.config, "_name_or_path", "") or "missing")
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # each tokenizer's own code reads its files
            raise CheckpointError(
                f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {error}; pass tokenizer=, or copy "
                f"the folder again."
            ) from error
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


def _example(row: Any, index: int, name: str, tags: tuple[str, ...] | None, classes: tuple[str, ...] | None) -> Example:
    if isinstance(row, Example):
        return row
    if isinstance(row, str):
        return Example(row)
    if isinstance(row, Mapping):
        text, pair, label = (_first(row, columns) for columns in (_TEXT, _PAIR, _LABEL))
        asked, sentence = (_first(row, [column]) for column in _ASKED)
        if pair is None and isinstance(asked, str) and isinstance(sentence, str):
            text, pair = asked, sentence
        if isinstance(text, str):
            return Example(text, _second(pair, index, name), _label(label, classes))
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
            return Example(row[0], _second(row[1], index, name), _label(row[2]))
    if isinstance(row, Sequence) and len(row) == 2 and isinstance(row[0], Sequence):
        return _tagged(read_sentence(row, f"{name}[{index}]", tags))
    raise ConfigError(f"{name}[{index}] must be a text, (text, label), (text, pair, label) or a dict, got {row!r:.80}.")


def _second(pair: Any, index: int, name: str) -> str | None:
    if pair is not None and not isinstance(pair, str):
        raise ConfigError(f"{name}[{index}] must have a text as the second of its pair, got {pair!r:.80}.")
    return pair


def _label(label: Any, names: tuple[str, ...] | None = None) -> Any:
    """Return a label as Python has it; `names` are those of the classes, if they are declared."""
    if hasattr(label, "tolist"):
        label = label.tolist()  # of numpy or torch, a number or several
    if isinstance(label, Sequence) and not isinstance(label, str):
        return tuple(_label(one, names) for one in label)
    if names is not None and isinstance(label, int) and 0 <= label < len(names):
        return ClassIndex(label, names[label])
    return label


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
    try:
        is_file, is_place = path.is_file(), path.exists()
    except (OSError, ValueError):  # too long for the name of a file, or with a byte that none has
        is_file = is_place = False
    if is_file:
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
    if not is_place and (len(str(source).split()) > 1 or len(str(source)) > _LONGEST_NAME):
        raise ConfigError(
            f"{name} must be texts, rows, a datasets object, or the name of a file or of a hub data set, got a text, "
            f"{str(source)!r:.80}; pass it in a list, [text]."
        )
    import datasets

    try:
        return datasets.load_dataset(str(source), split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MissingInputError(
            f"{name}: there is no file and no hub data set {str(source)!r} with a split {split!r} that can be read; "
            f"pass the path of a .csv, .tsv, .jsonl, .json or .txt file, or look at the name. datasets says: {reason}"
        ) from error


# Of a folder or a data set of the hub; what is longer is a text.
_LONGEST_NAME = 255


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
            {key: _number(value) if key in _LABEL else value for key, value in zip(header, row, strict=True)}
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
                f"{name}: {path.name} must name the column of its texts {' or '.join(_TEXT[:2])}, got {first!r:.80} "
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
    return any(cell.strip() in (*_TEXT, *_LABEL, *_OTHER) for cell in cells)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _number(text: str) -> Label:
    """Read the label of a table's row: a number where it is one, of which the text is kept if it may name a class."""
    if not _is_number(text):
        return text
    return ClassIndex(int(text), text.strip()) if text.strip().lstrip("+-").isdecimal() else float(text)
