"""Texts and labels from wherever the user has them, as a list of `Example`, and their tokens.

One loader serves training, calibration and evaluation: Python lists, dicts, `datasets` objects, CSV, TSV, JSONL and TXT
files, and names of data sets on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .class_labels import ClassIndex
from .data_files import ASKED, LABEL, PAIR, TEXT, read_file
from .errors import CheckpointError, ConfigError, MissingInputError
from .questions import read_questions, unfold
from .sentences import Sentence, class_names, read_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What to pass where labels are missing.
LABELLED = "(text, label) tuples, or rows with a column 'label'"


@dataclass(frozen=True)
class Span:
    """Where an answer stands in a text: from character `start` up to, not including, `end`; empty where none does."""

    start: int
    end: int


Label = int | float | str | tuple[int | str, ...] | Span


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
    tags, classes = class_names(features), class_names(features, LABEL)
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
        text, pair, label = (_first(row, columns) for columns in (TEXT, PAIR, LABEL))
        asked, sentence = (_first(row, [column]) for column in ASKED)
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
            f"{name}[{index}] must have a text in one of the columns {', '.join(TEXT)}, got {sorted(row)}."
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
        return read_file(path, name)
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
