"""`lc.sweep` and `lc.orders`: many chains from one model, each piece of work done once, and one comparison."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint import load
from ..comparison import Comparison, Entry, compare
from ..compressor import Context
from ..distillation.cache import TeacherCache
from ..errors import CompressionError, ConfigError, did_you_mean
from ..evaluation.cost import Shape, plan_costs
from ..inputs import check_inputs, check_model, refuse_unready
from ..measured import check_chain
from ..pipeline import Pipeline, Step
from ..processes import launched
from ..report.plots import Point, pareto_front
from .asked import check_settings, read_chains, read_tasks
from .chains import Job, allowed_orders, plan_jobs, with_answers
from .launch import Team, Where, launch
from .work import Outcome, Run, Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import Task

Cost = Literal["disk", "memory", "latency"]


@dataclass(frozen=True, repr=False)
class Sweep:
    """What many chains made of one model.

    Attributes:
        comparison: the base and what each chain made of it, measured side by side.
        chains: by name; those that failed as well.
        folders: where the models are: plain `from_pretrained` loads them.
        failed: why a chain gave no model.
        steps_run: steps that were finished, now or by an earlier run.
        steps_asked: steps of all chains; the difference is what they share, and what a failure kept from running.
    """

    comparison: Comparison
    chains: Mapping[str, Pipeline]
    folders: Mapping[str, Path]
    failed: Mapping[str, str]
    steps_run: int
    steps_asked: int
    # A folder that nobody named lives as long as what was found in it.
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def load(self, name: str) -> PreTrainedModel:
        """Return the model that a chain made.

        Raises:
            ConfigError: there is no such chain, or it failed.
        """
        if name not in self.folders:
            raise ConfigError(
                f"name must be a chain that was finished, got {name!r}; there is: {', '.join(self.folders) or 'none'}."
            )
        return load(self.folders[name])

    def front(self, cost: Cost = "disk", metric: str | None = None) -> list[str]:
        """Return the models, base included, that no other beats in both quality and cost; the cheapest first.

        Args:
            cost: bytes on "disk" or in "memory", or the time of a pass, "latency", at the first shape measured.
            metric: of the first task; None takes its primary one.

        Raises:
            ConfigError: no such metric, or latency was not measured.
        """
        higher_is_better = self._higher_is_better(metric)
        points = [Point(entry.name, _cost(entry, cost), _quality(entry, metric)) for entry in self.comparison.entries]
        return [point.name for point in pareto_front(points, higher_is_better=higher_is_better)]

    def best(self, metric: str | None = None) -> str:
        """Return the chain whose model has the best metric; of equals the smallest.

        Args:
            metric: of the first task; None takes its primary one.

        Raises:
            ConfigError: every chain failed, or no such metric.
        """
        entries = self.comparison.candidates
        if not entries:
            raise ConfigError(f"no chain was finished: {'; '.join(self.failed.values())}.")
        sign = -1 if self._higher_is_better(metric) else 1
        return min(entries, key=lambda entry: (sign * _quality(entry, metric), _cost(entry, "disk"))).name

    def _higher_is_better(self, metric: str | None) -> bool:
        score = self.comparison.base.evaluation.scores[0]
        name = metric or score.primary
        if name not in score.kinds:
            hint = did_you_mean(name, score.kinds) or "."
            raise ConfigError(
                f"metric must be one of the first task, got {name!r}{hint} It has: {', '.join(score.kinds)}."
            )
        return not score.kinds[name].lower_is_better

    def notes(self) -> list[str]:
        """Return what was shared, which models are on the front, and what failed: a line each."""
        why = "chains share their beginnings" + (", and what fails does not end" if self.failed else "")
        lines = [f"{self.steps_asked} steps were asked for, {self.steps_run} were run: {why}."]
        lines.append(f"On the front of quality and bytes on disk: {', '.join(self.front())}.")
        return lines + [f"{name} failed: {reason}" for name, reason in self.failed.items()]

    def __str__(self) -> str:
        return "\n".join([str(self.comparison), "", *self.notes()])

    def __repr__(self) -> str:
        return f"Sweep({', '.join(map(repr, self.chains))})"

    def _repr_html_(self) -> str:
        from xml.sax.saxutils import escape

        return self.comparison._repr_html_() + "".join(f"<p>{escape(line)}</p>" for line in self.notes())


def sweep(
    model: PreTrainedModel | str | Path,
    chains: Mapping[str, Step | Sequence[Step]],
    task: Task | Sequence[Task],
    *,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recover: Step | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    answers: TeacherCache | None = None,
    workers: int = 1,
    on: Where = "processes",
    threads: int | None = None,
    latency: bool | Sequence[Shape] = True,
    progress: bool = True,
) -> Sweep:
    """Run many chains from one model, what they share once, and compare all that they made.

    Under `accelerate launch` or `torchrun` every process is a worker, and all return the same. Strategies that are
    defined in the running script are known to this process alone: install them as a plug-in for more workers.

    Args:
        model: a Hugging Face model, or a folder or hub name; never changed, and the teacher of distillation.
        chains: by name: a step or several, as `lc.compress` takes them.
        task: that all are compared on; one or several.
        data: training or calibration examples; anything that `load_examples` takes.
        tokenizer: for the texts of `data` and `task`; found in the model's folder if it came from one.
        recover: a `KnowledgeDistillation` behind every step that changes weights; see `Pipeline`.
        seed: of every chain.
        folder: where stages, answers and models are; the next sweep there, of the same chains or others, does only
            what is new. None takes one that lives as long as what is returned. All workers must see it.
        answers: the teacher's answers that all distillations read that have no cache of their own; None keeps those of
            soft labels, where they are kept whole: not of language models.
        workers: how many chains are worked on at once.
        on: "processes" of this machine, or the workers of a "ray" cluster.
        threads: of torch, in each worker; None leaves them. Equal numbers give equal results, bit by bit.
        latency: whether to time the models, or the (rows, tokens) shapes at which to; see `lc.compare`.
        progress: whether bars are shown.

    Raises:
        CompressionError: one of its branches, before any work, if a chain cannot run: wrong order, missing data,
            nothing to compress. What fails later is told in `failed`, and the other chains go on.

    Example:
        >>> import llmcompress as lc
        >>> import llmcompress.testing as lt
        >>> half = lc.MagnitudePruning(sparsity=0.5)
        >>> found = lc.sweep(
        ...     lt.tiny_model("bert"),
        ...     {"half": half, "half, int8": [half, lc.DynamicQuantization()]},
        ...     lc.TextClassification([("good", 1), ("bad", 0)]),
        ...     tokenizer=lt.tiny_tokenizer(),
        ...     latency=False,
        ...     progress=False,
        ... )
        >>> sorted(found.folders), (found.steps_asked, found.steps_run)
        (['half', 'half, int8'], (3, 2))
    """
    read = read_chains(chains, recover)
    tasks = read_tasks(task)
    check_settings(workers=workers, on=on, threads=threads, seed=seed, folder=folder)
    check_model(model)
    if folder is None and launched():
        raise ConfigError("folder must be one that all processes see, got None; pass folder='sweep'.")
    if isinstance(model, (str, Path)):
        model = load(model)
    temporary = tempfile.TemporaryDirectory(prefix="llmcompress-") if folder is None else None
    place = Path(temporary.name if temporary is not None else str(folder)).absolute()
    read = with_answers(read, model, answers, place / "answers")
    flat = [step for chain in read.values() for step in chain.flatten()]
    refuse_unready(model)
    examples, tokenizer = check_inputs(model, flat, data, tokenizer, None, inplace=False)
    context = Context(data=examples, tokenizer=tokenizer, teacher=model, seed=seed, device=model.device, progress=False)
    here = workers == 1 and on == "processes" and not launched()
    _check(read, model, context, here=here)
    for one in tasks:
        one.check(model)
    plan_costs({"model": model}, latency=latency)

    jobs = plan_jobs(read)
    team = Team.meet()
    run = Run(place, team.name)
    worker = Worker(run, jobs, model, tokenizer, examples, seed, threads, progress)
    if here:
        worker.go()
    else:
        if team.leads:
            worker.write()
        team.wait()
        launch(run, workers, on)
    if team.leads:
        found = _compared(run, jobs, model, tasks, tokenizer=tokenizer, latency=latency, progress=progress)
        found.save(run.comparison)
    team.wait()
    if team.leads:
        run.forget_base()
    failed = _failed(run, jobs)
    return Sweep(
        comparison=Comparison.from_json(run.comparison.read_text(encoding="utf-8")),
        chains=read,
        folders={chain: run.model(chain) for chain in read if chain not in failed},
        failed=failed,
        steps_run=_steps_run(run, jobs),
        steps_asked=len(flat),
        _temporary=temporary,
    )


def orders(
    model: PreTrainedModel | str | Path,
    steps: Step | Sequence[Step],
    task: Task | Sequence[Task],
    *,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recover: Step | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    answers: TeacherCache | None = None,
    workers: int = 1,
    on: Where = "processes",
    threads: int | None = None,
    latency: bool | Sequence[Shape] = True,
    progress: bool = True,
) -> Sweep:
    """Try every order of some steps that a pipeline allows; `.best()` of what is returned tells which is best.

    Args:
        model: a Hugging Face model, or a folder or hub name.
        steps: at most five; a `Pipeline` among them keeps its order. Of one that is alone the steps are taken, and its
            `recover`. Where several are of one kind, the names of the orders number them.
        task: that the orders are compared on.
        data: training or calibration examples.
        tokenizer: for the texts.
        recover: a `KnowledgeDistillation` behind every step that changes weights, in place of a lone pipeline's own.
        seed: of every order.
        folder: where stages and models are, as in `lc.sweep`.
        answers: the teacher's answers that all distillations read, as in `lc.sweep`.
        workers: how many orders are worked on at once.
        on: "processes" of this machine, or the workers of a "ray" cluster.
        threads: of torch, in each worker.
        latency: whether to time the models, or the shapes at which to.
        progress: whether bars are shown.

    Raises:
        CompressionError: as `lc.sweep` raises it; `PipelineOrderError` where no order is allowed.

    Example:
        >>> import llmcompress as lc
        >>> import llmcompress.testing as lt
        >>> found = lc.orders(
        ...     lt.tiny_model("bert"),
        ...     [lc.StructuredPruning(ffn=0.5), lc.MagnitudePruning(sparsity=0.5)],
        ...     lc.TextClassification([("good", 1), ("bad", 0)]),
        ...     tokenizer=lt.tiny_tokenizer(),
        ...     latency=False,
        ...     progress=False,
        ... )
        >>> sorted(found.chains)
        ['magnitude_pruning, structured_pruning', 'structured_pruning, magnitude_pruning']
        >>> found.best() in found.chains
        True
    """
    chain = Pipeline(steps=steps, recover=recover)
    while len(chain.steps) == 1 and isinstance(alone := chain.steps[0], Pipeline):
        chain = alone if chain.recover is None else alone.model_copy(update={"recover": chain.recover})
    return sweep(
        model,
        allowed_orders(chain.steps),
        task,
        data=data,
        tokenizer=tokenizer,
        recover=chain.recover,
        seed=seed,
        folder=folder,
        answers=answers,
        workers=workers,
        on=on,
        threads=threads,
        latency=latency,
        progress=progress,
    )


def _check(chains: Mapping[str, Pipeline], model: PreTrainedModel, context: Context, *, here: bool) -> None:
    """Refuse chains that cannot run, as `compress` would; the message says which."""
    for name, chain in chains.items():
        try:
            flat = chain.flatten()
            check_chain(flat, model, context)
            for step in flat:
                if not here and type(step).__module__ == "__main__":
                    raise ConfigError(
                        f"{type(step).__name__} is defined in the running script, which no other worker reads; install "
                        f"it as a plug-in, or sweep with workers=1."
                    )
        except CompressionError as error:
            raise type(error)(f"chain {name!r}: {error}") from error


def _compared(
    run: Run,
    jobs: Sequence[Job],
    model: PreTrainedModel,
    tasks: Sequence[Task],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    latency: bool | Sequence[Shape],
    progress: bool,
) -> Comparison:
    """Compare what the jobs made; a model that breaks on the tasks fails its chains, and the others are compared."""
    failed = _failed(run, jobs)
    folders = {chain: run.model(chain) for job in jobs for chain in job.chains if chain not in failed}
    base = _base_name([chain for job in jobs for chain in job.chains])
    try:
        models = {base: model, **folders}
        return compare(models, tasks, tokenizer=tokenizer, latency=latency, progress=progress)
    except Exception:
        made = {number: job for number, job in enumerate(jobs) if any(chain in folders for chain in job.chains)}
        reasons = {number: _breaks(run.model(job.chains[0]), tasks, tokenizer) for number, job in made.items()}
        broken = {number: reason for number, reason in reasons.items() if reason is not None}
        if not broken:
            raise
    for number, reason in broken.items():
        run.end(number, Outcome(len(jobs[number].steps), reason))
        folders = {chain: folder for chain, folder in folders.items() if chain not in jobs[number].chains}
    return compare({base: model, **folders}, tasks, tokenizer=tokenizer, latency=latency, progress=progress)


def _breaks(folder: Path, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return why a model cannot be scored, or None."""
    try:
        compare({"model": folder}, tasks, tokenizer=tokenizer, latency=False, progress=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _failed(run: Run, jobs: Sequence[Job]) -> dict[str, str]:
    outcomes = [run.outcome(number) for number in range(len(jobs))]
    return {
        chain: outcome.failed
        for job, outcome in zip(jobs, outcomes, strict=True)
        if outcome is not None and outcome.failed is not None
        for chain in job.chains
    }


def _steps_run(run: Run, jobs: Sequence[Job]) -> int:
    """Count the steps that were finished, those that chains share once."""
    outcomes = [run.outcome(number) for number in range(len(jobs))]
    begun = [0 if job.before is None else len(jobs[job.before].steps) for job in jobs]
    return sum(max(one.finished - before, 0) for one, before in zip(outcomes, begun, strict=True) if one is not None)


def _base_name(chains: Collection[str]) -> str:
    return next(name for name in ("base", "original", uuid.uuid4().hex) if name not in chains)


def _quality(entry: Entry, metric: str | None) -> float:
    score = entry.evaluation.scores[0]
    return score.metrics[metric or score.primary]


def _cost(entry: Entry, cost: Cost) -> float:
    found = entry.evaluation
    if cost == "latency":
        if not found.latency:
            raise ConfigError("cost must be 'disk' or 'memory' where latency was not measured, got 'latency'.")
        return found.latency[0].median_ms
    if cost not in ("disk", "memory"):
        raise ConfigError(f"cost must be 'disk', 'memory' or 'latency', got {cost!r}.")
    return float(found.size.disk_bytes if cost == "disk" else found.size.memory_bytes)
