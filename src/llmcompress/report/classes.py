"""Where the errors are: recall of each class, and what each class is taken for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.statistics import mcnemar
from ..evaluation.tasks import TaskScore
from ..evaluation.units import percent_text
from .findings import SIGNIFICANT
from .sheets import Cell, Sheet

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..evaluation.tasks.task import Answer

# A matrix with more classes is no longer read as a picture: the commonest confusions are listed instead.
MOST_MATRIX_CLASSES = 14
_LISTED = 20
_SHADES = 9


@dataclass(frozen=True)
class Shaded:
    """One field of a confusion matrix: a count, the share of its row in `shade` of nine steps, whether it is right."""

    count: int
    shade: int
    right: bool


@dataclass(frozen=True)
class Matrix:
    """What one model takes each class for: rows are the labels, columns the answers."""

    name: str
    classes: tuple[str, ...]
    rows: tuple[tuple[Shaded, ...], ...]


def recalls(comparison: Comparison, task: int) -> Sheet | None:
    """Return for each class the share of it that each model finds; None where the task has no classes."""
    base = comparison.base.evaluation.scores[task]
    if base.classes is None or not any(_pairs(base)):
        return None
    scores = [entry.evaluation.scores[task] for entry in comparison.entries]
    models = [_found(score) for score in scores]
    rows = []
    for label, name in enumerate(base.classes):
        examples = models[0][1][label]
        if not examples:
            continue
        shares = [hits[label] / totals[label] if totals[label] else 0.0 for hits, totals in models]
        cells = [Cell(percent_text(shares[0]), sort=shares[0])]
        for score, share in zip(scores[1:], shares[1:], strict=True):
            points = round(100 * (share - shares[0]), 1)
            good = points > 0 if _uneven(base, score, label) else None
            cells.append(Cell(percent_text(share), f"{points:+.1f}" if points else "", sort=share, good=good))
        rows.append((Cell(name), Cell(str(examples), sort=examples), *cells))
    header = ("class", "examples", *(entry.name for entry in comparison.entries))
    about = (
        "The share of each class that is found, changes in points. Coloured: unlikely by chance (McNemar p < "
        f"{SIGNIFICANT}, each class by itself)."
    )
    return Sheet("Recall by class", header, tuple(rows), about)


def confusions(comparison: Comparison, task: int) -> list[Matrix]:
    """Return one matrix a model; empty where there are no classes, too many, or answers that are sets of them."""
    base = comparison.base.evaluation.scores[task]
    if base.classes is None or len(base.classes) > MOST_MATRIX_CLASSES or _has_sets(base) or not any(_pairs(base)):
        return []
    return [_matrix(entry.name, entry.evaluation.scores[task], base.classes) for entry in comparison.entries]


def commonest_confusions(comparison: Comparison, task: int) -> Sheet | None:
    """Return the pairs of classes most often confused, for a task with too many classes for a matrix."""
    base = comparison.base.evaluation.scores[task]
    if base.classes is None or len(base.classes) <= MOST_MATRIX_CLASSES or _has_sets(base):
        return None
    counts = [
        Counter(pair for pair in _pairs(entry.evaluation.scores[task]) if pair[0] != pair[1])
        for entry in comparison.entries
    ]
    total = sum(counts, Counter[tuple[int, int]]())
    rows = [
        (
            Cell(base.classes[label]),
            Cell(base.classes[answer]),
            *(Cell(str(of_model[label, answer]), sort=of_model[label, answer]) for of_model in counts),
        )
        for (label, answer), _ in total.most_common(_LISTED)
    ]
    header = ("class", "taken for", *(entry.name for entry in comparison.entries))
    return Sheet("Commonest confusions", header, tuple(rows)) if rows else None


def _found(score: TaskScore) -> tuple[Counter[int], Counter[int]]:
    """Count, for each class, how often it was found and how often it was there."""
    hits, totals = Counter[int](), Counter[int]()
    if _has_sets(score):
        for example in score.examples:
            labels, answers = _indices(example.label, score), set(_indices(example.prediction, score))
            totals.update(labels)
            hits.update(label for label in labels if label in answers)
    else:
        for label, answer in _pairs(score):
            totals[label] += 1
            hits[label] += label == answer
    return hits, totals


def _uneven(base: TaskScore, score: TaskScore, label: int) -> bool:
    """Whether a class was lost more often than won (or the other way round) than chance would have it.

    Not told of words: those of one text are not independent.
    """
    if not _has_sets(base) and any(isinstance(example.label, tuple) for example in base.examples):
        return False
    if len(base.examples) != len(score.examples):
        return False
    found = [
        (label in _indices(ours.prediction, base), label in _indices(theirs.prediction, score))
        for ours, theirs in zip(base.examples, score.examples, strict=True)
        if label in _indices(ours.label, base)
    ]
    return mcnemar(found.count((True, False)), found.count((False, True))) < SIGNIFICANT


def _has_sets(score: TaskScore) -> bool:
    """Whether an answer is a set of classes: several labels a text, in no order."""
    return "subset_accuracy" in score.metrics


def _pairs(score: TaskScore) -> Iterator[tuple[int, int]]:
    """Yield label and answer of each example, or of each word where every word has a label."""
    for example in score.examples:
        labels, answers = _indices(example.label, score), _indices(example.prediction, score)
        if _has_sets(score):
            yield from ((label, label) for label in labels)
        elif len(labels) == len(answers):
            yield from zip(labels, answers, strict=True)


def _indices(answer: Answer | None, score: TaskScore) -> Sequence[int]:
    """Return an answer as numbers of classes: one, or one a word, or those of a set."""
    several = answer if isinstance(answer, tuple) else (answer,)
    numbers = {name: number for number, name in enumerate(score.classes or ())}
    found = (numbers.get(one) if isinstance(one, str) else one for one in several)
    return tuple(one for one in found if isinstance(one, int))


def _matrix(name: str, score: TaskScore, classes: tuple[str, ...]) -> Matrix:
    counts = Counter(_pairs(score))
    rows = []
    for label in range(len(classes)):
        total = sum(counts[label, answer] for answer in range(len(classes)))
        rows.append(
            tuple(
                Shaded(
                    counts[label, answer],
                    # A single confusion is seen; an empty field is blank.
                    min(_SHADES, -(-_SHADES * counts[label, answer] // total)) if total else 0,
                    label == answer,
                )
                for answer in range(len(classes))
            )
        )
    return Matrix(name, classes, tuple(rows))
