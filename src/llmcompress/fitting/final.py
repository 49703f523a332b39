"""The last training: of the chosen chain, for the rest of the time; scored on examples that no choice has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CompressionError, NothingToCompressError
from ..pipeline import Pipeline
from .bench import Bench, noise_of
from .budget import Budget
from .chain import Chain
from .outcome import sentence_of
from .result import FitResult
from .search import Found
from .targets import drop_of
from .trial import Cost, Trial

if TYPE_CHECKING:
    from ..evaluation.tasks import Task
    from ..result import Report, Result

# A training of fewer steps has hardly begun.
_FEW_STEPS = 20


@dataclass(frozen=True)
class _Ended:
    """A chain, trained to the end.

    Attributes:
        result: what `compress` made of it.
        trial: how it did.
        short: whether there was time for hardly any training.
    """

    result: Result
    trial: Trial
    short: bool


def finish(
    bench: Bench, verify: Task, found: Found, own: Cost, clock: Budget, verifying: float, notes: Sequence[str]
) -> FitResult:
    """Train the best chain that a search found for the rest of the time; where that breaks, the next best.

    Args:
        bench: runs it.
        verify: the task on examples held out.
        found: what the search ended with.
        own: what the original costs.
        clock: of the search.
        verifying: seconds that a score on the examples held out takes.
        notes: what is told of the search.

    Raises:
        NothingToCompressError: the search found nothing that could be tried.
        CompressionError: whatever was tried broke; what the last chain broke on is its cause.
    """
    trials = list(found.trials)
    for chain in found.chains:
        begin = clock.spent()
        try:
            with clock.stage(f"final: {chain.name}"):
                ended = _trained(bench, verify, chain, clock, verifying)
        except Exception as error:  # of whatever kind: another chain may do
            trials.append(Trial.failed(chain, "final", error, seconds=clock.spent() - begin))
            clock.tell(f"{chain.name} failed: {trials[-1].error}")
            continue
        return _result(bench, found, [*trials, ended.trial], ended, own, clock, notes)
    raise _nothing(bench, trials, notes)


def _trained(bench: Bench, verify: Task, chain: Chain, clock: Budget, verifying: float) -> _Ended:
    begin = clock.spent()
    # The base is scored, and what each step leaves; the training is one more.
    scored = 1 + len(chain.steps(bench.recovery))
    steps = bench.steps_in(chain, max(clock.left() - scored * verifying, 0.0))
    result = bench.final(chain, steps, verify)
    cost = bench.result_cost(result.model)
    base, score = result.report.base_score, result.report.steps[-1].score
    assert base is not None
    assert score is not None
    drop, noise = drop_of(base, score), noise_of(verify, base, score)
    trial = Trial(chain, "final", steps, cost, drop, noise, clock.spent() - begin)
    trained = bench.recovery is not None and chain.recovers
    return _Ended(result, trial, short=trained and steps < min(_FEW_STEPS, bench.most_steps))


def _result(
    bench: Bench, found: Found, trials: Sequence[Trial], ended: _Ended, own: Cost, clock: Budget, notes: Sequence[str]
) -> FitResult:
    trial, report, targets = ended.trial, ended.result.report, bench.targets
    cost, drop, base = trial.cost, trial.drop, report.base_score
    assert cost is not None
    assert drop is not None
    assert base is not None
    met = targets.hold(cost.bytes, cost.ms, cost.speedup) and drop <= targets.max_drop
    recovery = bench.recovery_of(trial.steps)
    recipe = Pipeline(steps=trial.chain.steps(recovery and recovery.model_copy(update={"cache": None})))
    _forget_folder(report, recipe)
    return FitResult(
        model=ended.result.model,
        report=report,
        tokenizer=ended.result.tokenizer,
        met=met,
        sentence=sentence_of(targets, found, own, trial, base, met=met),
        recipe=recipe,
        targets=targets,
        trials=trials,
        drop=drop,
        noise=trial.noise,
        disk_bytes=cost.bytes,
        latency_ms=cost.ms,
        speedup=cost.speedup,
        seconds=clock.spent(),
        stages=clock.stages,
        notes=[*notes, *_hurry(clock, trial.steps if ended.short else None)],
    )


def _hurry(clock: Budget, steps: int | None) -> Iterator[str]:
    """Tell what there was too little time for; `steps` are those of the last training if they are too few."""
    if steps is not None:
        told = f"{steps} step" if steps == 1 else f"{steps} steps"
        yield f"there was time for {told} only in the last training: with more budget it may lose less"
    if clock.left() < 0:
        yield f"all of it took {clock.spent():.0f} s, and the budget was {clock.seconds:.0f} s"


def _forget_folder(report: Report, recipe: Pipeline) -> None:
    """Write the recipe without the folder of the teacher's answers, which is gone."""
    report.recipe = recipe.to_dict()
    for record, step in zip(report.steps, recipe.flatten(), strict=True):
        record.step = step.to_dict()


def _nothing(bench: Bench, trials: Sequence[Trial], notes: Sequence[str]) -> CompressionError:
    """Return the error for a search of which nothing is left, with its cause."""
    who, broken = type(bench.model).__name__, [trial for trial in trials if trial.error is not None]
    if not broken:
        return NothingToCompressError(f"fit could build no chain for {who}: {'; '.join(notes) or 'nothing is left'}.")
    last = broken[-1]
    error = CompressionError(
        f"fit: all {len(broken)} runs of chains for {who} failed; the last one, {last.chain.name!r}, with: {last.error}"
    )
    error.__cause__ = last.cause
    return error
