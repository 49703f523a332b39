"""What kind of word each word of a text is: part of speech, or part of the name of something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...data import load_table
from ...errors import ConfigError, UnsupportedModelError, did_you_mean
from ...registry import tasks
from ...sentences import Sentence, class_names, read_sentence
from ..resampling import Floats, Metrics
from .entities import OUTSIDE, entities, is_scheme
from .forward import Batch, ForwardTask, Run, by_length, pad_rows, padding_of
from .measures import spans
from .task import (
    ExampleResult,
    TaskScore,
    check_positive,
    check_vocabulary,
    length_limit,
    means,
    not_finite,
    unfit,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Neighbouring windows of a long sentence share this part of their length, so that no word lacks context.
_OVERLAP = 4


@dataclass(frozen=True)
class _Window:
    """A sentence, or a stretch of a long one, as it goes through the model.

    Attributes:
        sentence: its number.
        inputs: what the tokenizer gave.
        answers: position in the window of the first piece of each word that is read here, to the word's number.
    """

    sentence: int
    inputs: dict[str, list[int]]
    answers: dict[int, int]


@tasks.register("token_classification")
@dataclass(frozen=True, eq=False, kw_only=True)
class TokenClassification(ForwardTask):
    """Tagging of words: named entities, parts of speech.

    A row has the words of a sentence (`tokens` or `words`) and their tags (`tags`, `ner_tags`, `labels` or
    `pos_tags`): names that the model's `config.label2id` knows, or class indices; where a `datasets` object names its
    classes, the names count and not the indices. Words are split into pieces by the tokenizer, and the first piece of a
    word answers for it. A sentence longer than `max_length` goes through the model in windows that overlap by a
    quarter, and a word is read in the window that gives it most context.

    Metrics: `accuracy`, the share of words tagged right. Where all the model's tags are O or begin with B-, I-, E- or
    S- (BIO, IOB2, BIOES), also `f1`, `precision` and `recall` of entities, counted over all sentences: an entity is
    right if its type, first and last word are. Entities are read from tags by the rules of conlleval (Tjong Kim Sang
    and De Meulder 2003, https://aclanthology.org/W03-0419), as seqeval does by default.

    Attributes:
        max_length: tokens a window, special tokens included; None takes the most that the model can.

    Raises:
        MissingInputError: there is no data, or a sentence has no tags.
        ConfigError: a row has not one tag a word; a tag is unknown to the model; the tokenizer cannot tell words.
        UnsupportedModelError: the model does not tag tokens.

    Example:
        >>> import llmcompress.testing as lt
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> tags = {0: "O", 1: "B-PER", 2: "I-PER"}
        >>> sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForTokenClassification(BertConfig(**sizes, intermediate_size=64, id2label=tags))
        >>> task = TokenClassification([{"tokens": ["ada", "lovelace", "wrote"], "tags": ["B-PER", "I-PER", "O"]}])
        >>> score = task.evaluate(model, lt.tiny_tokenizer(), progress=False)
        >>> sorted(score.metrics), score.primary, score.examples[0].label
        (['accuracy', 'f1', 'precision', 'recall'], 'f1', ('B-PER', 'I-PER', 'O'))
    """

    max_length: int | None = None

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    unit: ClassVar[str] = "window"
    metric_names: ClassVar[Sequence[str] | None] = ("f1", "precision", "recall", "accuracy")

    def __post_init__(self) -> None:
        check_positive("TokenClassification.max_length", self.max_length, least=4)
        super().__post_init__()

    @cached_property
    def examples(self) -> Sequence[Sentence]:
        """The sentences."""
        name = "TokenClassification.data"
        rows, features = load_table(self.data, split=self.split, name=name)
        names = class_names(features)
        return [read_sentence(row, f"{name}[{index}]", names) for index, row in enumerate(rows)]

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not tag tokens."""
        if not any(cls.__name__.endswith("ForTokenClassification") for cls in type(model).__mro__):
            raise unfit(self, model, "a model with a head that tags tokens", "evaluate it with another task")

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Tokenise the words, cut long sentences into windows, read the tags; see `ForwardTask.start`."""
        self.check(model)
        names = {int(index): str(name) for index, name in model.config.id2label.items()}
        labels = [
            tuple(self._name(f"[{index}]", tag, names) for tag in sentence.tags)
            for index, sentence in enumerate(self.examples)
        ]
        limit = length_limit(self, self.max_length, model, tokenizer)
        windows = list(_windows([sentence.words for sentence in self.examples], tokenizer, limit))
        check_vocabulary([window.inputs["input_ids"] for window in windows], model, tokenizer)
        pad, _ = padding_of(model, tokenizer)
        batches = []
        for rows in by_length([len(window.inputs["input_ids"]) for window in windows], batch_size):
            # Padding stands behind the words whatever the tokenizer's side: positions must not move.
            inputs = pad_rows([windows[row].inputs for row in rows], pad)
            scored = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            for number, row in enumerate(rows):
                scored[number, list(windows[row].answers)] = True
            batches.append(Batch(rows, inputs, scored))
        words = sum(map(len, labels))
        read = {(window.sentence, word) for window in windows for word in window.answers.values()}
        protocol: dict[str, str | int | float | bool | None] = {
            "words": words,
            "words_without_pieces": words - len(read),
            "classes": len(names),
            "word_pieces": "the first piece of a word answers for it",
            "max_length": limit,
            "windows": len(windows),
            "batch_size": batch_size,
            "padding": f"to the longest of the batch, token {pad}, windows sorted by length",
        }
        run = _Tagging(self, model, batches, windows, labels, names, protocol)
        if "ByteLevel(add_prefix_space=False" in repr(tokenizer.backend_tokenizer.pre_tokenizer):
            run.warnings.append(
                "the tokenizer does not mark where a word begins: load it with add_prefix_space=True, unless the model "
                "was trained as it is"
            )
        return run

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """Accuracy, and F1 of entities where the tags tell them; see `Task.metrics`."""
        accuracy = means(results)
        labels: list[Any] = [result.label for result in results]
        predictions: list[Any] = [result.prediction for result in results]
        # A word without pieces has the empty prediction, which is no tag.
        if not is_scheme({tag for tags in (*labels, *predictions) for tag in tags} - {""}):
            return accuracy
        pairs = [(entities(asked), entities(given)) for asked, given in zip(labels, predictions, strict=True)]
        found = spans(
            [len(asked & given) for asked, given in pairs],
            [len(given) for _, given in pairs],
            [len(asked) for asked, _ in pairs],
        )

        def metrics(counts: Floats) -> dict[str, Floats]:
            return {**found(counts), **accuracy(counts)}

        return metrics

    def shown(self, index: int) -> str:
        """The words of sentence number `index`."""
        return " ".join(self.examples[index].words)

    def _name(self, where: str, tag: str | int, names: Mapping[int, str]) -> str:
        if isinstance(tag, str):
            if tag not in names.values():
                hint = did_you_mean(tag, names.values()) or "."
                raise ConfigError(
                    f"TokenClassification.data{where} has the tag {tag!r}, which config.id2label does not know{hint} "
                    f"Known: {', '.join(names.values())}."
                )
            return tag
        if tag not in names:
            raise ConfigError(
                f"TokenClassification.data{where} must have tags in [0, {len(names)}), got {tag!r}; remove words that "
                "are not to be tagged."
            )
        return names[tag]


class _Tagging(Run):
    def __init__(
        self,
        task: TokenClassification,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        windows: Sequence[_Window],
        labels: Sequence[tuple[str, ...]],
        names: Mapping[int, str],
        protocol: dict[str, str | int | float | bool | None],
    ) -> None:
        super().__init__(model, batches)
        self.warnings: list[str] = []
        self._task, self._windows, self._labels, self._names, self._protocol = task, windows, labels, names, protocol
        # A word that leaves no piece is outside of every entity; where there is no such tag, it is never right.
        unread = OUTSIDE if OUTSIDE in names.values() else ""
        self._given = [[unread] * len(tags) for tags in labels]

    def read(self, batch: Batch, outputs: Any) -> None:
        assert batch.scored is not None
        expected = (*batch.scored.shape, len(self._names))
        if tuple(outputs.logits.shape) != expected:
            raise UnsupportedModelError(
                f"TokenClassification needs logits of shape {expected}, got {tuple(outputs.logits.shape)} from "
                f"{type(self.model).__name__}."
            )
        logits = outputs.logits.float().cpu()
        finite = (logits.isfinite().all(-1) | ~batch.scored).all(-1)
        if not finite.all():
            bad = min(self._windows[row].sentence for row, good in zip(batch.rows, finite, strict=True) if not good)
            raise not_finite(self.model, f"example {bad} of the data")
        for row, classes in zip(batch.rows, logits.argmax(-1).tolist(), strict=True):
            window = self._windows[row]
            for position, word in window.answers.items():
                self._given[window.sentence][word] = self._names[classes[position]]

    def score(self) -> TaskScore:
        results = []
        for label, given in zip(self._labels, self._given, strict=True):
            right = sum(a == b for a, b in zip(label, given, strict=True))
            values = {"accuracy": right / len(label)}
            results.append(ExampleResult(values=values, weight=len(label), label=label, prediction=tuple(given)))
        names = tuple(self._names[index] for index in sorted(self._names))
        warnings = list(self.warnings)
        if self._protocol["words_without_pieces"]:
            warnings.append(f"{self._protocol['words_without_pieces']} words left no piece that the model could tag")
        if len({tag for label in self._labels for tag in label}) > 1 and len({t for g in self._given for t in g}) == 1:
            warnings.append(f"collapse: every word was tagged {self._given[0][0]}")
        return self._task.score(
            results,
            primary="f1" if is_scheme(names) else "accuracy",
            protocol=self._protocol,
            classes=names,
            warnings=warnings,
        )


def _windows(
    sentences: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> Iterator[_Window]:
    """Tokenise words; a sentence of more than `limit` tokens becomes several windows."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"TokenClassification.tokenizer must be a fast one, which tells the pieces of a word, got "
            f"{type(tokenizer).__name__}; load it with AutoTokenizer."
        )
    words = [list(sentence) for sentence in sentences]
    encoded = tokenizer(words, is_split_into_words=True, truncation=False, padding=False, verbose=False)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded]
    for sentence in range(len(words)):
        word_of = encoded.word_ids(sentence)
        places = [place for place, word in enumerate(word_of) if word is not None]
        if not places:
            continue
        begin, end = places[0], places[-1] + 1
        firsts = [place for place in places if place == begin or word_of[place] != word_of[place - 1]]
        special = begin + len(word_of) - end
        room = end - begin if limit is None else limit - special
        if room < 1:
            raise ConfigError(
                f"TokenClassification.max_length must be above {special}, the special tokens, got {limit}."
            )
        for start, stop, read in _stretches(begin, end, room, firsts):
            kept = [*range(begin), *range(start, stop), *range(end, len(word_of))]
            inputs = {key: [encoded[key][sentence][place] for place in kept] for key in keys}
            yield _Window(sentence, inputs, {begin + place - start: word_of[place] for place in read})


def _stretches(begin: int, end: int, room: int, firsts: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """Cut places `begin` to `end` into stretches of `room`; each of `firsts` is read where it has most context."""
    step = room - room // _OVERLAP
    starts = [*range(begin, end - room, step), max(begin, end - room)]
    read: dict[int, list[int]] = {start: [] for start in starts}
    for place in firsts:
        inside = [start for start in starts if start <= place < start + room]
        read[max(inside, key=lambda start: min(place - start, start + room - 1 - place))].append(place)
    return [(start, min(start + room, end), read[start]) for start in starts if read[start]]
