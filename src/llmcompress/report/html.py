"""A comparison as one HTML page: nothing is fetched, every text escaped, light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING

from ..errors import MissingInputError
from ..evaluation.units import bytes_text, change_text, count_text, percent_text, ratio_text, score_text
from .classes import Matrix, commonest_confusions, confusions, recalls
from .cost import cost_sheets
from .examples import Differences, differences
from .findings import (
    change_words,
    collapses,
    gain,
    headline,
    interval_text,
    metric_name,
    notes,
    primary_test,
    size_text,
    speed_text,
    verdict,
    within_noise,
)
from .plots import Point, scatter
from .quality import fidelity, flip_counts, other_tests, primary_tests
from .sheets import Sheet, summary
from .text import protocol_lines
from .waterfall import waterfalls

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry

_TEMPLATE, _STYLE, _SCRIPT = "report.html.j2", "report.css", "report.js"
# A table of recalls with more rows is folded away: the page is read from the top.
_MOST_OPEN_CLASSES = 12


@dataclass(frozen=True)
class Figure:
    """One of the large numbers on a candidate's card; `good` is None where it is neither, or within chance."""

    value: str
    words: str
    small: tuple[str, ...]
    good: bool | None


@dataclass(frozen=True)
class Card:
    """A candidate in one glance; `collapses` are the signs that it no longer answers at all."""

    name: str
    headline: str
    figures: tuple[Figure, ...]
    collapses: tuple[str, ...]


@dataclass(frozen=True)
class TaskSection:
    """All that one task says: tests, flips, fidelity, classes, and examples that were answered otherwise."""

    name: str
    sheets: tuple[Sheet, ...]
    other_metrics: Sheet | None
    recalls: Sheet | None
    recalls_open: bool
    matrices: tuple[Matrix, ...]
    confused: Sheet | None
    differences: tuple[Differences, ...]


def to_html(comparison: Comparison) -> str:
    """Render `comparison` as one self-contained page.

    Raises:
        MissingInputError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingInputError(
            "the HTML report needs jinja2, which is not installed; do pip install llmcompress[report]."
        ) from error
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template, style, script = (_part(name) for name in (_TEMPLATE, _STYLE, _SCRIPT))
    score = comparison.base.evaluation.score
    return environment.from_string(template).render(
        comparison=comparison,
        score=score,
        # The page's own style and script, and drawings whose texts were escaped as they were drawn: nothing else on
        # the page is exempt from escaping, and the browser runs only what has these hashes.
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        plots=[(title, Markup(drawing)) for title, drawing in _plots(comparison)],
        base_collapses=collapses(comparison.base),
        cards=[_card(comparison, entry) for entry in comparison.candidates],
        summary=summary(comparison),
        notes=notes(comparison),
        waterfalls=waterfalls(comparison),
        sections=[_section(comparison, task) for task in range(len(comparison.base.evaluation.scores))],
        costs=cost_sheets(comparison),
        protocol=protocol_lines(comparison),
        percent=percent_text,
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _card(comparison: Comparison, entry: Entry) -> Card:
    assert entry.change is not None
    figures = [_ratio_figure(entry.change.smaller_on_disk, size_text)]
    if entry.change.faster:
        faster = entry.change.faster[0]
        ends = (faster.low, faster.high) if faster.ratio >= 1 else (1 / faster.high, 1 / faster.low)
        figure = _ratio_figure(faster.ratio, speed_text, (f"[{ends[0]:.2f}, {ends[1]:.2f}]",))
        if within_noise(faster):
            figure = replace(figure, small=(*figure.small, "within noise"), good=None)
        figures.append(figure)
    figures += [_quality_figure(comparison, entry, task) for task in range(len(entry.evaluation.scores))]
    return Card(entry.name, headline(comparison, entry), tuple(figures), tuple(collapses(entry)))


def _quality_figure(comparison: Comparison, entry: Entry, task: int) -> Figure:
    test, metric = primary_test(entry, task), metric_name(comparison, task)
    if test is None:
        ours, theirs = comparison.base.evaluation.scores[task], entry.evaluation.scores[task]
        return Figure(change_text(theirs.value, ours.value, fraction=theirs.fraction), metric, ("not paired",), None)
    value = change_words(test).removesuffix(" points")
    words = f"{metric}, points" if test.scale == "points" else metric
    small = tuple(text for text in (interval_text(test), verdict(test)) if text)
    return Figure(value, words, small, gain(entry, task))


def _ratio_figure(ratio: float, words: Callable[[float], str], small: tuple[str, ...] = ()) -> Figure:
    text = words(ratio)
    number, _, word = text.partition(" ")
    if text.startswith("same"):
        return Figure(ratio_text(1.0), text, small, None)
    return Figure(number, word, small, ratio > 1)


def _section(comparison: Comparison, task: int) -> TaskSection:
    score = comparison.base.evaluation.scores[task]
    sheets = (primary_tests(comparison, task), flip_counts(comparison, task), fidelity(comparison, task))
    recall = recalls(comparison, task)
    found = (differences(comparison, entry, task) for entry in comparison.candidates)
    return TaskSection(
        name=score.task.replace("_", " "),
        sheets=tuple(sheet for sheet in sheets if sheet is not None),
        other_metrics=other_tests(comparison, task),
        recalls=recall,
        recalls_open=recall is not None and len(recall.rows) <= _MOST_OPEN_CLASSES,
        matrices=tuple(confusions(comparison, task)),
        confused=commonest_confusions(comparison, task),
        differences=tuple(one for one in found if one is not None),
    )


def _plots(comparison: Comparison) -> list[tuple[str, str]]:
    """Return title and drawing of the quality against each cost that was measured."""
    entries, base = comparison.entries, comparison.base.evaluation
    costs: list[tuple[str, str, list[float], Callable[[float], str]]] = [
        ("size", "size on disk", [one.evaluation.size.disk_bytes for one in entries], _tick_bytes)
    ]
    if base.latency:
        shape = f"{base.latency[0].batch_size}x{base.latency[0].tokens}"
        times = [one.evaluation.latency[0].median_ms for one in entries]
        costs.append(("latency", f"latency of {shape} tokens", times, lambda value: f"{value:.3g} ms"))
    peaks = [float(one.evaluation.memory.model_bytes) for one in entries if one.evaluation.memory]
    if len(peaks) == len(entries):
        costs.append(("memory", "peak memory beyond the libraries", peaks, _tick_bytes))
    score = base.score
    direction = "" if score.higher_is_better else ", lower is better"
    drawings = []
    for name, axis, values, text in costs:
        drawing = scatter(
            [_point(entry, value) for entry, value in zip(entries, values, strict=True)],
            cost=axis,
            quality=f"{score.primary}{direction}",
            higher_is_better=score.higher_is_better,
            cost_text=text,
            quality_text=lambda value: f"{100 * value:.4g} %" if score.fraction else _plain(value),
        )
        drawings.append((f"{score.primary} against {name}", drawing))
    return drawings


def _tick_bytes(value: float) -> str:
    return "0" if value == 0 else bytes_text(value).replace(".00 ", " ").replace(".0 ", " ")


def _plain(value: float) -> str:
    text = count_text(value) if abs(value) >= 1000 else score_text(value, fraction=False)
    return text.replace(".00 ", " ").replace(".0 ", " ")


def _point(entry: Entry, cost: float) -> Point:
    score = entry.evaluation.score
    low, high = score.intervals.get(score.primary, (None, None))
    return Point(entry.name, cost, score.value, low, high, base=entry.change is None)
