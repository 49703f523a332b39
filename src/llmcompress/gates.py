"""Bounds on what a stage may lose against the base, asked after each stage of a chain on the same examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field

from .compressor import Settings
from .errors import ConfigError, did_you_mean
from .evaluation.fidelity import Fidelity
from .evaluation.scoring import in_classes_of, paired_tests
from .evaluation.statistics import PairedTest, wilson
from .evaluation.tasks import ForwardTask, Task, TaskScore
from .registry import gates as known

OnFail = Literal["rollback", "stop", "warn"]
"""What a run does with a stage that failed a gate: undo it and end, raise `GateError`, or go on and tell."""

_Ends = tuple[float | None, float | None]
_INCOMPARABLE = "the stage was not asked the very same as the base (other tokens), so the two cannot be compared"


class Verdict(BaseModel, frozen=True, extra="forbid"):
    """What one gate found of one stage."""

    gate: dict[str, Any] = Field(description="the gate as a dict, which `compress` takes again")
    passed: bool
    value: float | None = Field(description="what was measured, in the gate's own unit; None if nothing could be")
    bound: float = Field(description="the bound that it was held against, in the same unit")
    low: float | None = Field(default=None, description="lower end of the 95 % interval of `value`, if it is known")
    high: float | None = Field(default=None, description="upper end")
    told: str = Field(description="the finding in words")


@dataclass(frozen=True)
class Evidence:
    """What is known of one stage.

    Attributes:
        task: what base and stage were asked.
        base: the base's score.
        stage: the stage's.
        fidelity: how closely the stage's answers are the base's, where both ran side by side.
        comparable: whether the stage was asked for the very tokens that the base was.
    """

    task: Task
    base: TaskScore
    stage: TaskScore
    fidelity: Fidelity | None = None
    comparable: bool = True

    @cached_property
    def tests(self) -> Mapping[str, PairedTest]:
        """Every metric of the stage against the base's; empty where the two were asked differently."""
        tests = paired_tests(self.task, self.base, self.stage) if self.comparable else []
        return {test.metric: test for test in tests}


class Gate(Settings, ABC):
    """Base of the bounds. Fields are passed by position or by name; `to_dict` writes what `compress` reads back."""

    def __init__(self, /, *values: Any, **fields: Any) -> None:
        named = dict(zip(type(self).model_fields, values, strict=False))
        twice = next((name for name in named if name in fields), None)
        if twice is not None or len(values) > len(named):
            order = ", ".join(type(self).model_fields)
            raise ConfigError(f"{type(self).__name__} must get each of its fields ({order}) once, got {values!r}.")
        super().__init__(**named, **fields)

    def side_by_side(self, base: TaskScore) -> bool:
        """Whether base and stage must run side by side, since the scores alone do not tell."""
        return False

    def check_names(self, task: Task) -> None:
        """Refuse a task that cannot tell, as far as it is known before anything was scored; by default nothing is.

        Raises:
            ConfigError: says what task is needed.
        """
        return

    @abstractmethod
    def check(self, task: Task, base: TaskScore) -> None:
        """Refuse a task that cannot tell.

        Raises:
            ConfigError: says what task is needed.
        """

    @abstractmethod
    def judge(self, evidence: Evidence) -> Verdict:
        """Hold a stage against the bound."""

    def to_dict(self) -> dict[str, Any]:
        """Return the gate as a plain dict, its name included."""
        return {"name": known.name_of(type(self)), **self.model_dump(mode="json")}

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self)})"

    def _verdict(self, bound: float, value: float | None, ends: _Ends, passed: bool, told: str) -> Verdict:
        low, high = ends
        told = f"{self}: {told}"
        return Verdict(gate=self.to_dict(), passed=passed, value=value, bound=bound, low=low, high=high, told=told)


