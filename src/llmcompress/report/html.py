"""A comparison as one HTML page: no network, no script, every text escaped, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING

from ..errors import MissingInputError
from ..evaluation.units import (
    bytes_text,
    change_text,
    count_text,
    milliseconds_text,
    percent_text,
    ratio_text,
    score_text,
)
from .findings import SIGNIFICANT, headline, notes, size_text, speed_text
from .plots import Point, scatter
from .text import protocol_lines, summary

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry
    from ..evaluation.tasks import TaskScore

_TEMPLATE = "report.html.j2"
# A table of recalls with more rows is folded away: the page is read from the top.
_MOST_OPEN_CLASSES = 12


@dataclass(frozen=True)
class Figure:
    """One of the large numbers on a candidate's card; `good` is None where it is neither, or within chance."""

    value: str
    words: str
    good: bool | None


@dataclass(frozen=True)
class Card:
    """A candidate in one glance."""

    name: str
    headline: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class ClassRow:
    """Recall of one class under each model; `changes` in points, None for the base."""

    name: str
    examples: int
    recalls: tuple[str, ...]
    changes: tuple[float | None, ...]


def to_html(comparison: Comparison) -> str:
    """Render `comparison` as one self-contained page.

    Raises:
        MissingInputError: jinja2 or matplotlib is not installed.
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
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    score = comparison.base.evaluation.score
    return environment.from_string(source).render(
        comparison=comparison,
        score=score,
        examples=len(score.examples),
        cards=[_card(comparison, entry) for entry in comparison.candidates],
        summary=summary(comparison),
        # Matplotlib escaped the names in it; nothing else on the page is exempt from escaping.
        plots=[Markup(plot) for plot in _plots(comparison)],
        classes=_classes(comparison),
        most_open_classes=_MOST_OPEN_CLASSES,
        flips=[
            (entry.name, entry.change.flips[0])
            for entry in comparison.candidates
            if entry.change and entry.change.flips[0]
        ],
        timing=_timing(comparison),
        sizes=_sizes(comparison),
        notes=notes(comparison),
        protocol=protocol_lines(comparison),
        percent=percent_text,
    )


def _card(comparison: Comparison, entry: Entry) -> Card:
    assert entry.change is not None
    figures = [_ratio_figure(entry.change.smaller_on_disk, size_text)]
    if entry.change.faster:
        figures.append(_ratio_figure(entry.change.faster[0].ratio, speed_text))
    base, own = comparison.base.evaluation.scores, entry.evaluation.scores
    for ours, theirs, flip in zip(base, own, entry.change.flips, strict=True):
        text = change_text(theirs.value, ours.value, fraction=theirs.fraction)
        gain = theirs.value - ours.value if theirs.higher_is_better else ours.value - theirs.value
        value, words = (text.split()[0], f"points of {theirs.primary}") if theirs.fraction else (text, theirs.primary)
        chance = flip is not None and flip.p_value >= SIGNIFICANT
        figures.append(Figure(value, words, None if gain == 0 or chance else gain > 0))
    return Card(entry.name, headline(comparison, entry), tuple(figures))


def _ratio_figure(ratio: float, words: Callable[[float], str]) -> Figure:
    text = words(ratio)
    number, _, word = text.partition(" ")
    if text.startswith("same"):
        return Figure(ratio_text(1.0), text, None)
    return Figure(number, word, ratio > 1)


def _plots(comparison: Comparison) -> list[str]:
    score = comparison.base.evaluation.score
    direction = "" if score.higher_is_better else ", lower is better"
    draw = partial(
        scatter,
        quality=f"{score.primary}{direction}",
        higher_is_better=score.higher_is_better,
        quality_text=lambda value: f"{100 * value:.4g} %" if score.fraction else f"{value:.4g}",
    )
    drawings = [
        draw(
            [_point(entry, entry.evaluation.size.disk_bytes) for entry in comparison.entries],
            cost="size on disk",
            cost_text=lambda value: bytes_text(value).replace(".0 ", " "),
            prefix="size",
        )
    ]
    if comparison.base.evaluation.latency:
        first = comparison.base.evaluation.latency[0]
        drawings.append(
            draw(
                [_point(entry, entry.evaluation.latency[0].median_ms) for entry in comparison.entries],
                cost=f"latency of {first.batch_size}x{first.tokens} tokens",
                cost_text=lambda value: f"{value:.3g} ms",
                prefix="latency",
            )
        )
    return drawings


def _point(entry: Entry, cost: float) -> Point:
    score = entry.evaluation.score
    low, high = score.intervals.get(score.primary, (None, None))
    return Point(entry.name, cost, score.value, low, high, base=entry.change is None)


def _classes(comparison: Comparison) -> list[ClassRow]:
    score = comparison.base.evaluation.score
    if score.classes is None or not score.examples:
        return []
    rows = []
    for index, name in enumerate(score.classes):
        of_class = [_recall(entry.evaluation.score, index) for entry in comparison.entries]
        if of_class[0] is None:
            continue
        recalls = [recall for recall in of_class if recall is not None]
        rows.append(
            ClassRow(
                name=name,
                examples=sum(example.label == index for example in score.examples),
                recalls=tuple(score_text(recall, fraction=True) for recall in recalls),
                changes=(None, *(100 * (recall - recalls[0]) for recall in recalls[1:])),
            )
        )
    return rows


def _recall(score: TaskScore, index: int) -> float | None:
    hits = [example.prediction == index for example in score.examples if example.label == index]
    return sum(hits) / len(hits) if hits else None


def _timing(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for entry in comparison.entries:
        for number, found in enumerate(entry.evaluation.latency):
            faster = entry.change.faster[number] if entry.change else None
            interval = f"{faster.low:.2f}x to {faster.high:.2f}x" if faster else ""
            rows.append(
                (
                    entry.name,
                    f"{found.batch_size}x{found.tokens}",
                    milliseconds_text(found.median_ms),
                    milliseconds_text(found.p90_ms),
                    milliseconds_text(found.p99_ms),
                    count_text(found.tokens_per_second),
                    ratio_text(faster.ratio) if faster else "",
                    interval,
                )
            )
    return rows


def _sizes(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for entry in comparison.entries:
        size, memory = entry.evaluation.size, entry.evaluation.memory
        row = [
            entry.name,
            count_text(size.parameters),
            count_text(size.nonzero),
            bytes_text(size.memory_bytes),
            bytes_text(size.disk_bytes),
        ]
        if memory:
            row += [bytes_text(memory.load_peak_bytes), bytes_text(memory.inference_peak_bytes)]
        rows.append(tuple(row))
    return rows
