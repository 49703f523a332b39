"""The one interface that every task has, and what it returns."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, astuple, dataclass, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from ...data import load_examples, longest_input
from ...errors import CompressionError, ConfigError, UnsupportedModelError
from ...registry import tasks
from ..resampling import Floats, Metrics, resample
from ..statistics import Scale, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = int | float | str | tuple[int, ...] | tuple[str, ...]
"""A class index, a number, a text, or a sequence of these: one label a word, the set of a text's labels."""


class ExampleResult(BaseModel, frozen=True, extra="forbid"):
    """What a model did on one example (or one window of a text), so that two models can be compared pairwise."""

    values: dict[str, float] = Field(
        description="the metrics that a single example has: accuracy 1 or 0, the NLL of a token, the F1 of an answer"
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="what the example counts in a mean: 1, or the tokens scored",
    )
    label: Answer | None = Field(default=None, description="what was asked for")
    prediction: Answer | None = Field(default=None, description="what the model answered")
    confidence: float | None = Field(default=None, ge=0, le=1, description="probability of the prediction, in [0, 1]")
    group: int | None = Field(default=None, description="examples of one group (one source text) are not independent")


class MetricKind(BaseModel, frozen=True, extra="forbid"):
    """How a metric is read and compared."""

    scale: Scale = Field(default="points", description="points: a share of [0, 1], shown in per cent")
    lower_is_better: bool = Field(default=False)