@known.register("max_drop")
class MaxDrop(Gate):
    """A metric may be worse than the base's by `drop` at most.

    Worse is lower or higher as the metric goes. A share of [0, 1] is counted in its own unit (0.01 is one point), a
    perplexity relatively (0.01 is 1 % higher), any other number by its difference.

    Args:
        metric: its name, such as `"accuracy"`.
        drop: the largest loss that passes, at least 0.
        proven: whether the far end of the loss's 95 % interval must keep the bound, as in
            `Comparison.assert_non_inferior`, and not only what was seen on these examples.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> import llmcompress as lc
        >>> lc.MaxDrop("accuracy", 0.01).to_dict()
        {'name': 'max_drop', 'metric': 'accuracy', 'drop': 0.01, 'proven': False}
    """

    metric: str = Field(description="name of the metric")
    drop: float = Field(ge=0, description="the largest loss that passes")
    proven: bool = Field(False, description="the interval's far end must keep the bound")

    def check_names(self, task: Task) -> None:
        """Refuse a task that never has the metric, whatever its data."""
        if task.metric_names is not None:
            self._refuse_unknown(task, task.metric_names)

    def check(self, task: Task, base: TaskScore) -> None:
        """Refuse a task without the metric."""
        self._refuse_unknown(task, base.metrics)

    def _refuse_unknown(self, task: Task, names: Collection[str]) -> None:
        if self.metric not in names:
            hint = did_you_mean(self.metric, names) or "."
            raise ConfigError(
                f"MaxDrop.metric must be one of the task's, got {self.metric!r}{hint} {type(task).__name__} has: "
                f"{', '.join(names)}."
            )

    def judge(self, evidence: Evidence) -> Verdict:
        """Compare the loss, or the far end of its interval, with `drop`."""
        test = evidence.tests.get(self.metric)
        if test is None:
            return self._verdict(self.drop, None, (None, None), False, _INCOMPARABLE)
        seen, *ends = test.losses(lower_is_better=evidence.base.kinds[self.metric].lower_is_better)
        counted = ends[1] if self.proven else seen
        unit = " of the base's" if test.scale == "ratio" else ""
        within = _within((ends[0], ends[1]), self.proven)
        told = f"{self.metric} is worse by {seen:.4g}{unit}{within}, {self.drop:g} is allowed"
        return self._verdict(self.drop, seen, (ends[0], ends[1]), counted is not None and counted <= self.drop, told)


@known.register("max_perplexity_ratio")
class MaxPerplexityRatio(Gate):
    """The perplexity may be `ratio` times the base's at most.

    The task must measure one: `LanguageModeling`, or `MaskedLanguageModeling` (its pseudo-perplexity).

    Args:
        ratio: stage over base, above 0: 1.05 is 5 % higher.
        proven: whether the upper end of the ratio's 95 % interval must keep the bound.

    Raises:
        ConfigError: a field is out of range.

    Example:
        >>> import llmcompress as lc
        >>> print(lc.MaxPerplexityRatio(1.05))
        MaxPerplexityRatio(ratio=1.05, proven=False)
    """

    ratio: float = Field(gt=0, description="stage over base at most")
    proven: bool = Field(False, description="the interval's upper end must keep the bound")

    def check(self, task: Task, base: TaskScore) -> None:
        """Refuse a task without a perplexity."""
        if _perplexity(base) is None:
            raise ConfigError(
                f"MaxPerplexityRatio needs a task with a perplexity, such as LanguageModeling, got "
                f"{type(task).__name__} with {', '.join(base.metrics)}; bound one of these with MaxDrop."
            )

    def judge(self, evidence: Evidence) -> Verdict:
        """Compare the ratio, or the upper end of its interval, with the bound."""
        name = _perplexity(evidence.base)
        test = evidence.tests.get(name or "")
        if test is None:
            return self._verdict(self.ratio, None, (None, None), False, _INCOMPARABLE)
        counted = test.high if self.proven else test.change
        within = _within((test.low, test.high), self.proven)
        told = f"{name} is {test.change:.4g} times the base's{within}, {self.ratio:g} is allowed"
        passed = counted is not None and counted <= self.ratio
        return self._verdict(self.ratio, test.change, (test.low, test.high), passed, told)


