"""Several models on the same tasks: each scored, and each candidate compared with the base while both run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..data import find_tokenizer
from .fidelity import Fidelity, FidelityMeter, embeddings_of, text_embeddings
from .statistics import PairedTest, holm, paired_metrics, paired_proportions
from .tasks import Batch, ForwardTask, Task, TaskScore
from .tasks.forward import advance
from .tasks.task import Answer, check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scored:
    """What one task says of several models.

    Attributes:
        scores: of each model, by name, the base first.
        fidelity: of each candidate to the base; missing where the two were not asked the very same.
        tests: every metric of each candidate against the base's.
    """

    scores: dict[str, TaskScore]
    fidelity: dict[str, Fidelity]
    tests: dict[str, tuple[PairedTest, ...]]


def score_models(
    task: Task,
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Scored:
    """Score all `models` on `task`, the first being the base.

    Args:
        task: what they are asked to do.
        models: by name.
        tokenizers: of each model; where it is None the task's own is taken, or the one in the model's folder.
        batch_size: examples a batch, at most.
        progress: whether a bar is shown.

    Raises:
        MissingInputError: a model has no tokenizer.
        CompressionError: what `Task.evaluate` raises.
    """
    check_positive("batch_size", batch_size, optional=False)
    own = {
        name: find_tokenizer(model, tokenizers[name] or task.tokenizer, who=type(task).__name__)
        for name, model in models.items()
    }
    if isinstance(task, ForwardTask):
        scores, fidelity = _side_by_side(task, models, own, batch_size, progress)
    else:
        scores, fidelity = {}, {}
        for name, model in models.items():
            scores[name] = task.evaluate(model, own[name], batch_size=batch_size, progress=progress)
    base, *others = scores
    scores |= {name: in_classes_of(task, scores[base], scores[name]) for name in others}
    tests = {name: paired_tests(task, scores[base], scores[name]) for name in others}
    return Scored(scores, fidelity, _corrected(tests))


def paired_tests(task: Task, base: TaskScore, candidate: TaskScore) -> list[PairedTest]:
    """Test every metric that both scores have; none where they are not about the same examples."""
    candidate = in_classes_of(task, base, candidate)
    if not base.examples or len(base.examples) != len(candidate.examples) or base.groups != candidate.groups:
        return []
    # Equally many windows hold other text where it falls into other tokens.
    if base.protocol.get("tokens") != candidate.protocol.get("tokens"):
        return []
    found, rest = {}, {}
    for name in (name for name in base.metrics if name in candidate.metrics):
        right = [score.right_by(name) for score in (base, candidate)]
        if right[0] is not None and right[1] is not None and base.groups is None:
            found[name] = paired_proportions(name, right[0], right[1])
        else:
            rest[name] = base.kinds[name].scale
    if rest:
        ours, theirs = (task.metrics(score.examples) for score in (base, candidate))
        tests = paired_metrics(ours, theirs, len(base.examples), rest, groups=base.groups)
        found.update({test.metric: test for test in tests})
    return [found[name] for name in base.metrics if name in found]


def in_classes_of(task: Task, base: TaskScore, score: TaskScore) -> TaskScore:
    """Return `score` with its classes numbered as the base's, where both have the same ones in another order.

    Answers are then compared by what they mean. Other names are taken to mean the same by their places, since a model
    that was never told names has LABEL_0, LABEL_1, ...
    """
    order = _order(base.classes, score.classes)
    if order is None:
        return score
    number = {theirs: ours for ours, theirs in enumerate(order)}

    def renumbered(answer: Answer | None) -> Answer | None:
        if isinstance(answer, int):
            return number[answer]
        if isinstance(answer, tuple) and not any(isinstance(one, str) for one in answer):
            return tuple(sorted(number[int(one)] for one in answer))
        return answer

    examples = [
        one.model_copy(update={"label": renumbered(one.label), "prediction": renumbered(one.prediction)})
        for one in score.examples
    ]
    warnings = list(score.warnings)
    if [one.label for one in examples] != [one.label for one in base.examples]:
        warnings.append("has its classes in another order than the base, so that labels given as numbers mean others")
    # F1 of "the" class is of another one now.
    return task.score(examples, primary=score.primary, protocol=score.protocol, classes=base.classes, warnings=warnings)


def _order(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> list[int] | None:
    """Return where in `theirs` each of our classes stands; None where they are not the same in another order."""
    if ours is None or theirs is None or tuple(ours) == tuple(theirs) or sorted(ours) != sorted(theirs):
        return None
    return [theirs.index(name) for name in ours] if len(set(ours)) == len(ours) else None


def _corrected(tests: Mapping[str, Sequence[PairedTest]]) -> dict[str, tuple[PairedTest, ...]]:
    """Correct each metric's p-values for the number of candidates."""
    corrected: dict[tuple[str, str], float] = {}
    for metric in {test.metric for found in tests.values() for test in found}:
        p_values = {name: test.p_value for name, found in tests.items() for test in found if test.metric == metric}
        for name, p_value in zip(p_values, holm(list(p_values.values())), strict=True):
            corrected[name, metric] = p_value
    return {
        name: tuple(test.model_copy(update={"p_holm": corrected[name, test.metric]}) for test in found)
        for name, found in tests.items()
    }