class TaskScore(BaseModel, frozen=True, extra="forbid"):
    """The result of one task: its metrics, each example, and how it was done.

    Example:
        >>> results = [ExampleResult(values={"accuracy": 1}), ExampleResult(values={"accuracy": 0})]
        >>> score = TaskScore(task="toy", metrics={"accuracy": 0.5}, kinds={"accuracy": MetricKind()},
        ...                   primary="accuracy", examples=results, protocol={})
        >>> score.value, score.right
        (0.5, [True, False])
    """

    task: str = Field(description="the task's name in the registry")
    metrics: dict[str, float] = Field(description="all metrics")
    kinds: dict[str, MetricKind] = Field(description="how each metric is read")
    primary: str = Field(description="name of the metric that stands for the task")
    intervals: dict[str, tuple[float, float]] = Field(
        default={}, description="95 % intervals of the metrics; those that the sample cannot tell are missing"
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

    @property
    def kind(self) -> MetricKind:
        """How the primary metric is read."""
        return self.kinds[self.primary]

    @property
    def higher_is_better(self) -> bool:
        """Direction of the primary metric."""
        return not self.kind.lower_is_better

    @property
    def fraction(self) -> bool:
        """Whether the primary metric lies in [0, 1] and is shown in per cent."""
        return self.kind.scale == "points"

    @property
    def right(self) -> list[bool] | None:
        """Whether each example was answered right; None where the primary metric is not one of right and wrong."""
        return self.right_by(self.primary)

    def right_by(self, metric: str) -> list[bool] | None:
        """Whether each example was right by `metric`; None where that is not a matter of right and wrong."""
        if metric in self.kinds and self.kinds[metric].scale != "points":
            return None  # a count or a loss can be 0 or 1 for every example, and is no share of anything
        values = [example.values.get(metric) for example in self.examples]
        weighted = any(example.weight != 1 for example in self.examples)
        if not values or weighted or any(value not in (0, 1) for value in values):
            return None
        return [value == 1 for value in values]

    @property
    def groups(self) -> list[int] | None:
        """The group of each example; None where examples are independent."""
        found = [example.group for example in self.examples]
        return None if None in found else [group for group in found if group is not None]


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """Something to be good at, with the data to measure it on.

    A subclass adds its settings as dataclass fields, checks them in `__post_init__` (after `super().__post_init__()`,
    which reads the data, so that a bad file is refused at once) and implements `check` and `evaluate`. One whose
    examples go through the model batch by batch is a `ForwardTask` instead, and gets fidelity to the base for free.

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

    kinds: ClassVar[Mapping[str, MetricKind]] = {}
    """Metrics that are not a share of [0, 1] where more is better."""

    metric_names: ClassVar[Sequence[str] | None] = None
    """Every metric that a score may have, by which a wrong name is refused before any work; None: only a run tells."""

    def __post_init__(self) -> None:
        _ = self.examples

    @property
    def name(self) -> str:
        """The task's name in the registry."""
        return tasks.name_of(type(self))

    @cached_property
    def examples(self) -> Sequence[Any]:
        """The data, one dataclass an example."""
        return load_examples(self.data, split=self.split, name=f"{type(self).__name__}.data")

    @cached_property
    def data_hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of all examples, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            plain = astuple(example) if is_dataclass(example) and not isinstance(example, type) else example
            digest.update(json.dumps(plain, ensure_ascii=False, default=str).encode())
        return digest.hexdigest()[:16]

    def shown(self, index: int) -> str:
        """Return example number `index` as a person would read it, for reports; empty where nothing can be shown."""
        text = getattr(self.examples[index], "text", "")
        pair = getattr(self.examples[index], "pair", None)
        return f"{text} | {pair}" if pair else str(text)

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

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """Return the task's metrics over `results`, as a function of how often each counts (see `resampling`).

        The means of what single examples have; a task whose metrics are more than means adds them.
        """
        return means(results)

    def score(
        self,
        results: Sequence[ExampleResult],
        *,
        primary: str,
        protocol: Mapping[str, str | int | float | bool | None],
        classes: tuple[str, ...] | None = None,
        warnings: Sequence[str] = (),
        kinds: Mapping[str, MetricKind] | None = None,
    ) -> TaskScore:
        """Put a score together: the metrics of `results`, each with its interval; `kinds` goes before the task's."""
        metrics = self.metrics(results)
        value = {name: float(values[0]) for name, values in metrics(np.ones((1, len(results)))).items()}
        partial = TaskScore(
            task=self.name,
            metrics=value,
            kinds={name: {**self.kinds, **(kinds or {})}.get(name, MetricKind()) for name in value},
            primary=primary,
            classes=classes,
            examples=tuple(results),
            protocol={"data_sha256": self.data_hash, "examples": len(results), **protocol},
            warnings=tuple(warnings),
        )
        return partial.model_copy(update={"intervals": _intervals(partial, metrics)})


def means(results: Sequence[ExampleResult]) -> Metrics:
    """Return the weighted mean of each value that all `results` have, as a function of how often each counts.

    Example:
        >>> results = [ExampleResult(values={"nll": 2.0}, weight=3), ExampleResult(values={"nll": 1.0}, weight=1)]
        >>> means(results)(np.array([[1.0, 1.0], [0.0, 2.0]]))["nll"].tolist()
        [1.75, 1.0]
    """
    names = [name for name in results[0].values if all(name in result.values for result in results)]
    weights = np.array([result.weight for result in results])
    sums = np.array([[result.values[name] for name in names] for result in results]) * weights[:, None]

    def metrics(counts: Floats) -> dict[str, Floats]:
        found = (counts @ sums) / (counts @ weights)[:, None]
        return dict(zip(names, found.T, strict=True))

    return metrics


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


def check_positive(who: str, value: int | None, *, least: int = 1, optional: bool = True) -> None:
    """Refuse a count below `least`, and None unless it is `optional`.

    Raises:
        ConfigError: `value` is no such integer.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{who} must be an integer in [{least}, inf), got {value!r}.")


def check_string(who: str, value: str) -> None:
    """Refuse what is no text; an empty one is.

    Raises:
        ConfigError: `value` is none.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{who} must be a text, got {value!r:.80}.")


def length_limit(
    task: Task,
    max_length: int | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pair: bool = False,
) -> int | None:
    """Return the tokens that a text is cut to: `max_length`, or the most that the model can take where it is None.

    Args:
        task: whose setting it is.
        max_length: the setting.
        model: whose input it is.
        tokenizer: which adds special tokens to a text, or `pair` of them.
        pair: whether texts come in pairs.

    Raises:
        ConfigError: the model cannot take so many, or special tokens leave no room for a text. A tokenizer would then
            cut nothing.
    """
    most = longest_input(model, tokenizer)
    who = f"{type(task).__name__}.max_length"
    if max_length is not None and most is not None and max_length > most:
        raise ConfigError(
            f"{who} must be at most {most} for {type(model).__name__}, got {max_length}; leave it out to take that."
        )
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length is not None and max_length <= special:
        raise ConfigError(
            f"{who} must be above {special}, the special tokens around a {'pair of texts' if pair else 'text'}, got "
            f"{max_length}."
        )
    return max_length or most


def check_causal(task: Task, model: PreTrainedModel) -> None:
    """Refuse a model that does not predict the next token from those before it alone.

    Raises:
        UnsupportedModelError: it has no such head, or reads the text behind a token too.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config = model.config
    if config.is_encoder_decoder or not model.can_generate():
        raise unfit(task, model, "a causal language model", "evaluate it with another task")
    # Encoders come with a causal head too, and see what they are asked for unless they are told not to look ahead.
    reads_ahead = config.model_type in ENCODERS and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    )
    if reads_ahead or getattr(config, "attn_type", None) == "bi":
        raise UnsupportedModelError(
            f"{type(task).__name__} needs a causal language model, got {type(model).__name__}, an encoder that also "
            "reads what stands behind a token (config.is_decoder is not True); evaluate it with MaskedLanguageModeling."
        )


def unfit(task: Task, model: PreTrainedModel, needs: str, instead: str) -> UnsupportedModelError:
    """Return the error for a model whose head cannot do `task`."""
    return UnsupportedModelError(
        f"{type(task).__name__} needs {needs}, got {type(model).__name__}; "
        f"load it with {task.auto_class}, or {instead}."
    )


def not_finite(model: PreTrainedModel, where: str) -> CompressionError:
    """Return the error for a model that put out NaN or infinity; `where` names the example."""
    return CompressionError(
        f"{type(model).__name__} must return finite logits, got NaN or infinity for {where}; the model is damaged, or "
        "its dtype too narrow: look at the step before this evaluation."
    )


def _intervals(score: TaskScore, metrics: Metrics) -> dict[str, tuple[float, float]]:
    found = {}
    groups = score.groups
    for name, resampled in resample(metrics, len(score.examples), groups=groups).items():
        right = score.right_by(name) if groups is None else None
        ends = wilson(sum(right), len(right)) if right is not None else resampled.interval()
        if ends is not None:
            found[name] = ends
    return found
