"""A task that is a function of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError
from tqdm.auto import tqdm

from ...data import load_rows
from ...errors import CompressionError, ConfigError, did_you_mean
from ...registry import tasks
from ..inference import evaluating
from ..statistics import Scale
from .task import Answer, ExampleResult, MetricKind, Task, TaskScore, check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Outcome = float | Mapping[str, float] | tuple[float | Mapping[str, float], Answer] | ExampleResult
"""What a function says of one example: a value, several by name, either with the prediction, or all there is."""


@tasks.register("custom")
@dataclass(frozen=True, eq=False, kw_only=True)
class CustomTask(Task):
    """Whatever a function makes of a model and an example.

    The function is called in eval mode without gradients, once an example, and returns a number, a dict of numbers, a
    pair of either with the prediction, or an `ExampleResult`. The task's metrics are the means of the numbers, with
    intervals and paired tests as for every task.

    Attributes:
        function: called as `function(model, tokenizer, example)` with a row of the data as it is.
        metric: name of the number; of several, the one that stands for the task.
        scale: how two models' values are compared: `"points"` is a share of [0, 1], `"difference"` and `"ratio"` are of
            other numbers, for a ratio of none below 0. A mapping says it for each metric (`"points"` where it says
            nothing).
        lower_is_better: whether less is better, or the names of the metrics of which less is better.
        batched: the function is called as `function(model, tokenizer, examples)` with `batch_size` rows, and returns a
            list with one outcome a row.
        head: the class of transformers that loads a folder.

    Raises:
        MissingInputError: there is no data.
        ConfigError: a setting is out of range or names a metric that the function does not return, or what the function
            returns is none of the above, NaN, or outside what its scale allows; the message names the example.
        CompressionError: the function fails; the message names the example.

    Example:
        >>> import llmcompress.testing as lt
        >>> def first_token_id(model, tokenizer, example):
        ...     logits = model(**tokenizer(example, return_tensors="pt")).logits
        ...     return int(logits[0, -1].argmax()) / 128
        >>> task = CustomTask(["a cat", "a dog"], function=first_token_id, metric="top")
        >>> score = task.evaluate(lt.tiny_model("llama"), lt.tiny_tokenizer(), progress=False)
        >>> score.primary, len(score.examples), 0 <= score.value <= 1
        ('top', 2, True)
    """

    function: Callable[[Any, Any, Any], Any]
    metric: str = "score"
    scale: Scale | Mapping[str, Scale] = "points"
    lower_is_better: bool | Collection[str] = False
    batched: bool = False
    head: str = "AutoModel"

    def __post_init__(self) -> None:
        import transformers

        if not callable(self.function):
            raise ConfigError(
                f"CustomTask.function must be callable as function(model, tokenizer, example), got {self.function!r}."
            )
        if not isinstance(self.metric, str) or not self.metric:
            raise ConfigError(f"CustomTask.metric must be a name, got {self.metric!r}.")
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        if not all(scale in get_args(Scale) for scale in scales):
            raise ConfigError(f"CustomTask.scale must be one of {get_args(Scale)}, got {self.scale!r}.")
        if isinstance(self.lower_is_better, str) or not isinstance(self.lower_is_better, (bool, Collection)):
            raise ConfigError(
                f"CustomTask.lower_is_better must be True, False or a list of metrics, got {self.lower_is_better!r}."
            )
        if not isinstance(self.head, str) or not hasattr(getattr(transformers, self.head, None), "from_pretrained"):
            raise ConfigError(
                f"CustomTask.head must be a class of transformers that loads a model, such as 'AutoModelForCausalLM', "
                f"got {self.head!r}."
            )
        super().__post_init__()
        # The class of transformers is this task's own; what reads it reads it off any task.
        object.__setattr__(self, "auto_class", self.head)

    @cached_property
    def examples(self) -> Sequence[Any]:
        """The rows of the data, as they are."""
        return load_rows(self.data, split=self.split, name="CustomTask.data")

    def shown(self, index: int) -> str:
        """The row."""
        return str(self.examples[index])

    def check(self, model: PreTrainedModel) -> None:
        """Accept any model: what it must be able to do, only the function knows."""

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, progress: bool = True
    ) -> TaskScore:
        """Call the function on every row; see `Task.evaluate`."""
        check_positive("batch_size", batch_size, optional=False)
        rows, size = self.examples, batch_size if self.batched else 1
        results: list[ExampleResult] = []
        with (
            evaluating(model),
            tqdm(total=len(rows), desc=self.name, unit="ex", disable=not progress, leave=False) as bar,
        ):
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                outcomes = self._called(model, tokenizer, batch, start)
                results += [self._result(outcome, start + at) for at, outcome in enumerate(outcomes)]
                if start == 0:
                    self._check_names(results)  # before the work on all the others
                bar.update(len(batch))
        self._check_names(results)
        protocol: dict[str, str | int | float | bool | None] = {
            "function": f"{getattr(self.function, '__module__', '')}.{getattr(self.function, '__qualname__', '')}",
            "batch_size": size,
        }
        kinds = {name: self._kind(name) for name in results[0].values}
        return self.score(results, primary=self.metric, protocol=protocol, kinds=kinds)

    def _called(self, model: Any, tokenizer: Any, batch: Sequence[Any], start: int) -> Sequence[Any]:
        where = f"example {start}" if len(batch) == 1 else f"examples {start} to {start + len(batch) - 1}"
        try:
            given = self.function(model, tokenizer, batch if self.batched else batch[0])
        except Exception as error:
            raise CompressionError(
                f"CustomTask.function failed on {where} of the data: {type(error).__name__}: {error}"
            ) from error
        if not self.batched:
            return [given]
        if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence) or len(given) != len(batch):
            raise ConfigError(
                f"CustomTask.function must return a list of {len(batch)} outcomes for {where} of the data (it is "
                f"batched), got {given!r:.80}."
            )
        return given

    def _result(self, outcome: Any, index: int) -> ExampleResult:
        where = f"CustomTask.function's outcome for example {index} of the data"
        if isinstance(outcome, ExampleResult):
            result = outcome
        else:
            values, prediction = outcome if isinstance(outcome, tuple) and len(outcome) == 2 else (outcome, None)
            try:
                named = values if isinstance(values, Mapping) else {self.metric: values}
                result = ExampleResult(
                    values={str(name): float(value) for name, value in named.items()},
                    prediction=tuple(prediction) if isinstance(prediction, list) else prediction,
                )
            except (TypeError, ValueError, ValidationError):
                raise ConfigError(
                    f"{where} must be a number, a dict of numbers, (either, prediction) or an ExampleResult, "
                    f"got {outcome!r:.80}."
                ) from None
        for name, value in result.values.items():
            if not math.isfinite(value):
                raise ConfigError(f"{where} must be finite, got {name}={value}; the model or the function is damaged.")
            if self._kind(name).scale == "points" and not 0 <= value <= 1:
                raise ConfigError(
                    f"{where} must be in [0, 1] where the scale is 'points', got {name}={value:.6g}; pass "
                    "scale='difference' or scale='ratio'."
                )
            if self._kind(name).scale == "ratio" and value < 0:
                raise ConfigError(
                    f"{where} must not be negative where the scale is 'ratio', got {name}={value:.6g}; pass "
                    "scale='difference'."
                )
        return result

    def _check_names(self, results: Sequence[ExampleResult]) -> None:
        names = list(results[0].values)
        if self.metric not in names:
            hint = did_you_mean(self.metric, names) or "."
            raise ConfigError(
                f"CustomTask.metric must be one of what the function returns, {', '.join(names) or 'nothing'}, "
                f"got {self.metric!r}{hint}"
            )
        for setting in ("scale", "lower_is_better"):
            named = getattr(self, setting)
            for name in () if isinstance(named, (str, bool)) else named:
                if name not in names:
                    hint = did_you_mean(str(name), names) or "."
                    raise ConfigError(
                        f"CustomTask.{setting} must name what the function returns, {', '.join(names)}, got "
                        f"{name!r}{hint}"
                    )
        for index, result in enumerate(results):
            if set(result.values) != set(names):
                raise ConfigError(
                    f"CustomTask.function must return the same metrics for every example, got {sorted(names)} for "
                    f"example 0 of the data and {sorted(result.values)} for example {index}."
                )

    def _kind(self, name: str) -> MetricKind:
        scale = self.scale.get(name, "points") if isinstance(self.scale, Mapping) else self.scale
        lower = self.lower_is_better
        return MetricKind(scale=scale, lower_is_better=lower if isinstance(lower, bool) else name in lower)
