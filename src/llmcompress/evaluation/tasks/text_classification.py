"""What kind of text (or pair of texts) it is: one class, several, or a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ...class_labels import by_class_names, class_indices, foreign_names, labels_are_flags
from ...data import LABELLED, encode
from ...errors import ConfigError, MissingInputError, UnsupportedModelError, did_you_mean
from ...registry import tasks
from ..resampling import Metrics
from .forward import Batch, ForwardTask, Run, by_length, pad_rows, padding_of
from .measures import classification, multi_label, regression
from .task import (
    ExampleResult,
    MetricKind,
    TaskScore,
    check_positive,
    check_vocabulary,
    length_limit,
    not_finite,
    unfit,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""As `config.problem_type` names them."""


@tasks.register("text_classification")
@dataclass(frozen=True, eq=False, kw_only=True)
class TextClassification(ForwardTask):
    """Classification of texts or of pairs of texts: one class, a set of classes, or a real-valued score.

    Which of them, the model's config says: one output is a regression, `problem_type="multi_label_classification"` a
    set of classes (those with a probability above one half), all else one class.

    Texts are cut to `max_length`, sorted by length and padded to the longest of their batch; results come back in the
    order of the data. A label is a class index, a name that the model's `config.label2id` knows, a number for a
    regression, and for a set of classes a list of indices or names, or of 0 and 1 for every class, in one of the two
    forms throughout. Where a `datasets` object names its classes and the model has classes of these names (whatever
    their case), the names count and not the indices; so do digits in a file that are the name of a class.

    Metrics: accuracy, precision, recall and F1; for sets of classes micro and macro F1, micro precision and recall, and
    the share of sets that are right as a whole; for a regression Pearson and Spearman correlation and RMSE.

    Attributes:
        max_length: tokens an example is cut to, special tokens included; None takes the most that the model can.
        average: of precision, recall and F1 of one class: `"macro"` is the mean over the classes that occur in labels
            or predictions; `"binary"` is the score of class 1 of two (0 if it is never predicted).

    Raises:
        MissingInputError: there is no data, or an example has no label.
        ConfigError: a label is unknown to the model or out of range; a setting is out of range.
        UnsupportedModelError: the model does not end in a classifier.

    Example:
        >>> import llmcompress.testing as lt
        >>> task = TextClassification([("good", 1), ("bad", "LABEL_0")])
        >>> score = task.evaluate(lt.tiny_model("bert"), lt.tiny_tokenizer(), progress=False)
        >>> sorted(score.metrics)
        ['accuracy', 'f1', 'precision', 'recall']
    """

    max_length: int | None = None
    average: Literal["macro", "binary"] = "macro"

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric_names: ClassVar[Sequence[str] | None] = (
        "accuracy",
        "precision",
        "recall",
        "f1",
        "f1_micro",
        "f1_macro",
        "subset_accuracy",
        "pearson",
        "spearman",
        "rmse",
    )
    kinds: ClassVar[Mapping[str, MetricKind]] = {
        "pearson": MetricKind(scale="difference"),
        "spearman": MetricKind(scale="difference"),
        "rmse": MetricKind(scale="ratio", lower_is_better=True),
        "squared_error": MetricKind(scale="ratio", lower_is_better=True),
    }

    def __post_init__(self) -> None:
        check_positive("TextClassification.max_length", self.max_length)
        if self.average not in ("macro", "binary"):
            raise ConfigError(f"TextClassification.average must be 'macro' or 'binary', got {self.average!r}.")
        super().__post_init__()
        without = next((i for i, example in enumerate(self.examples) if example.label is None), None)
        if without is not None:
            raise MissingInputError(f"TextClassification.data[{without}] has no label; pass {LABELLED}.")

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not end in a classifier."""
        if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__):
            raise unfit(self, model, "a model with a classification head", "evaluate it with another task")
        if problem_of(model) == "regression" and model.config.num_labels > 1:
            raise UnsupportedModelError(
                f"TextClassification needs a regression of one number, got {type(model).__name__} with "
                f"{model.config.num_labels} (config.num_labels); evaluate it with a CustomTask."
            )
        if self.average == "binary" and (problem_of(model) != _SINGLE or model.config.num_labels != 2):
            raise ConfigError(
                f"TextClassification.average='binary' needs a model of 2 classes, got {model.config.num_labels} and "
                f"{problem_of(model)}; use 'macro'."
            )

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Tokenise the texts and read the labels as the model's classes; see `ForwardTask.start`."""
        self.check(model)
        classes = _Classes.of(model)
        given = [example.label for example in by_class_names(self.examples, model)]
        labels = self._labels(given, classes)
        limit = length_limit(
            self, self.max_length, model, tokenizer, pair=any(example.pair is not None for example in self.examples)
        )
        encoded = encode(self.examples, tokenizer, max_length=limit)
        lengths = [len(row["input_ids"]) for row in encoded]
        if 0 in lengths:
            raise ConfigError(f"TextClassification.data[{lengths.index(0)}] must have a text, got none; remove it.")
        check_vocabulary([row["input_ids"] for row in encoded], model, tokenizer)
        pad, alone = padding_of(model, tokenizer)
        # Behind the text whatever the tokenizer's side: positions must not move. XLNet counts none, and reads its
        # answer off the last token, padding or not.
        side = "left" if getattr(model.config, "summary_type", None) == "last" else "right"
        batches = [
            Batch(rows, pad_rows([encoded[i] for i in rows], pad, side))
            for rows in by_length(lengths, 1 if alone else batch_size)
        ]
        protocol: dict[str, str | int | float | bool | None] = {
            "problem": classes.problem,
            "classes": classes.number,
            "average": self.average if classes.problem == _SINGLE else None,
            "max_length": limit,
            "truncated": _count_truncated(self, tokenizer, limit, lengths),
            "batch_size": 1 if alone else batch_size,
            "padding": "none, one example at a time (the model names no padding token)"
            if alone
            else f"to the longest of the batch, token {pad}, examples sorted by length",
        }
        run = _Classifying(self, model, batches, labels, protocol)
        foreign = foreign_names(self.examples, model)
        run.warnings += [foreign] if foreign else []
        return run

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """Accuracy and F1, F1 of sets, or correlations; see `Task.metrics`."""
        labels: list[Any] = [result.label for result in results]
        predictions: list[Any] = [result.prediction for result in results]
        if isinstance(labels[0], tuple):
            classes = 1 + max((index for one in (*labels, *predictions) for index in one), default=0)
            return multi_label(labels, predictions, classes)
        if "squared_error" in results[0].values:
            return regression(labels, predictions)
        return classification(labels, predictions, average=self.average)

    def _labels(self, given: Sequence[Any], classes: _Classes) -> list[Any]:
        """Return the label of each example as a class index, a tuple of them, or a number."""
        if classes.problem == "multi_label_classification":
            return self._sets(given, classes)
        return [self._label(position, label, classes) for position, label in enumerate(given)]

    def _sets(self, given: Sequence[Any], classes: _Classes) -> list[tuple[int, ...]]:
        for position, label in enumerate(given):
            if not isinstance(label, tuple):
                raise ConfigError(
                    f"TextClassification.data[{position}] must have a list of classes as label for the multi-label "
                    f"{classes.model}, got {label!r}; pass for instance ['toxic', 'threat'] or [0, 1, 1]."
                )
        if labels_are_flags(dict(enumerate(given)), classes.number):
            return [tuple(index for index, one in enumerate(label) if one) for label in given]
        return [
            tuple(sorted({self._class(position, one, classes) for one in label}))
            for position, label in enumerate(given)
        ]

    def _label(self, position: int, given: Any, classes: _Classes) -> int | float:
        if classes.problem == "regression":
            if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
                raise ConfigError(
                    f"TextClassification.data[{position}] must have a number as label for the regression "
                    f"{classes.model} does, got {given!r}."
                )
            return float(given)
        return self._class(position, given, classes)

    def _class(self, position: int, label: Any, classes: _Classes) -> int:
        found = classes.names.get(label, label) if isinstance(label, str) else label
        if isinstance(found, str):
            hint = did_you_mean(found, classes.names) or "."
            raise ConfigError(
                f"TextClassification.data[{position}] has the label {found!r}, which config.label2id does not "
                f"know{hint} Known: {', '.join(classes.names)}."
            )
        # The range first: what is in it is finite, and can be made an integer.
        if not isinstance(found, (int, float)) or not 0 <= found < classes.number or int(found) != found:
            unlabelled = " (-1 marks the unlabelled test splits of the hub)" if found == -1 else ""
            raise ConfigError(
                f"TextClassification.data[{position}] must have a label in [0, {classes.number}), "
                f"got {found!r}{unlabelled}."
            )
        return int(found)