def _side_by_side(
    task: ForwardTask,
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    batch_size: int,
    progress: bool,
) -> tuple[dict[str, TaskScore], dict[str, Fidelity]]:
    runs = {name: task.start(model, tokenizers[name], batch_size=batch_size) for name, model in models.items()}
    base, *others = runs
    # Another tokenizer asks other questions, and a language model of another vocabulary gives other answers: then only
    # the scores can be compared.
    widths = {name: _choices(model) for name, model in models.items()}
    alike = [
        name
        for name in others
        if widths[name] == widths[base]
        and same_tokens(runs[base].batches, runs[name].batches, tokenizers[base], tokenizers[name])
    ]
    meters = {name: FidelityMeter(runs[base], runs[name]) for name in alike}
    orders = {name: _order(_classes(models[base]), _classes(models[name])) for name in alike}
    with embeddings_of({name: models[name] for name in (base, *alike)} if alike else {}) as hidden:
        latest: dict[str, Any] = {}

        def observe(name: str, batch: Batch, outputs: Any) -> None:
            if name == base:
                latest[base] = outputs
            elif name in meters:
                order = orders[name]
                if order is not None:
                    outputs = SimpleNamespace(logits=outputs.logits[..., order])
                meters[name].update(batch, latest[base], outputs, _embeddings(batch, hidden, base, name))

        advance(runs, title=task.name, unit=task.unit, progress=progress, observer=observe if alike else None)
    scores = {name: run.score() for name, run in runs.items()}
    for name in others:
        if widths[name] != widths[base]:
            warning = f"chooses among {widths[name]} tokens, the base among {widths[base]}: another question"
            scores[name] = scores[name].model_copy(update={"warnings": (*scores[name].warnings, warning)})
    return scores, {name: meter.result() for name, meter in meters.items()}


def same_tokens(
    ours: Sequence[Batch],
    theirs: Sequence[Batch],
    our_tokenizer: PreTrainedTokenizerBase,
    their_tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Tell whether two models are called with the same tokens, though a pruned vocabulary may number them otherwise."""
    if len(ours) != len(theirs):
        return False
    ids, names = our_tokenizer.get_vocab(), their_tokenizer.get_vocab()
    if ids == names:
        return all(a.same_inputs(b) for a, b in zip(ours, theirs, strict=True))
    highest = max((int(batch.inputs["input_ids"].max()) for batch in theirs), default=0)
    table = torch.full((max(highest, *names.values()) + 1,), -1)
    for name, index in names.items():
        table[index] = ids.get(name, -1)
    return all(
        a.same_inputs(replace(b, inputs={k: table[v] if k.endswith("input_ids") else v for k, v in b.inputs.items()}))
        for a, b in zip(ours, theirs, strict=True)
    )


def same_question(
    task: Task,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
) -> bool:
    """Tell whether a language model whose vocabulary was cut is still asked for the very tokens that the base is.

    Where words of the task have become unknown tokens, it has a lower perplexity and says less. True for all models
    whose answers are no tokens.

    Args:
        task: what both are asked to do.
        models: the base, and the other one.
        tokenizers: of each; None takes the one in the model's folder.
    """
    if tokenizers[0] is tokenizers[1] or _choices(models[0]) is None or not isinstance(task, ForwardTask):
        return True
    pairs = zip(models, tokenizers, strict=True)
    (base, ours), (other, theirs) = (
        (model, find_tokenizer(model, tokenizer or task.tokenizer, who=type(task).__name__))
        for model, tokenizer in pairs
    )
    runs = [task.start(model, own, batch_size=32) for model, own in ((base, ours), (other, theirs))]
    return same_tokens(runs[0].batches, runs[1].batches, ours, theirs)


def _choices(model: PreTrainedModel) -> int | None:
    """Return among how many tokens a language model chooses; None for what answers otherwise."""
    head = model.get_output_embeddings()
    return None if head is None else int(model.config.get_text_config().vocab_size)


def _classes(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Return the names of a classifier's classes, in the order of its logits; None for what is none."""
    if _choices(model) is not None or not any("Classification" in cls.__name__ for cls in type(model).__mro__):
        return None
    return tuple(str(model.config.id2label.get(index, index)) for index in range(model.config.num_labels))


def _embeddings(
    batch: Batch, hidden: Mapping[str, torch.Tensor], base: str, name: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    mask = batch.inputs.get("attention_mask")
    if mask is None or base not in hidden or name not in hidden:
        return None
    ours, theirs = hidden[base], hidden[name]
    # A decoder that reads from an encoder has states of another length than the text.
    if ours.shape != theirs.shape or ours.shape[:2] != mask.shape:
        return None
    return text_embeddings(ours, mask), text_embeddings(theirs, mask)
