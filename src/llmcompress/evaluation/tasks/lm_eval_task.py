"""The tasks of the Language Model Evaluation Harness, on a model in memory."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...anatomy.kept import random_state_kept
from ...errors import ConfigError, MissingInputError, UnknownNameError, did_you_mean
from ...registry import tasks
from ..inference import evaluating
from ..resampling import Floats, Metrics
from .task import ExampleResult, MetricKind, Task, TaskScore, check_causal, check_positive, not_finite, unfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OUR_NAMES = {"acc": "accuracy", "acc_norm": "accuracy_norm"}
_AVERAGE = "average"
_SHOWN_CHARACTERS = 400


@tasks.register("lm_eval")
@dataclass(frozen=True, eq=False, kw_only=True)
class LMEvalTask(Task):
    """Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), run by lm-eval itself.

    The model stays where it is; prompts, filters and metrics are lm-eval's. `acc` and `acc_norm` are called `accuracy`
    and `accuracy_norm` here; a filter's name follows behind a comma, as in `exact_match,strict-match`. With several
    tasks (or a group of tasks) each metric is named `task/metric`, and `average` is the mean over the tasks of each
    one's first metric, where all of these are shares of [0, 1] to be as high as possible.

    Only metrics that are means over examples are scores here, since only they have intervals and tests; what else
    lm-eval computes (BLEU of a corpus, the numbers of a group) is told in the protocol.

    Attributes:
        data: names of tasks or groups: a list, or one text with commas between them.
        num_fewshot: solved examples before each question; None leaves it to each task.
        limit: so many examples a task, from the first on, or a share of them below 1; None takes all.
        include_path: folder of your own tasks as lm-eval's YAML files, searched first; if it has all tasks of `data`,
            lm-eval's own index, which takes some seconds, is not read.

    Raises:
        MissingInputError: lm-eval is not installed (`pip install llmcompress[eval]`); no task is named; or the data of
            a task can be neither found nor downloaded.
        UnknownNameError: lm-eval has no task of a name.
        ConfigError: a setting is out of range; or no metric of a task is a mean over examples.
        UnsupportedModelError: the model is no language model.
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    include_path: str | Path | None = None

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        check_positive("LMEvalTask.num_fewshot", self.num_fewshot, least=0)
        limit = self.limit
        if limit is not None and (isinstance(limit, bool) or limit <= 0 or (limit > 1 and limit != int(limit))):
            raise ConfigError(f"LMEvalTask.limit must be a count of examples or a share in (0, 1), got {limit!r}.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise MissingInputError(f"LMEvalTask.include_path: there is no folder {str(self.include_path)!r}.")
        super().__post_init__()
        _ = self._index

    @cached_property
    def examples(self) -> Sequence[str]:
        """The names of the tasks: lm-eval reads their examples when it runs them."""
        names = self.data.split(",") if isinstance(self.data, str) else self.data
        if names is None or (isinstance(names, Sequence) and not names):
            raise MissingInputError("LMEvalTask.data is empty; name at least one task, for instance ['arc_easy'].")
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"LMEvalTask.data must be a list of lm-eval's names of tasks, got {names!r:.80}.")
        return tuple(dict.fromkeys(name.strip() for name in names))

    @cached_property
    def data_hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the tasks' names; a score's protocol has that of all prompts."""
        return _hash(list(self.examples))

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not generate text."""
        if not model.can_generate():
            raise unfit(self, model, "a language model", "evaluate it with another task")
        if not model.config.is_encoder_decoder:
            check_causal(self, model)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, progress: bool = True
    ) -> TaskScore:
        """Score `model` by lm-eval; see `Task.evaluate`. lm-eval shows how it builds its prompts in any case."""
        check_positive("batch_size", batch_size, optional=False)
        self.check(model)
        # lm-eval seeds the caller's random numbers, sets a padding token in the tokenizer, and ties weights anew.
        with random_state_kept(), evaluating(model), _without_tying(model):
            found = self._run(model, copy.deepcopy(tokenizer), batch_size, progress)
        return self._read(model, found, batch_size)

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """The mean of each metric over the examples of its task, and the average of the tasks; see `Task.metrics`."""
        names = list(dict.fromkeys(name for result in results for name in result.values))
        has = np.array([[name in result.values for name in names] for result in results], float)
        sums = np.array([[result.values.get(name, 0.0) for name in names] for result in results])
        firsts = [names.index(name) for name in dict.fromkeys(next(iter(result.values)) for result in results)]
        averaged = len(firsts) > 1 and bool(((sums[:, firsts] >= 0) & (sums[:, firsts] <= 1)).all())

        def metrics(counts: Floats) -> dict[str, Floats]:
            # A resample can lack a task altogether: its metrics are NaN there, which the bootstrap leaves out.
            with np.errstate(invalid="ignore", divide="ignore"):
                found = (counts @ sums) / (counts @ has)
            average = {_AVERAGE: found[:, firsts].mean(1)} if averaged else {}
            return {**average, **dict(zip(names, found.T, strict=True))}

        return metrics

    def shown(self, index: int) -> str:
        """The end of prompt number `index` and its choices, once the task has run."""
        return self._prompts[index] if index < len(self._prompts) else ""

    @cached_property
    def _prompts(self) -> list[str]:
        return []

    @cached_property
    def _index(self) -> Any:
        """lm-eval's index of tasks: of the caller's folder alone, if it has all names."""
        indices = [_index_of(str(self.include_path), False)] if self.include_path is not None else []
        if not indices or not set(self.examples) <= set(indices[0].all_tasks):
            indices = [_index_of(None if self.include_path is None else str(self.include_path), True)]
        for name in self.examples:
            if name not in indices[0].all_tasks:
                hint = did_you_mean(name, indices[0].all_tasks) or "."
                raise UnknownNameError(
                    f"LMEvalTask.data: lm-eval has no task called {name!r}{hint} `lm-eval ls tasks` lists them; give "
                    "your own by include_path."
                )
        return indices[0]

    def _run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: bool
    ) -> dict[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            loaded = self._index.load(list(self.examples))
        except OSError as error:
            raise MissingInputError(
                f"LMEvalTask: the data of {', '.join(self.examples)} can be neither found nor downloaded "
                f"({type(error).__name__}: {error}); give tasks with data of your own by include_path."
            ) from error
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(runner, request, partial(getattr(runner, request), disable_tqdm=not progress))
        grouped = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
        alone = [task for name, task in loaded["tasks"].items() if name not in grouped]
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=runner,
            tasks=[*loaded["groups"].values(), *alone],
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            bootstrap_iters=0,
            task_manager=self._index,
        )
        return found

    def _read(self, model: PreTrainedModel, found: Mapping[str, Any], batch_size: int) -> TaskScore:
        """Turn what lm-eval returns into a score."""
        import lm_eval

        several = len(found["samples"]) > 1
        results: list[ExampleResult] = []
        kinds: dict[str, MetricKind] = {}
        rest: dict[str, float] = {}
        self._prompts.clear()
        for name, samples in found["samples"].items():
            totals = {key: value for key, value in found["results"][name].items() if _is_number(value) and "," in key}
            documents: dict[int, dict[str, Any]] = {}
            for sample in samples:
                documents.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
            prefix = f"{name}/" if several else ""
            means = {key: _named(key, prefix) for key, value in totals.items() if _is_mean(key, value, documents)}
            if not means:
                raise ConfigError(
                    f"LMEvalTask.data: {name} has no metric that is a mean over examples (it has: "
                    f"{', '.join(totals)}); run it with lm-eval itself, or measure perplexity with LanguageModeling."
                )
            rest.update({f"{name}/{key}": float(value) for key, value in totals.items() if key not in means})
            for number, filtered in documents.items():
                results.append(_result(filtered, means, model, f"document {number} of {name}"))
                self._prompts.append(_prompt(next(iter(filtered.values()))))
            higher = found["higher_is_better"].get(name, {})
            for key, ours in means.items():
                values = [result.values[ours] for result in results if ours in result.values]
                share = all(0 <= value <= 1 for value in values)
                lower = higher.get(key.split(",")[0]) is False
                kinds[ours] = MetricKind(scale="points" if share else "difference", lower_is_better=lower)
        for name, group in found.get("groups", {}).items():
            rest.update({f"{name}/{key}": float(v) for key, v in group.items() if _is_number(v) and "," in key})
        firsts = list(dict.fromkeys(next(iter(result.values)) for result in results))
        protocol: dict[str, str | int | float | bool | None] = {
            "lm_eval": str(lm_eval.__version__),
            "tasks": ", ".join(found["samples"]),
            "versions": ", ".join(str(found["versions"].get(name)) for name in found["samples"]),
            "num_fewshot": ", ".join(str(found["n-shot"].get(name)) for name in found["samples"]),
            "limit": self.limit,
            "batch_size": batch_size,
            "data_sha256": _hash(
                [[s["doc_hash"], s["prompt_hash"]] for task in found["samples"].values() for s in task]
            ),
            **rest,
        }
        score = self.score(results, primary=firsts[0], protocol=protocol, kinds=kinds)
        if _AVERAGE in score.metrics and not any(kinds[name].lower_is_better for name in firsts):
            score = score.model_copy(update={"primary": _AVERAGE})
        return score


