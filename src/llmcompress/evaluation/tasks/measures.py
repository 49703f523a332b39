"""Metrics that are more than a mean over examples, as functions of how often each example counts (see `resampling`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..resampling import Floats, Metrics


def classification(
    labels: Sequence[int], predictions: Sequence[int], *, average: Literal["macro", "binary"] = "macro"
) -> Metrics:
    """Accuracy, precision, recall and F1 of one class an example; a quotient without cases counts as 0.

    Args:
        labels: the class of each example.
        predictions: the class each was given.
        average: `"macro"` is the mean over the classes that occur in labels or predictions; `"binary"` is of class 1.

    Example:
        >>> found = classification([0, 0, 1, 1], [0, 1, 1, 1])(np.ones((1, 4)))
        >>> {name: round(float(values[0]), 4) for name, values in found.items()}
        {'accuracy': 0.75, 'precision': 0.8333, 'recall': 0.75, 'f1': 0.7333}
    """
    real, given = np.asarray(labels), np.asarray(predictions)
    classes = np.array([1]) if average == "binary" else np.unique(np.concatenate([real, given]))
    is_real, is_given = real[:, None] == classes, given[:, None] == classes
    # One product instead of four: the memory of counts is what this reads again and again.
    table = np.concatenate([is_real & is_given, is_given, is_real, (real == given)[:, None]], axis=1).astype(float)

    def metrics(counts: Floats) -> dict[str, Floats]:
        sums = counts @ table
        both, predicted, present, hits = np.split(sums, [len(classes), 2 * len(classes), 3 * len(classes)], axis=1)
        # Under "macro" a resample may lack a class altogether: then it has no score of it.
        occurs = np.ones_like(present, bool) if average == "binary" else predicted + present > 0

        def mean(values: Floats) -> Floats:
            return np.asarray((values * occurs).sum(1) / occurs.sum(1))

        return {
            "accuracy": hits[:, 0] / counts.sum(1),
            "precision": mean(_quotient(both, predicted)),
            "recall": mean(_quotient(both, present)),
            "f1": mean(_quotient(2 * both, predicted + present)),
        }

    return metrics


def multi_label(labels: Sequence[Sequence[int]], predictions: Sequence[Sequence[int]], classes: int) -> Metrics:
    """Micro and macro F1, micro precision and recall, and subset accuracy, of a set of classes an example.

    Micro counts every (example, class) pair alike; macro is the mean over the classes that occur.

    Example:
        >>> found = multi_label([(0, 1), (1,)], [(0,), (1,)], classes=3)(np.ones((1, 2)))
        >>> {name: round(float(values[0]), 4) for name, values in found.items()}
        {'f1_micro': 0.8, 'f1_macro': 0.8333, 'precision': 1.0, 'recall': 0.6667, 'subset_accuracy': 0.5}
    """
    real, given = (np.zeros((len(labels), classes), bool) for _ in range(2))
    for row, (asked, answered) in enumerate(zip(labels, predictions, strict=True)):
        real[row, list(asked)] = True
        given[row, list(answered)] = True
    table = np.concatenate([real & given, given, real, (real == given).all(1)[:, None]], axis=1).astype(float)

    def metrics(counts: Floats) -> dict[str, Floats]:
        both, predicted, present, hits = np.split(counts @ table, [classes, 2 * classes, 3 * classes], axis=1)
        occurs = predicted + present > 0
        f1 = _quotient(2 * both, predicted + present)
        all_both, all_predicted, all_present = (sums.sum(1) for sums in (both, predicted, present))
        return {
            "f1_micro": _quotient(2 * all_both, all_predicted + all_present),
            "f1_macro": _quotient((f1 * occurs).sum(1), occurs.sum(1).astype(float)),
            "precision": _quotient(all_both, all_predicted),
            "recall": _quotient(all_both, all_present),
            "subset_accuracy": hits[:, 0] / counts.sum(1),
        }

    return metrics


def spans(correct: Sequence[float], predicted: Sequence[float], present: Sequence[float]) -> Metrics:
    """Precision, recall and F1 of things found in texts, counted over all texts (as seqeval counts entities).

    Args:
        correct: for each example, how many of the predicted ones are right.
        predicted: how many were predicted.
        present: how many there are.

    Example:
        >>> found = spans([1, 0], [1, 1], [2, 0])(np.ones((1, 2)))
        >>> {name: round(float(values[0]), 4) for name, values in found.items()}
        {'f1': 0.5, 'precision': 0.5, 'recall': 0.5}
    """
    table = np.array([correct, predicted, present], float).T

    def metrics(counts: Floats) -> dict[str, Floats]:
        both, found, real = (counts @ table).T
        return {
            "f1": _quotient(2 * both, found + real),
            "precision": _quotient(both, found),
            "recall": _quotient(both, real),
        }

    return metrics


def regression(targets: Sequence[float], predictions: Sequence[float]) -> Metrics:
    """Pearson and Spearman correlation and the root of the mean squared error; a constant side has no correlation.

    Example:
        >>> found = regression([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0])(np.ones((1, 4)))
        >>> {name: round(float(values[0]), 4) for name, values in found.items()}
        {'pearson': 0.8, 'spearman': 0.8, 'rmse': 0.7071}
    """
    real, given = np.asarray(targets, float), np.asarray(predictions, float)

    def metrics(counts: Floats) -> dict[str, Floats]:
        return {
            "pearson": _correlation(counts, np.broadcast_to(real, counts.shape), np.broadcast_to(given, counts.shape)),
            "spearman": _correlation(counts, _ranks(counts, real), _ranks(counts, given)),
            "rmse": np.sqrt(counts @ (real - given) ** 2 / counts.sum(1)),
        }

    return metrics


def _quotient(above: Floats, below: Floats) -> Floats:
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 0))


def _correlation(counts: Floats, x: Floats, y: Floats) -> Floats:
    (dx, varies_x), (dy, varies_y) = (_deviations(counts, values) for values in (x, y))
    product = np.sqrt((counts * dx * dx).sum(1)) * np.sqrt((counts * dy * dy).sum(1))
    # NaN is left out of the bootstrap, as it should be.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(varies_x & varies_y, (counts * dx * dy).sum(1) / product, np.nan))


def _deviations(counts: Floats, values: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the deviations from each resample's mean, and whether they are more than the rounding of a constant.

    By the size of the values themselves: they may be of any unit.
    """
    found = values - (counts * values).sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    return found, (counts * found * found).sum(1) > 1e-24 * (counts * values * values).sum(1)


def _ranks(counts: Floats, values: Floats) -> Floats:
    """Rank every example among the drawn ones, of shape (resamples, examples); equal values share their mean rank."""
    levels, level_of = np.unique(values, return_inverse=True)
    order = np.argsort(level_of, kind="stable")
    starts = np.searchsorted(level_of[order], np.arange(len(levels)))
    at_level = np.add.reduceat(counts[:, order], starts, axis=1)
    middle = np.cumsum(at_level, axis=1) - (at_level - 1) / 2
    return np.asarray(middle[:, level_of])
