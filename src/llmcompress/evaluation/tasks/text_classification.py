"""One label a text (or pair of texts): accuracy, precision, recall, F1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from tqdm.auto import tqdm

from ...data import encode, longest_input
from ...errors import CompressionError, ConfigError, MissingInputError, UnsupportedModelError, did_you_mean
from ...registry import tasks
from ..inference import evaluating
from ..statistics import wilson
from .task import ExampleResult, Task, TaskScore, check_positive, check_vocabulary, unfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@tasks.register("text_classification")
@dataclass(frozen=True, eq=False, kw_only=True)
class TextClassification(Task):
    """Single-label classification of texts or of pairs of texts.

    Texts are cut to `max_length`, sorted by length and padded to the longest of their batch; results come back in the
    order of the data. Labels are class indices, or names that the model's `config.label2id` knows.

    Attributes:
        max_length: tokens an example is cut to, special tokens included; None takes the most that the model can.
        average: `"macro"` is the mean over the classes that occur in labels or predictions; `"binary"` is the score of
            class 1 of two (precision, recall and F1; a class never predicted scores 0).

    Raises:
        MissingInputError: there is no data, or an example has no label.
        ConfigError: a label is unknown to the model or out of range; a setting is out of range.
        UnsupportedModelError: the model does not end in a single-label classifier.

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

    def __post_init__(self) -> None:
        check_positive("TextClassification.max_length", self.max_length)
        if self.average not in ("macro", "binary"):
            raise ConfigError(f"TextClassification.average must be 'macro' or 'binary', got {self.average!r}.")
        super().__post_init__()
        without = next((i for i, example in enumerate(self.examples) if example.label is None), None)
        if without is not None:
            raise MissingInputError(
                f"TextClassification.data[{without}] has no label; pass (text, label) tuples, or rows with a column "
                "'label'."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not end in a single-label classifier."""
        config = model.config
        if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__):
            raise unfit(self, model, "a model with a classification head", "evaluate it with another task")
        if config.problem_type == "multi_label_classification" or config.num_labels < 2:
            kind = "regression" if config.num_labels < 2 else "multi-label classification"
            raise UnsupportedModelError(
                f"TextClassification needs one label of at least two for a text; {type(model).__name__} has "
                f"{config.num_labels} output(s) and does {kind}; set config.num_labels and config.problem_type."
            )
        if self.average == "binary" and config.num_labels != 2:
            raise ConfigError(
                f"TextClassification.average='binary' needs a model of 2 classes, got {config.num_labels}; use 'macro'."
            )

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, progress: bool = True
    ) -> TaskScore:
        """Score `model`; see `Task.evaluate`."""
        self.check(model)
        check_positive("batch_size", batch_size)
        labels = self._labels(model)
        limit = self._limit(model, tokenizer)
        encoded = encode(self.examples, tokenizer, max_length=limit)
        lengths = [len(row["input_ids"]) for row in encoded]
        if 0 in lengths:
            raise ConfigError(f"TextClassification.data[{lengths.index(0)}] must have a text, got none; remove it.")
        check_vocabulary([row["input_ids"] for row in encoded], model, tokenizer)
        pad, alone = _padding(model, tokenizer)

        # Longest first: what does not fit in memory fails at once, and the time left is never underrated.
        order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
        predictions, confidences = [0] * len(order), [0.0] * len(order)
        bar = tqdm(total=len(order), desc=self.name, unit="ex", disable=not progress, leave=False)
        with evaluating(model), bar:
            for rows in _chunks(order, 1 if alone else batch_size):
                batch = _batch([encoded[i] for i in rows], pad, tokenizer.padding_side)
                logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits
                confidence, prediction = _read(logits, rows, model)
                for i, p, c in zip(rows, prediction, confidence, strict=True):
                    predictions[i], confidences[i] = p, c
                bar.update(len(rows))

        metrics = classification_metrics(labels, predictions, average=self.average)
        hits = [prediction == label for prediction, label in zip(predictions, labels, strict=True)]
        truncated = _count_truncated(self, tokenizer, limit, lengths)
        warnings = [f"{truncated} of {len(hits)} texts were cut to {limit} tokens"] if truncated else []
        if len(hits) > 1 and len(set(predictions)) == 1 and len(set(labels)) > 1:
            warnings.append(f"collapse: every example was given class {predictions[0]}")
        return TaskScore(
            task=self.name,
            metrics=metrics,
            primary="accuracy",
            higher_is_better=True,
            fraction=True,
            intervals={"accuracy": wilson(sum(hits), len(hits))},
            classes=tuple(str(model.config.id2label.get(i, i)) for i in range(model.config.num_labels)),
            examples=tuple(
                ExampleResult(score=float(hit), label=label, prediction=prediction, confidence=confidence)
                for hit, label, prediction, confidence in zip(hits, labels, predictions, confidences, strict=True)
            ),
            protocol={
                "data_sha256": self.data_hash,
                "examples": len(hits),
                "classes": model.config.num_labels,
                "average": self.average,
                "max_length": limit,
                "truncated": truncated,
                "batch_size": 1 if alone else batch_size,
                "padding": "none, one example at a time (the model names no padding token)"
                if alone
                else f"to the longest of the batch, token {pad}, examples sorted by length",
            },
            warnings=tuple(warnings),
        )

    def _limit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
        most = longest_input(model, tokenizer)
        if self.max_length is not None and most is not None and self.max_length > most:
            raise ConfigError(
                f"TextClassification.max_length must be at most {most} for {type(model).__name__}, "
                f"got {self.max_length}; leave it out to take that."
            )
        return self.max_length or most

    def _labels(self, model: PreTrainedModel) -> list[int]:
        """Return the class index of every example."""
        names = {str(name): int(index) for name, index in (model.config.label2id or {}).items()}
        classes = model.config.num_labels
        found = []
        for position, example in enumerate(self.examples):
            label = names.get(example.label, example.label) if isinstance(example.label, str) else example.label
            if isinstance(label, str):
                hint = did_you_mean(label, names) or "."
                raise ConfigError(
                    f"TextClassification.data[{position}] has the label {label!r}, which config.label2id does not "
                    f"know{hint} Known: {', '.join(names)}."
                )
            if label is None or int(label) != label or not 0 <= label < classes:
                unlabelled = " (-1 marks the unlabelled test splits of the hub)" if label == -1 else ""
                raise ConfigError(
                    f"TextClassification.data[{position}] must have a label in [0, {classes}), "
                    f"got {label!r}{unlabelled}."
                )
            found.append(int(label))
        return found


def classification_metrics(
    labels: list[int], predictions: list[int], *, average: Literal["macro", "binary"] = "macro"
) -> dict[str, float]:
    """Return accuracy, precision, recall and F1, each in [0, 1]; a quotient without cases counts as 0.

    Example:
        >>> scores = classification_metrics([0, 0, 1, 1], [0, 1, 1, 1])
        >>> {name: round(value, 4) for name, value in scores.items()}
        {'accuracy': 0.75, 'precision': 0.8333, 'recall': 0.75, 'f1': 0.7333}
    """
    classes = [1] if average == "binary" else sorted({*labels, *predictions})
    per_class = []
    for index in classes:
        both = sum(label == prediction == index for label, prediction in zip(labels, predictions, strict=True))
        predicted, real = predictions.count(index), labels.count(index)
        precision, recall = both / predicted if predicted else 0.0, both / real if real else 0.0
        per_class.append((precision, recall, 2 * both / (predicted + real) if predicted + real else 0.0))
    precision, recall, f1 = (sum(column) / len(classes) for column in zip(*per_class, strict=True))
    hits = sum(label == prediction for label, prediction in zip(labels, predictions, strict=True))
    return {"accuracy": hits / len(labels), "precision": precision, "recall": recall, "f1": f1}


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """Return the padding token, and whether examples must go through the model one at a time.

    The model's own padding token comes first: RoBERTa counts positions by it, and the classifiers on top of decoders
    find the last token by it. A decoder that names none refuses batches.
    """
    own = model.config.get_text_config().pad_token_id
    if own is not None:
        return own, False
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token, _is_decoder(model)
    return 0, _is_decoder(model)


def _is_decoder(model: PreTrainedModel) -> bool:
    # Only encoders put their classifier on a token that padding cannot move.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    kind = model.config.get_text_config().model_type
    return kind in DECODERS and kind not in ENCODERS


def _batch(rows: list[dict[str, list[int]]], pad: int, side: str) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad}

    def padded(key: str, values: list[int]) -> list[int]:
        padding = [fill.get(key, 0)] * (longest - len(values))
        return padding + values if side == "left" else values + padding

    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in rows[0]]
    return {key: torch.tensor([padded(key, row[key]) for row in rows]) for key in keys}


def _read(logits: torch.Tensor, rows: list[int], model: PreTrainedModel) -> tuple[list[float], list[int]]:
    expected = (len(rows), model.config.num_labels)
    if tuple(logits.shape) != expected:
        raise UnsupportedModelError(
            f"TextClassification needs logits of shape {expected}, got {tuple(logits.shape)} "
            f"from {type(model).__name__}."
        )
    probabilities = logits.float().softmax(-1)
    bad = probabilities.isnan().any(-1)
    if bad.any():
        first = min(row for row, is_bad in zip(rows, bad.tolist(), strict=True) if is_bad)
        raise CompressionError(
            f"{type(model).__name__} must return finite logits, got NaN for example {first} of the data; "
            "the model is damaged, or its dtype too narrow: look at the step before this evaluation."
        )
    confidence, prediction = probabilities.max(-1)
    return confidence.tolist(), prediction.tolist()


def _chunks(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _count_truncated(
    task: TextClassification, tokenizer: PreTrainedTokenizerBase, limit: int | None, lengths: list[int]
) -> int:
    # Only a text that fills the limit can have been cut: only those are tokenised again, in full.
    full = [example for example, length in zip(task.examples, lengths, strict=True) if length == limit]
    if not full:
        return 0
    pairs = (
        [example.pair or "" for example in full] if any(example.pair is not None for example in task.examples) else None
    )
    whole = tokenizer([example.text for example in full], pairs, padding=False, truncation=False, verbose=False)
    return sum(len(ids) > (limit or 0) for ids in whole["input_ids"])
