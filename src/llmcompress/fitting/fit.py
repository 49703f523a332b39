"""`lc.fit`: from a size or a time to the chain of steps that reaches it at the least loss."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..anatomy.kept import modes_kept
from ..checkpoint import load
from ..class_labels import by_class_names
from ..compressor import Context
from ..data import find_tokenizer, load_examples
from ..errors import MissingInputError
from ..inputs import check_model, check_seed, check_task, refuse_unready
from .bench import Bench
from .budget import Budget
from .final import finish
from .holdout import hold_out
from .original import measure
from .predictor import Predictor
from .recovery import affordable, answered_rows, check_rows, find_recovery, tokens_each
from .search import Search
from .space import find_space
from .survey import survey
from .targets import Targets, check_shape, read_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import Task
    from .result import FitResult

# Texts that a vocabulary is tried on.
_UNSEEN = 32
# Share of the budget that is kept for measuring the result.
_SPARE = 0.05


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
    so. Nor is a chain that breaks, on whatever: the others go on, and the progress, `trials` and the table tell it.

    Args:
        model: the original, with the head of the task; or a folder or hub name. It is never changed.
        task: what it must still be good at.
        data: texts to train with, like those of the task but not the same; anything that `load_examples` takes. With
            labels they count as well as the original's answers; all must have one for that, and `notes` tells where
            only some have. Where there is time for random spans of them, which have none, the answers alone count.
        size: the most bytes on disk, such as `"12 MB"` (decimal, as in reports; `"12 MiB"` is binary) or `12_000_000`.
        latency: the longest a forward pass at `shape` may take, such as `"3 ms"`.
        speedup: how many times faster than the original it must at least be, at `shape`.
        max_drop: how much worse the task's primary metric may be, in its own unit: 0.01 is a point of accuracy.
        budget: how long all of it may take, such as `"10 min"`. Each stage is planned on what is left: in a short one
            fewer widths, vocabularies and chains are looked at. `notes` tells it, and where all took longer still.
        shape: rows and tokens at which latency and speedup are measured.
        tokenizer: for the texts; found in the model's folder if it came from one.
        seed: of the split, the training, and all else that is drawn.
        progress: whether to show a bar with the time that is left.

    Returns:
        The result: `.model`, `.report`, `.save_pretrained(folder)` as from `compress`; and `.met`, `.sentence`,
        `.recipe`, `.trials`, `.drop`.

    Raises:
        ConfigError: no target, or one that is no quantity or out of range, or a label that the model does not know;
            before any work. Or the model itself is as small and as fast as is asked for, or has no score to lose, or
            the budget is too short to score what comes of it: the least that may do is named.
        MissingInputError: no data or no tokenizer, or a row without what is trained on.
        UnsupportedModelError: the model has no repeated blocks, is quantized, or its head does not fit the task.
        NothingToCompressError: there is no chain to try.
        CompressionError: every chain that was tried broke; what the last one broke on is its cause.
        Exception: whatever the task breaks on with the original, before anything is cut.

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
    context = Context(data=examples, tokenizer=tokenizer, teacher=model, seed=seed, device=model.device, progress=False)
    with clock.stage("the original"):
        original = measure(model, choose, verify, context, targets, clock)
        reading = original.reading * tokens_each(model, choose, examples, tokenizer)
        most_rows = answered_rows(reading, clock.left())
        examples = affordable(examples, most_rows, seed, notes)
        context = replace(context, data=examples)
    with clock.stage("sensitivities and times of the parts"):
        space = find_space(model, context)
        unseen = [one for one in choose.examples[:_UNSEEN] if isinstance(getattr(one, "text", None), str)]
        predictor = Predictor(space, survey(model, space, context, unseen, targets.shape, clock))
    recovery, most = find_recovery(model, choose, examples, tokenizer, folder, most_rows, space.notes)
    bench = Bench(model, context, recovery, targets, choose, original.base, predictor.base_ms, most, clock)
    reserve = original.last + _SPARE * targets.budget
    found = Search(predictor, bench, targets, original.cost, clock, reserve).run()
    return finish(bench, verify, found, original.cost, clock, original.verifying, [*notes, *space.notes])