@dataclass(frozen=True)
class _Classes:
    """What a model knows of labels, read off its config once: that takes too long to be done for every example."""

    problem: Problem
    number: int
    names: dict[str, int]
    model: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Classes:
        return cls(problem_of(model), model.config.num_labels, class_indices(model), type(model).__name__)


class _Classifying(Run):
    def __init__(
        self,
        task: TextClassification,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        labels: list[Any],
        protocol: dict[str, str | int | float | bool | None],
    ) -> None:
        super().__init__(model, batches)
        self.warnings: list[str] = []
        self._task, self._labels, self._protocol = task, labels, protocol
        self._problem = problem_of(model)
        self._results: list[ExampleResult | None] = [None] * len(labels)

    def read(self, batch: Batch, outputs: Any) -> None:
        expected = (len(batch.rows), self.model.config.num_labels)
        if tuple(outputs.logits.shape) != expected:
            raise UnsupportedModelError(
                f"TextClassification needs logits of shape {expected}, got {tuple(outputs.logits.shape)} "
                f"from {type(self.model).__name__}."
            )
        logits = outputs.logits.float().cpu()
        finite = logits.isfinite().all(-1)
        if not finite.all():
            bad = min(row for row, good in zip(batch.rows, finite.tolist(), strict=True) if not good)
            raise not_finite(self.model, f"example {bad} of the data")
        for row, result in zip(batch.rows, self._read(logits, batch.rows), strict=True):
            self._results[row] = result

    def _read(self, logits: torch.Tensor, rows: Sequence[int]) -> list[ExampleResult]:
        labels = [self._labels[row] for row in rows]
        if self._problem == "regression":
            return [
                ExampleResult(values={"squared_error": (given - label) ** 2}, label=label, prediction=given)
                for given, label in zip(logits[:, 0].tolist(), labels, strict=True)
            ]
        if self._problem == _SINGLE:
            confidence, prediction = logits.softmax(-1).max(-1)
            return [
                ExampleResult(values={"accuracy": float(p == label)}, label=label, prediction=p, confidence=c)
                for p, c, label in zip(prediction.tolist(), confidence.tolist(), labels, strict=True)
            ]
        chosen = (logits > 0).tolist()
        sets = [tuple(index for index, taken in enumerate(row) if taken) for row in chosen]
        return [
            ExampleResult(values={"subset_accuracy": float(found == label)}, label=label, prediction=found)
            for found, label in zip(sets, labels, strict=True)
        ]

    def score(self) -> TaskScore:
        results = [result for result in self._results if result is not None]
        config, truncated = self.model.config, self._protocol["truncated"]
        warnings = list(self.warnings)
        if truncated:
            warnings.append(f"{truncated} of {len(results)} texts were cut to {self._protocol['max_length']} tokens")
        predictions, labels = {result.prediction for result in results}, {result.label for result in results}
        if len(results) > 1 and len(predictions) == 1 and len(labels) > 1:
            warnings.append(f"collapse: every example was given {_answer_text(predictions.pop())}")
        names = tuple(str(config.id2label.get(i, i)) for i in range(config.num_labels))
        return self._task.score(
            results,
            primary=_PRIMARY[self._problem],
            protocol=self._protocol,
            classes=None if self._problem == "regression" else names,
            warnings=warnings,
        )

    def answers(self, batch: Batch, outputs: Any) -> torch.Tensor | None:
        logits: torch.Tensor = outputs.logits
        if self._problem == "regression":
            return None
        if self._problem == _SINGLE:
            return logits
        # Each class is a yes or no of its own: a logit x is the pair (0, x).
        return torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)


_SINGLE: Problem = "single_label_classification"
_PRIMARY: dict[Problem, str] = {
    _SINGLE: "accuracy",
    "multi_label_classification": "f1_micro",
    "regression": "pearson",
}


def problem_of(model: PreTrainedModel) -> Problem:
    """Return what a classifier does, by its config."""
    if model.config.problem_type == "multi_label_classification":
        return "multi_label_classification"
    if model.config.num_labels < 2 or model.config.problem_type == "regression":
        return "regression"
    return _SINGLE


def _answer_text(answer: Any) -> str:
    return f"the number {answer:.4g}" if isinstance(answer, float) else f"class {answer}"


def _count_truncated(
    task: TextClassification, tokenizer: PreTrainedTokenizerBase, limit: int | None, lengths: list[int]
) -> int:
    # Only a text that fills the limit can have been cut: only those are tokenised again, in full.
    full = [example for example, length in zip(task.examples, lengths, strict=True) if length == limit]
    return sum(len(row["input_ids"]) > (limit or 0) for row in encode(full, tokenizer))