@cache
def _index_of(include_path: str | None, defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingInputError(
            "LMEvalTask needs lm-eval, which is not installed; run `pip install llmcompress[eval]`."
        ) from error
    return TaskManager(include_path=include_path, include_defaults=defaults)


def _named(key: str, prefix: str) -> str:
    metric, _, filtered = key.partition(",")
    return prefix + _OUR_NAMES.get(metric, metric) + ("" if filtered == "none" else f",{filtered}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_mean(key: str, total: float, documents: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> bool:
    """Whether lm-eval's `total` of metric `key` is the mean of what the single examples have."""
    metric, _, filtered = key.partition(",")
    values: list[Any] = [samples.get(filtered, {}).get(metric) for samples in documents.values()]
    if not all(_is_number(value) or isinstance(value, (bool, np.bool_)) for value in values):
        return False
    return math.isclose(math.fsum(map(float, values)) / len(values), total, rel_tol=1e-9, abs_tol=1e-12)


def _result(
    filtered: Mapping[str, Mapping[str, Any]], means: Mapping[str, str], model: PreTrainedModel, where: str
) -> ExampleResult:
    values = {ours: float(filtered[key.partition(",")[2]][key.partition(",")[0]]) for key, ours in means.items()}
    sample = next(iter(filtered.values()))
    answers, target = sample["filtered_resps"], sample["target"]
    label: int | str | None = None
    prediction: int | str | None = None
    if answers and all(isinstance(answer, (tuple, list)) and _is_number(answer[0]) for answer in answers):
        likelihoods = [float(answer[0]) for answer in answers]
        if not all(map(math.isfinite, likelihoods)):
            raise not_finite(model, where)
        if len(answers) > 1 and "acc_mutual_info" not in sample["metrics"]:
            prediction = int(np.argmax(likelihoods))
            label = int(target) if _is_number(target) else None
    elif answers and isinstance(answers[0], str):
        prediction, label = answers[0], str(target)
    return ExampleResult(values=values, label=label, prediction=prediction)


def _prompt(sample: Mapping[str, Any]) -> str:
    arguments = sample["arguments"]
    prompt = str(arguments[0][0])[-_SHOWN_CHARACTERS:]
    if len(arguments) < 2:
        return prompt
    return f"{prompt} {' | '.join(str(argument[-1]).strip() for argument in arguments)}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@contextmanager
def _without_tying(model: PreTrainedModel) -> Iterator[None]:
    """Keep the weights as they are: tying anew would undo what a compressor did to one of two tied layers."""
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights
