"""`lc.fit`: from a size or a time to the chain of steps that reaches it at the least loss."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..anatomy.footprint import disk_bytes
from ..anatomy.kept import modes_kept
from ..checkpoint import load
from ..class_labels import by_class_names
from ..compressor import Context
from ..data import find_tokenizer, load_examples
from ..errors import ConfigError, MissingInputError, NothingToCompressError
from ..evaluation.latency import measure_latency
from ..evaluation.tasks import LMEvalTask, Task
from ..evaluation.units import bytes_text, milliseconds_text
from ..inputs import check_model, check_seed, check_task, refuse_unready
from ..pipeline import Pipeline
from .bench import Bench, noise_of
from .budget import Budget
from .holdout import hold_out
from .outcome import sentence_of
from .predictor import Predictor
from .recovery import affordable, check_rows, find_recovery
from .result import FitResult
from .search import Found, Search
from .space import find_space
from .survey import survey
from .targets import Targets, check_shape, drop_of, read_targets
from .trial import Cost, Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import TaskScore
    from ..result import Report

# Texts that a vocabulary is tried on.
_UNSEEN = 32
# A training of fewer steps has hardly begun.
_FEW_STEPS = 20


def fit(
    model: PreTrainedModel | str | Path,
    task: Task,
    data: Any,
    *,
    size: str | int | None = None,
    latency: str | None = None,
    speedup: float | None = None,
    max_drop: float = 0.01,
    budget: str = "10 min",
    shape: tuple[int, int] = (1, 128),
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Find the chain that makes a model so small or so fast, and loses least.

    One pass measures what each cut does to the model's answers (leaving out each block, narrower feed-forward
    networks, fewer heads, 8 and 4 bits, fewer tokens), and what each block costs in bytes and, on this machine, in
    milliseconds. A mixed-integer program chooses among them; the best few chains are really run, with distillation from
    the original, briefly first and the best one for the rest of the time; what they lose corrects the predictions. A
    third of the task's examples decides, the others tell the loss of the result.

    A target that cannot be met is no error: the nearest that was found comes back, `met` is False, and `sentence` says
    so.

    Args:
        model: the original, with the head of the task; or a folder or hub name. It is never changed.
        task: what it must still be good at.
        data: texts to train with, like those of the task but not the same; anything that `load_examples` takes. With
            labels they count as well as the original's answers; all must have one for that, and `notes` tells where
            only some have.
        size: the most bytes on disk, such as `"12 MB"` (decimal, as in reports; `"12 MiB"` is binary) or `12_000_000`.
        latency: the longest a forward pass at `shape` may take, such as `"3 ms"`.
        speedup: how many times faster than the original it must at least be, at `shape`.
        max_drop: how much worse the task's primary metric may be, in its own unit: 0.01 is a point of accuracy.
        budget: how long all of it may take, such as `"10 min"`. Each stage is planned on what is left; where they took
            longer all the same, as they do in a few seconds, `notes` tells it.
        shape: rows and tokens at which latency and speedup are measured.
        tokenizer: for the texts; found in the model's folder if it came from one.
        seed: of the split, the training, and all else that is drawn.
        progress: whether to show a bar with the time that is left.

    Returns:
        The result: `.model`, `.report`, `.save_pretrained(folder)` as from `compress`; and `.met`, `.sentence`,
        `.recipe`, `.trials`, `.drop`.

    Raises:
        ConfigError: no target, or one that is no quantity or out of range, or a label that the model does not know;
            before any work. Or the model itself is as small and as fast as is asked for, or has no score to lose.
        MissingInputError: no data or no tokenizer, or a row without what is trained on.
        UnsupportedModelError: the model has no repeated blocks, is quantized, or its head does not fit the task.
        NothingToCompressError: not one chain could be built.

    Source:
        Successive halving: Jamieson & Talwalkar 2016, arXiv 1502.07943; sensitivities by KL: Cai et al. 2020, arXiv
        2001.00281; an integer program over them: Yao et al. 2021, arXiv 2011.10680.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("bert")
        >>> task = lc.TextClassification(tiny_data(model))
        >>> lc.fit(model, task, tiny_data(model), size="12 megabytes", tokenizer=tiny_tokenizer())
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: fit.size must be a quantity such as '12 MB', in one of b, kb, mb, gb, tb, kib, \
mib, gib, or an integer of bytes, got '12 megabytes'.
    """
    targets = read_targets(size=size, latency=latency, speedup=speedup, max_drop=max_drop, shape=shape, budget=budget)
    check_task(task, "fit.task")
    check_seed(seed, "fit.seed")
    if data is None:
        raise MissingInputError("fit needs data; pass data=[...] with texts like those of the task to train with.")
    check_model(model, "fit.model")
    if isinstance(model, (str, Path)):
        model = load(model)
    check_shape(targets.shape, model)
    refuse_unready(model)
    task.check(model)
    examples = by_class_names(load_examples(data), model)
    tokenizer = find_tokenizer(model, tokenizer or task.tokenizer, who="fit")
    check_rows(model, examples, tokenizer)
    clock = Budget(targets.budget, progress=progress)
    training = model.training
    with closing(clock), modes_kept(model), tempfile.TemporaryDirectory(prefix="llmcompress-fit-") as folder:
        found = _fit(model.eval(), task, examples, targets, tokenizer, seed, clock, folder)
    found.model.train(training)
    return found


def _fit(
    model: PreTrainedModel,
    task: Task,
    examples: list[Any],
    targets: Targets,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    clock: Budget,
    folder: str,
) -> FitResult:
    choose, verify, remark = hold_out(task, seed)
    notes = [remark] if remark is not None else []
    with clock.stage("the original"):
        own = Cost(disk_bytes(model), _milliseconds(model, targets))
        _refuse_met(targets, own)
        begin = clock.spent()
        base = choose.evaluate(model, tokenizer, progress=False)
        scoring = clock.spent() - begin
        _refuse_unscored(base)
        # The examples of lm-eval's tasks are names, each of many questions.
        scored = len(base.examples) if isinstance(choose, LMEvalTask) else len(choose.examples)
        examples = affordable(examples, scoring / max(scored, 1), clock.left(), seed, notes)
    context = Context(data=examples, tokenizer=tokenizer, teacher=model, seed=seed, device=model.device, progress=False)
    with clock.stage("sensitivities and times of the parts"):
        space = find_space(model, context)
        unseen = [one for one in choose.examples[:_UNSEEN] if isinstance(getattr(one, "text", None), str)]
        predictor = Predictor(space, survey(model, space, context, unseen, targets.shape, clock))
    recovery, most = find_recovery(model, choose, examples, tokenizer, folder, space.notes)
    bench = Bench(model, context, recovery, targets, choose, base, predictor.base_ms, most, clock)
    verifying = scoring * len(verify.examples) / len(choose.examples)
    search = Search(predictor, bench, targets, own, clock, reserve=3 * verifying + 0.05 * targets.budget)
    outcome = search.run()
    if outcome.chain is None:
        why = "; ".join(dict.fromkeys(trial.error or "" for trial in outcome.trials)) or "; ".join(space.notes)
        raise NothingToCompressError(f"fit could build no chain for {type(model).__name__}: {why}.")
    return _finished(bench, verify, outcome, own, clock, 3 * verifying, [*notes, *space.notes])


def _finished(
    bench: Bench, verify: Task, outcome: Found, own: Cost, clock: Budget, reserve: float, notes: Sequence[str]
) -> FitResult:
    """Train the chosen chain for the rest of the time, and tell what it is on examples that no choice has seen."""
    chain, targets = outcome.chain, bench.targets
    assert chain is not None
    with clock.stage(f"final: {chain.name}"):
        begin = clock.spent()
        steps = bench.steps_in(chain, max(clock.left() - reserve, 0.0))
        result = bench.final(chain, steps, verify)
        cost = bench.measured(result.model)
    trained = bench.recovery is not None and chain.recovers
    short = trained and steps < min(_FEW_STEPS, bench.most_steps)
    notes = [*notes, *_hurry(clock, steps if short else None)]
    report = result.report
    base, score = report.base_score, report.steps[-1].score
    assert base is not None
    assert score is not None
    drop, noise = drop_of(base, score), noise_of(verify, base, score)
    final = Trial(chain, "final", steps, cost, drop, noise, clock.spent() - begin)
    met = targets.hold(cost.bytes, cost.ms, cost.speedup) and drop <= targets.max_drop
    recovery = bench.recovery.model_copy(update={"steps": steps, "cache": None}) if bench.recovery and steps else None
    recipe = Pipeline(steps=chain.steps(recovery))
    _forget_folder(report, recipe)
    return FitResult(
        model=result.model,
        report=report,
        tokenizer=result.tokenizer,
        met=met,
        sentence=sentence_of(targets, outcome, own, final, base, met=met),
        recipe=recipe,
        targets=targets,
        trials=[*outcome.trials, final],
        drop=drop,
        noise=noise,
        disk_bytes=cost.bytes,
        latency_ms=cost.ms,
        speedup=cost.speedup,
        seconds=clock.spent(),
        stages=clock.stages,
        notes=notes,
    )


def _refuse_met(targets: Targets, own: Cost) -> None:
    """Refuse targets that the original meets: whatever were done to it would only lose."""
    if targets.hold(own.bytes, own.ms, 1.0):
        is_now = bytes_text(own.bytes) + ("" if own.ms is None else f" and {milliseconds_text(own.ms)} a pass")
        raise ConfigError(
            f"fit must be asked for less than the model is, got {targets.text()}: it is {is_now} already, there is "
            f"nothing to do."
        )


def _refuse_unscored(base: TaskScore) -> None:
    """Refuse a score that nothing can be held against: a correlation with labels that are all alike is no number."""
    if not math.isfinite(base.value):
        raise ConfigError(
            f"fit.task must give the original a finite {base.primary}, got {base.value} on the {len(base.examples)} "
            f"examples that chains are chosen by; pass more examples, with labels that differ."
        )


def _hurry(clock: Budget, steps: int | None) -> Iterator[str]:
    """Tell what there was too little time for; `steps` are those of the last training if they are too few."""
    if steps is not None:
        yield f"there was time for {steps} steps only in the last training: with more budget it may lose less"
    if clock.left() < 0:
        yield f"all of it took {clock.spent():.0f} s, and the budget was {clock.seconds:.0f} s"


def _forget_folder(report: Report, recipe: Pipeline) -> None:
    """Write the recipe without the folder of the teacher's answers, which is gone."""
    report.recipe = recipe.to_dict()
    for record, step in zip(report.steps, recipe.flatten(), strict=True):
        record.step = step.to_dict()


def _milliseconds(model: PreTrainedModel, targets: Targets) -> float | None:
    if not targets.timed:
        return None
    rows, tokens = targets.shape
    return measure_latency(model, batch_size=rows, tokens=tokens, seconds=1.0).median_ms
