"""The one interface that every task has, and what it returns."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, astuple, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from ...data import Example, load_examples
from ...errors import ConfigError, UnsupportedModelError
from ...registry import tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ExampleResult(BaseModel, frozen=True, extra="forbid"):
    """What a model did on one example (or one window of a text), so that two models can be compared pairwise."""

    score: float = Field(
        description="1 or 0 for right or wrong; the summed negative log-likelihood of a window, in nats"
    )
    weight: float = Field(default=1.0, description="what the score is divided by in the mean: 1, or the tokens scored")
    label: int | float | str | None = Field(default=None, description="what was asked for, as class index or text")
    prediction: int | float | str | None = Field(default=None, description="what the model answered")
    confidence: float | None = Field(default=None, description="probability of the prediction, in [0, 1]")

    @property
    def correct(self) -> bool | None:
        """Whether the prediction is the label; None for a task that has no right and wrong."""
        return None if self.label is None else self.prediction == self.label


class TaskScore(BaseModel, frozen=True, extra="forbid"):
    """The result of one task: its metrics, each example, and how it was done.

    Example:
        >>> score = TaskScore(task="toy", metrics={"accuracy": 0.5}, primary="accuracy", higher_is_better=True,
        ...                   fraction=True, examples=[ExampleResult(score=1), ExampleResult(score=0)], protocol={})
        >>> score.value
        0.5
    """

    task: str = Field(description="the task's name in the registry")
    metrics: dict[str, float] = Field(description="all metrics")
    primary: str = Field(description="name of the metric that stands for the task")
    higher_is_better: bool = Field(description="direction of the primary metric")
    fraction: bool = Field(description="whether the primary metric lies in [0, 1] and is shown in per cent")
    intervals: dict[str, tuple[float, float]] = Field(
        default={}, description="95 % intervals of the metrics that have one"
    )
    classes: tuple[str, ...] | None = Field(default=None, description="names of the classes, by index")
    examples: tuple[ExampleResult, ...] = Field(
        default=(), description="one result an example, in the order of the data"
    )
    protocol: dict[str, str | int | float | bool | None] = Field(
        description="data, lengths and settings: what was done"
    )
    warnings: tuple[str, ...] = Field(default=(), description="what a reader of the score should know")

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """Base of all tasks: labelled data, and how a model is scored on it.

    A subclass adds its settings as dataclass fields, checks them in `__post_init__` (after `super().__post_init__()`,
    which reads the data, so that a bad file is refused at once) and implements `evaluate`.

    Attributes:
        data: anything `llmcompress.data.load_examples` takes: lists, rows, a file, a `datasets` object, a hub name.
        split: which split of a hub data set or a `DatasetDict`.
        tokenizer: used where `evaluate` is given none.
    """

    data: Any
    _: KW_ONLY
    split: str = "test"
    tokenizer: PreTrainedTokenizerBase | None = None

    auto_class: ClassVar[str] = "AutoModel"
    """The class of transformers that loads a folder with the head this task needs."""

    def __post_init__(self) -> None:
        _ = self.examples

    @property
    def name(self) -> str:
        """The task's name in the registry."""
        return tasks.name_of(type(self))

    @cached_property
    def examples(self) -> list[Example]:
        """The data as a list of examples."""
        return load_examples(self.data, split=self.split, name=f"{type(self).__name__}.data")

    @cached_property
    def data_hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of all texts and labels, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(astuple(example), ensure_ascii=False, default=str).encode())
        return digest.hexdigest()[:16]

    @abstractmethod
    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose head cannot do the task, before any work.

        Raises:
            UnsupportedModelError: it cannot.
        """

    @abstractmethod
    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, progress: bool = True
    ) -> TaskScore:
        """Score `model`, which is left as it was.

        Args:
            model: a model with the head the task needs, on any device.
            tokenizer: its tokenizer.
            batch_size: examples a batch, at least 1.
            progress: whether a bar is shown.

        Raises:
            UnsupportedModelError: the model's head does not fit the task.
            CompressionError: the model returns NaN; the message names the example.
        """


def check_vocabulary(token_ids: list[list[int]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that the model has no embedding for: the sign of another model's tokenizer.

    Raises:
        ConfigError: naming the highest token and the size of the model's vocabulary.
    """
    vocabulary = model.config.get_text_config().vocab_size
    highest = max((max(ids) for ids in token_ids if ids), default=0)
    if highest >= vocabulary:
        raise ConfigError(
            f"tokenizer must be the one {type(model).__name__} was trained with: it gives token {highest}, but the "
            f"model's vocabulary has {vocabulary}; pass the tokenizer of the model's own folder."
        )


def check_positive(who: str, value: int | None, *, least: int = 1) -> None:
    """Refuse a count below `least`; None is allowed.

    Raises:
        ConfigError: `value` is no such integer.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"{who} must be an integer in [{least}, inf), got {value!r}.")


def unfit(task: Task, model: PreTrainedModel, needs: str, instead: str) -> UnsupportedModelError:
    """Return the error for a model whose head cannot do `task`."""
    return UnsupportedModelError(
        f"{type(task).__name__} needs {needs}, got {type(model).__name__}; "
        f"load it with {task.auto_class}, or {instead}."
    )