@known.register("min_agreement")
class MinAgreement(Gate):
    """At least this share of the answers must be the base's, right or wrong.

    Two models of one accuracy may disagree on many examples ("Accuracy is Not All You Need", arXiv 2407.09141). Answers
    are the predictions of the task's examples, or, where a task has none, as `LanguageModeling`, the most likely
    tokens; for those the base runs beside each stage.

    Args:
        share: of the answers, in (0, 1].

    Raises:
        ConfigError: it is out of range.

    Example:
        >>> import llmcompress as lc
        >>> lc.MinAgreement(95)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: MinAgreement.share must be in (0, 1], got 95.
    """

    share: float = Field(gt=0, le=1, description="share of equal answers at least")

    def side_by_side(self, base: TaskScore) -> bool:
        """Where examples have no predictions."""
        return not _predicts(base)

    def check(self, task: Task, base: TaskScore) -> None:
        """Refuse a task whose answers cannot be equal."""
        numbers = any(isinstance(example.prediction, float) for example in base.examples)
        if numbers or not (_predicts(base) or isinstance(task, ForwardTask)):
            raise ConfigError(
                f"MinAgreement needs a task whose answers can be equal, such as TextClassification, MultipleChoice or "
                f"LanguageModeling, got {type(task).__name__}{' of a regression' if numbers else ''}; use MaxDrop."
            )

    def judge(self, evidence: Evidence) -> Verdict:
        """Count the equal answers."""
        value: float | None = None
        ends: _Ends = (None, None)
        stage = in_classes_of(evidence.task, evidence.base, evidence.stage)
        if _predicts(evidence.base) and len(evidence.base.examples) == len(stage.examples):
            pairs = zip(evidence.base.examples, stage.examples, strict=True)
            same = [ours.prediction == theirs.prediction for ours, theirs in pairs]
            value, ends = sum(same) / len(same), wilson(sum(same), len(same))
        elif evidence.fidelity is not None:
            value = evidence.fidelity.top1_agreement
        if value is None:
            return self._verdict(self.share, None, ends, False, _INCOMPARABLE)
        told = f"{value:.4g} of the answers are the base's{_within(ends)}, {self.share:g} is needed"
        return self._verdict(self.share, value, ends, value >= self.share, told)


def read_gates(given: Any, on_fail: str, task: Task | None, *, inplace: bool) -> list[Gate]:
    """Read what `compress` was given as gates: one or several, each an object or a dict with its name.

    Raises:
        ConfigError: something else, no task to ask, an unknown `on_fail`, or a roll-back with `inplace`.
        UnknownNameError: a dict names no gate.
    """
    if on_fail not in get_args(OnFail):
        raise ConfigError(f"on_fail must be one of {', '.join(map(repr, get_args(OnFail)))}, got {on_fail!r}.")
    listed = [given] if isinstance(given, (Gate, Mapping, str)) else given
    if not isinstance(listed, Sequence):
        raise ConfigError(f"gates must be a list such as [lc.MaxDrop('accuracy', 0.01)], got {given!r}.")
    found: list[Gate] = [gate if isinstance(gate, Gate) else known.create(gate) for gate in listed]
    if found and task is None:
        raise ConfigError(
            f"{type(found[0]).__name__} needs a task to measure on; pass task=lc.TextClassification(...)."
        )
    if task is not None:
        for gate in found:
            gate.check_names(task)
    if found and inplace and on_fail == "rollback":
        raise ConfigError(
            "on_fail='rollback' needs the model before each step, which inplace=True overwrites; drop inplace, or pass "
            "on_fail='stop' or 'warn'."
        )
    return found


def check_gates(gates: Sequence[Gate], task: Task | None, base: TaskScore | None, *, inplace: bool) -> bool:
    """Refuse gates that the task cannot tell about; return whether base and stages must run side by side.

    Raises:
        ConfigError: a metric that the task has not, or answers that cannot be compared; or the base must run beside the
            stages, and is overwritten.
    """
    if task is None or base is None:
        return False
    for gate in gates:
        gate.check(task, base)
        if inplace and gate.side_by_side(base):
            raise ConfigError(f"{gate} runs the base beside each stage, which inplace=True overwrites; drop inplace.")
    return any(gate.side_by_side(base) for gate in gates)


def failures(verdicts: Iterable[Verdict]) -> str:
    """Say which gates were failed, and by how much; an empty text where none was."""
    return "; ".join(verdict.told for verdict in verdicts if not verdict.passed)


def _within(ends: _Ends, proven: bool = False) -> str:
    """Write the 95 % interval of what was seen; where there is none, say so if a proof was asked for."""
    low, high = ends
    if low is None or high is None:
        return " (the sample tells no 95 % interval, use more examples)" if proven else ""
    return f" (95 % interval {low:.4g} to {high:.4g})"


def _perplexity(score: TaskScore) -> str | None:
    """Return the metric that is a perplexity, the primary one if it is."""
    names = sorted(score.metrics, key=lambda name: name != score.primary)
    return next((name for name in names if "perplexity" in name and score.kinds[name].scale == "ratio"), None)


def _predicts(score: TaskScore) -> bool:
    return bool(score.examples) and all(example.prediction is not None for example in score.examples)
