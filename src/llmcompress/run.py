"""A model on its way through a chain: each step done or taken from disk, measured, judged, and undone if it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from .compressor import Action, Compressor, Context
from .errors import GateError
from .evaluation.scoring import same_question, score_models
from .gates import Evidence, Gate, OnFail, check_gates, failures
from .measured import differs, is_finite, plan_step, refuse_broken, run_step, speed_against
from .result import Report, StepRecord
from .resume import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .evaluation.fidelity import Fidelity
    from .evaluation.tasks import Task, TaskScore

Remarks = Callable[[Compressor], list[Action]]


@dataclass(frozen=True)
class Judging:
    """What each stage is asked.

    Attributes:
        task: evaluated on the base and on each stage; None evaluates nothing.
        gates: bounds on what a stage may lose.
        on_fail: what is done with a stage that fails one.
    """

    task: Task | None
    gates: Sequence[Gate] = ()
    on_fail: OnFail = "rollback"


class Run:
    """One run of a chain.

    Args:
        base: the model that the caller passed.
        steps: the chain, flat.
        plans: of each step, on the base.
        remarks: what else is said of a step.
        context: of the run.
        judging: what each stage is asked.
        stages: where finished stages are kept, or None.
        report: to be filled; its `base_score` is measured here.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        steps: Sequence[Compressor],
        plans: Sequence[list[Action]],
        remarks: Remarks,
        context: Context,
        judging: Judging,
        stages: Stages | None,
        report: Report,
    ) -> None:
        self._base, self._steps, self._plans, self._remarks = base, steps, plans, remarks
        self._context, self._judging, self._stages, self._report = context, judging, stages, report
        self._tokenizer = context.tokenizer
        self._inplace = context.teacher is None
        self._model = base

    def go(self) -> PreTrainedModel:
        """Run the chain, and return what came of it.

        Raises:
            CompressionError: one of its branches: a gate that the task cannot tell about, before any step; a broken
                model; a failed gate with `on_fail="stop"`.
        """
        judging, report, context = self._judging, self._report, self._context
        report.base_score, _ = self._measure(self._base, side_by_side=False)
        together = check_gates(judging.gates, judging.task, report.base_score, inplace=self._inplace)
        self._model = self._base if self._inplace else copy.deepcopy(self._base)
        finite = is_finite(self._model)
        shown = context.progress and len(self._steps) > 1
        bar = tqdm(self._steps, desc="compress", unit="step", disable=not shown, leave=False)
        for index, step in enumerate(bar):
            bar.set_description(type(step).__name__)
            back = self._way_back(index)
            record = self._resumed(step)
            if record is None:
                record = self._done(step, index, finite, together)
            if not self._passes(record, together):
                back()
                report.rolled_back = record
                report.not_run = [step.to_dict() for step in self._steps[index + 1 :]]
                break
            report.steps.append(record)
        if report.steps and not self._inplace:
            report.speedup = report.steps[-1].speedup or speed_against(self._base, self._model)
        return self._model

    def _done(self, step: Compressor, index: int, finite: bool, together: bool) -> StepRecord:
        context, stages = self._context, self._stages
        cuts, tokenizer = len(context.history), context.tokenizer
        # What stands before a later step is another model than was planned on before all work.
        actions = self._plans[0] if index == 0 else plan_step(step, self._model, context)
        context.work_in(stages.work_dir if stages is not None else None)
        self._model, record = run_step(step, self._model, [*actions, *self._remarks(step)], context)
        if finite:
            refuse_broken(step, self._model)
        record.score, record.fidelity = self._measure(self._model, side_by_side=together)
        last = self._report.steps[-1].footprint if self._report.steps else self._report.base
        if not self._inplace and differs(last, record.footprint):
            record.speedup = speed_against(self._base, self._model)
        if stages is not None:
            replaced = context.tokenizer if context.tokenizer is not tokenizer else None
            stages.keep(self._model, record, context.history[cuts:], replaced)
        return record

    def _resumed(self, step: Compressor) -> StepRecord | None:
        """Return the record of a step that an earlier run finished, if one did, and have its model."""
        found = self._stages.find(step) if self._stages is not None else None
        if found is None:
            return None
        self._model, record, cuts, tokenizer = found
        self._context.history.extend(cuts)
        if tokenizer is not None:
            self._context.replace_tokenizer(tokenizer)
        return record

    def _passes(self, record: StepRecord, together: bool) -> bool:
        """Judge a stage; False where it is to be undone.

        Raises:
            GateError: it failed, and the run is to stop.
        """
        task, gates, on_fail = self._judging.task, self._judging.gates, self._judging.on_fail
        base = self._report.base_score
        if not gates or task is None or base is None:
            return True
        if record.score is None or (together and record.fidelity is None):
            record.score, record.fidelity = self._measure(self._model, side_by_side=together)
        assert record.score is not None
        tokenizers = (self._tokenizer, self._context.tokenizer)
        comparable = same_question(task, (self._base, self._model), tokenizers)
        evidence = Evidence(task, base, record.score, record.fidelity, comparable)
        record.verdicts = tuple(gate.judge(evidence) for gate in gates)
        failed = failures(record.verdicts)
        if failed and on_fail == "stop":
            self._report.steps.append(record)
            raise GateError(f"{record.step['name']} failed {failed}.", self._report)
        return not failed or on_fail == "warn"

    def _measure(self, model: PreTrainedModel, *, side_by_side: bool) -> tuple[TaskScore | None, Fidelity | None]:
        task, context = self._judging.task, self._context
        if task is None:
            return None, None
        models = {"base": self._base, "stage": model} if side_by_side else {"stage": model}
        tokenizers = {"base": self._tokenizer, "stage": context.tokenizer}
        found = score_models(task, models, tokenizers, progress=context.progress)
        return found.scores["stage"], found.fidelity.get("stage")

    def _way_back(self, index: int) -> Callable[[], None]:
        """Return what undoes the step that is about to run."""
        context = self._context
        cuts, tokenizer = len(context.history), context.tokenizer
        undoes = bool(self._judging.gates) and self._judging.on_fail == "rollback"
        # Before the first step stands a copy of the base, of which another can be made.
        before = copy.deepcopy(self._model) if undoes and index else None

        def back() -> None:
            self._model = before if before is not None else copy.deepcopy(self._base)
            del context.history[cuts:]
            if context.tokenizer is not tokenizer and tokenizer is not None:
                context.replace_tokenizer(tokenizer)

        return back
