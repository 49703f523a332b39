"""What a model is worth: tables of paired tests, of answers that changed, and of fidelity to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..evaluation.units import count_text, percent_text, score_text
from .findings import better, change_words, interval_text, p_text
from .sheets import Cell, Sheet

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry
    from ..evaluation.statistics import PairedTest


_ABOUT_TESTS = (
    "Both models on the same examples, with 95 % intervals. p: how likely so large a change is by chance alone; Holm: "
    "corrected for the number of candidates. Detectable: the smallest true change that a sample like this finds in 80 "
    "of 100 cases."
)


def primary_tests(comparison: Comparison, task: int) -> Sheet | None:
    """Return the test of the task's primary metric for each candidate, and how much of the change chance could make."""
    return _tests(comparison, task, "Paired tests", _ABOUT_TESTS, primary=True)


def other_tests(comparison: Comparison, task: int) -> Sheet | None:
    """Return the same for the task's other metrics; None where there are none."""
    return _tests(comparison, task, "Paired tests of the other metrics", "", primary=False)


def _tests(comparison: Comparison, task: int, title: str, about: str, *, primary: bool) -> Sheet | None:
    base = comparison.base.evaluation.scores[task]
    rows = [
        _test_row(comparison, entry, task, test)
        for entry in comparison.candidates
        for test in (entry.change.tests[task] if entry.change else ())
        if (test.metric == base.primary) == primary
    ]
    header = ("model", "metric", "base's", "model's", "change", "p", "p after Holm", "detectable", "test")
    return Sheet(title, header, tuple(rows), about) if rows else None


def _test_row(comparison: Comparison, entry: Entry, task: int, test: PairedTest) -> tuple[Cell, ...]:
    base, own = (one.evaluation.scores[task].metrics[test.metric] for one in (comparison.base, entry))
    kind = comparison.base.evaluation.scores[task].kinds[test.metric]
    fraction = test.scale == "points"
    good = better(test, lower_is_better=kind.lower_is_better)
    least = "-" if test.detectable is None else change_words(test, test.detectable).lstrip("+")
    return (
        Cell(entry.name),
        Cell(test.metric),
        Cell(score_text(base, fraction=fraction), sort=base),
        Cell(score_text(own, fraction=fraction), sort=own),
        Cell("", change_words(test), interval_text(test), test.change, good),
        Cell(p_text(test.p_value), sort=test.p_value),
        Cell(p_text(test.p_holm), sort=test.p_holm),
        Cell(least, sort=test.detectable),
        Cell(test.method, note=f"{test.units} units"),
    )


def flip_counts(comparison: Comparison, task: int) -> Sheet | None:
    """Return the answers that changed both ways; None where the task has no right and wrong."""
    rows = []
    for entry in comparison.candidates:
        flip = entry.change.flips[task] if entry.change else None
        if flip is not None:
            rows.append(
                (
                    Cell(entry.name),
                    Cell(percent_text(flip.agreement), sort=flip.agreement),
                    Cell(str(flip.right_to_wrong), sort=flip.right_to_wrong),
                    Cell(str(flip.wrong_to_right), sort=flip.wrong_to_right),
                    Cell(p_text(flip.p_value), sort=flip.p_value),
                )
            )
    header = ("model", "same answer as the base", "right to wrong", "wrong to right", "McNemar p")
    about = "Equal accuracy can hide answers that changed both ways (arXiv 2407.09141)."
    return Sheet("Answers that changed", header, tuple(rows), about) if rows else None


def fidelity(comparison: Comparison, task: int) -> Sheet | None:
    """Return how closely each candidate answers as the base does; None where none was asked the very same."""
    found = [
        (entry.name, one) for entry in comparison.candidates if entry.change and (one := entry.change.fidelity[task])
    ]
    columns: Sequence[tuple[str, str]] = (
        ("top-1 agreement", "top1_agreement"),
        ("KL mean", "kl_mean"),
        ("KL median", "kl_median"),
        ("KL p99", "kl_p99"),
        ("cosine", "cosine"),
        ("entropy", "entropy"),
        ("base's entropy", "entropy_base"),
        ("most frequent answer", "most_frequent"),
    )
    shares = ("top1_agreement", "most_frequent")
    values = [(name, one.answers, one.model_dump()) for name, one in found]
    used = [(title, key) for title, key in columns if any(numbers[key] is not None for *_, numbers in values)]
    rows = [
        (
            Cell(name),
            Cell(count_text(answers), sort=answers),
            *(_number_cell(numbers[key], share=key in shares) for _, key in used),
        )
        for name, answers, numbers in values
    ]
    about = (
        "Needs no labels. KL(base || model) in nats over every answer (each text, or each next token); cosine of the "
        "texts' embeddings."
    )
    header = ("model", "answers", *(title for title, _ in used))
    return Sheet("Fidelity to the base", header, tuple(rows), about) if rows and used else None


def _number_cell(value: float | None, *, share: bool) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(percent_text(value) if share else f"{value:.3g}", sort=value)
