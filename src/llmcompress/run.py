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
from .kept_blocks import blocks_kept
from .kept_scores import Measured, Scores
from .measured import differs, is_finite, plan_step, refuse_broken, run_step, speed_against
from .result import Report, StepRecord
from .resume import Kept, Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .evaluation.tasks import Task

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
        plan: of the first step; the others are planned once it is known what stands before them.
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
        plan: list[Action],
        remarks: Remarks,
        context: Context,
        judging: Judging,
        stages: Stages | None,
        report: Report,
    ) -> None:
        self._base, self._steps, self._plan, self._remarks = base, steps, plan, remarks
        self._context, self._judging, self._stages, self._report = context, judging, stages, report
        self._scores = Scores(stages.folder, judging.task) if stages and judging.task else None
        self._tokenizer = context.tokenizer
        self._inplace = context.teacher is None
        # Where the model stands is loaded, or copied from the base, when it is first needed.
        self._model: PreTrainedModel | None = None
        self._kept: Kept | None = None

    def go(self) -> PreTrainedModel:
        """Run the chain, and return what came of it.

        Raises:
            CompressionError: one of its branches: a gate that the task cannot tell about, before any step; a broken
                model; a failed gate with `on_fail="stop"`; another process at work on the same stage.
        """
        judging, report, context = self._judging, self._report, self._context
        asked = self._measure(self._base, together=False)
        report.base_score = asked.score if asked is not None else None
        together = check_gates(judging.gates, judging.task, report.base_score, inplace=self._inplace)
        finite = is_finite(self._base)
        shown = context.progress and len(self._steps) > 1
        bar = tqdm(self._steps, desc="compress", unit="step", disable=not shown, leave=False)
        for index, step in enumerate(bar):
            bar.set_description(type(step).__name__)
            back = self._way_back(index)
            record = self._stage(step, index, finite)
            measured = self._measure(None, together=together)
            if measured is not None:
                record.score, record.fidelity = measured.score, measured.fidelity
            if not self._passes(record):
                back()
                report.rolled_back = record
                report.not_run = [step.to_dict() for step in self._steps[index + 1 :]]
                break
            report.steps.append(record)
        model = self._now()
        if report.steps and not self._inplace:
            report.speedup = report.steps[-1].speedup or speed_against(self._base, model)
        return model

    def _now(self) -> PreTrainedModel:
        """Return the model as it stands."""
        if self._model is None:
            if self._kept is not None:
                self._model = self._kept.model(self._base).to(self._context.device)
            else:
                self._model = self._base if self._inplace else copy.deepcopy(self._base)
        return self._model

    def _stage(self, step: Compressor, index: int, finite: bool) -> StepRecord:
        """Run a step, or take what an earlier run made of it."""
        if self._stages is None:
            return self._done(step, index, finite)
        kept = self._stages.find(step)
        if kept is None:
            with self._stages.claimed():
                # Another process may have finished it while this one came here.
                kept = self._stages.finished()
                if kept is None:
                    return self._done(step, index, finite)
        self._kept, self._model = kept, None
        self._context.history.extend(kept.cuts)
        tokenizer = kept.tokenizer(self._now()) if kept.replaced else None
        if tokenizer is not None:
            self._context.replace_tokenizer(tokenizer)
        return kept.record

    def _done(self, step: Compressor, index: int, finite: bool) -> StepRecord:
        context, stages = self._context, self._stages
        cuts, tokenizer = len(context.history), context.tokenizer
        model = self._now()
        actions = self._plan if index == 0 else plan_step(step, model, context)
        context.work_in(stages.work_dir if stages is not None else None)
        with blocks_kept(step, model, context):
            model, record = run_step(step, model, [*actions, *self._remarks(step)], context)
        if finite:
            refuse_broken(step, model)
        last = self._report.steps[-1].footprint if self._report.steps else self._report.base
        if not self._inplace and differs(last, record.footprint):
            record.speedup = speed_against(self._base, model)
        self._model = model
        if stages is not None:
            replaced = context.tokenizer if context.tokenizer is not tokenizer else None
            self._kept = stages.keep(model, record, context.history[cuts:], replaced)
        return record

    def _passes(self, record: StepRecord) -> bool:
        """Judge a stage; False where it is to be undone.

        Raises:
            GateError: it failed, and the run is to stop.
        """
        task, gates, on_fail = self._judging.task, self._judging.gates, self._judging.on_fail
        base, stage = self._report.base_score, record.score
        if not gates or task is None or base is None or stage is None:
            return True
        comparable = True
        if self._context.tokenizer is not self._tokenizer:
            tokenizers = (self._tokenizer, self._context.tokenizer)
            comparable = same_question(task, (self._base, self._now()), tokenizers)
        evidence = Evidence(task, base, stage, record.fidelity, comparable)
        record.verdicts = tuple(gate.judge(evidence) for gate in gates)
        failed = failures(record.verdicts)
        if failed and on_fail == "stop":
            self._report.steps.append(record)
            raise GateError(f"{record.step['name']} failed {failed}.", self._report)
        return not failed or on_fail == "warn"

    def _measure(self, model: PreTrainedModel | None, *, together: bool) -> Measured | None:
        """Ask the task about `model`, None being where the run stands; what was kept of it serves."""
        task, context, scores, stages = self._judging.task, self._context, self._scores, self._stages
        if task is None:
            return None
        known = scores.find(stages.key, fidelity=together) if scores is not None and stages is not None else None
        if known is not None:
            return known
        stage = model if model is not None else self._now()
        models = {"base": self._base, "stage": stage} if together else {"stage": stage}
        tokenizers = {"base": self._tokenizer, "stage": context.tokenizer}
        found = score_models(task, models, tokenizers, progress=context.progress)
        measured = Measured(found.scores["stage"], found.fidelity.get("stage"))
        if scores is not None and stages is not None and stages.writes:
            scores.keep(stages.key, measured, fidelity=together)
        return measured

    def _way_back(self, index: int) -> Callable[[], None]:
        """Return what undoes the step that is about to run."""
        context, kept = self._context, self._kept
        cuts, tokenizer = len(context.history), context.tokenizer
        undoes = bool(self._judging.gates) and self._judging.on_fail == "rollback"
        # Before the first step stands a copy of the base, of which another can be made; a stage on disk can be read.
        on_disk = self._stages is not None and self._stages.writes
        before = copy.deepcopy(self._now()) if undoes and index and not on_disk else None

        def back() -> None:
            self._kept, self._model = kept, before
            del context.history[cuts:]
            if context.tokenizer is not tokenizer and tokenizer is not None:
                context.replace_tokenizer(tokenizer)

        return back
