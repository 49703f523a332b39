"""Quality against cost, as an SVG that takes its colours and its font from the page it stands in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .labels import Box, Label, place

# The drawing in its own units; the page scales it to the width it has.
_WIDTH, _HEIGHT = 400.0, 300.0
_LEFT, _TOP, _RIGHT, _BOTTOM = 56.0, 12.0, 384.0, 250.0
_RADIUS = 4.5
_TICKS = 5
# An axis is linear unless the models lie further apart than this: then it is logarithmic.
_LARGEST_LINEAR_RATIO = 25


@dataclass(frozen=True)
class Point:
    """One model in a plot.

    Attributes:
        name: its label.
        cost: what is paid, lower is better.
        quality: what is had for it.
        low: lower end of the interval of the quality, or None.
        high: upper end.
        base: whether it is the model the others are compared with.
    """

    name: str
    cost: float
    quality: float
    low: float | None = None
    high: float | None = None
    base: bool = False


@dataclass(frozen=True)
class Axis:
    """From values to places along one side of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Return the place of `value`."""
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values, about five."""
        if not self.log:
            step = _round_step((self.high - self.low) / _TICKS)
            first = math.ceil(self.low / step - 1e-9)
            return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        apart = max(1, math.ceil(len(decades) / _TICKS))
        marks = (1, 2, 5) if self.high / self.low <= 100 else (1,)
        found = [mark * 10.0**power for power in decades if power % apart == 0 for mark in marks]
        return [value for value in found if self.low <= value <= self.high]


def pareto_front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Return the points that no other beats in both cost and quality, by rising cost.

    Example:
        >>> points = [Point("a", 1, 0.5), Point("b", 2, 0.9), Point("c", 3, 0.8)]
        >>> [point.name for point in pareto_front(points, higher_is_better=True)]
        ['a', 'b']
    """
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -sign * one.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def scatter(
    points: Sequence[Point],
    *,
    cost: str,
    quality: str,
    higher_is_better: bool,
    cost_text: Callable[[float], str],
    quality_text: Callable[[float], str],
) -> str:
    """Draw quality against cost, the front marked, each point labelled, and return the `<svg>` element.

    Points whose quality or cost is no number are left out.

    Args:
        points: the models.
        cost: title of the horizontal axis.
        quality: what the vertical axis shows.
        higher_is_better: direction of the quality; better is drawn further up.
        cost_text: writes a tick of the horizontal axis.
        quality_text: writes a tick of the vertical axis.
    """
    points = [point for point in points if math.isfinite(point.quality) and math.isfinite(point.cost)]
    front = pareto_front(points, higher_is_better=higher_is_better)
    across, up = _axes(points, higher_is_better)
    parts = []
    for value in up.ticks():
        height = _number(up.at(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{height}" dy="4" text-anchor="end">{_t(quality_text(value))}</text>'
        )
    # A tick at the very end would be written beyond the drawing.
    for value in (tick for tick in across.ticks() if across.at(tick) <= _RIGHT - 8):
        along = _number(across.at(value))
        parts.append(
            f'<text class="tick" x="{along}" y="{_BOTTOM + 19}" text-anchor="middle">{_t(cost_text(value))}</text>'
        )
    parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>')
    parts.append(f'<text class="tick" x="{_RIGHT}" y="{_BOTTOM + 40}" text-anchor="end">{_t(cost)} →</text>')

    places = [(across.at(point.cost), up.at(point.quality)) for point in points]
    steps = _steps([(across.at(point.cost), up.at(point.quality)) for point in front])
    bars = [_bar(point, middle, up) for point, middle in zip(points, places, strict=True)]
    if len(steps) > 1:
        parts.append(f'<polyline class="front" points="{" ".join(f"{_number(x)},{_number(y)}" for x, y in steps)}"/>')
    labels = place(
        [point.name for point in points],
        places,
        lines=[*(bar for bar in bars if bar is not None), *_segments(steps)],
        frame=Box(_LEFT, 0, _WIDTH - 4, _BOTTOM),
        radius=_RADIUS + 1.5,
    )
    for point, (x, y), bar, label in zip(points, places, bars, labels, strict=True):
        kind = " ".join(["point", "on" if point in front else "off", *(["base"] if point.base else [])])
        ends = (
            f'<line x1="{_number(x)}" x2="{_number(x)}" y1="{_number(bar.top)}" y2="{_number(bar.bottom)}"/>'
            if bar
            else ""
        )
        dot = f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_RADIUS}"/>'
        told = _t(f"{point.name}: {quality_text(point.quality)}, {cost_text(point.cost)}")
        parts.append(f'<g class="{kind}"><title>{told}</title>{ends}{dot}</g>{_name(label, (x, y))}')
    title = _t(f"{quality} against {cost}")
    box = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _axes(points: Sequence[Point], higher_is_better: bool) -> tuple[Axis, Axis]:
    costs = [point.cost for point in points] or [1.0]
    if min(costs) > 0 and max(costs) / min(costs) > _LARGEST_LINEAR_RATIO:
        across = Axis(min(costs) / 1.8, max(costs) * 1.8, _LEFT, _RIGHT, log=True)
    else:
        across = Axis(0.0, max(costs) * 1.15 or 1.0, _LEFT, _RIGHT, log=False)
    values = [
        value
        for point in points
        for value in (point.quality, point.low, point.high)
        if value is not None and math.isfinite(value)
    ] or [0.0]
    low, high = min(values), max(values)
    log = low > 0 and high / low > _LARGEST_LINEAR_RATIO and not higher_is_better
    if log:
        room = (high / low) ** 0.12
        low, high = low / room, high * room
    else:
        room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
    ends = (_BOTTOM, _TOP) if higher_is_better else (_TOP, _BOTTOM)
    return across, Axis(low, high, *ends, log=log)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(mark * power for mark in (1, 2, 2.5, 5, 10) if mark * power >= step * (1 - 1e-9))


def _steps(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of the front: what the money up to the next model buys."""
    found: list[tuple[float, float]] = []
    for x, y in places:
        if found:
            found.append((x, found[-1][1]))
        found.append((x, y))
    return found


def _segments(corners: Sequence[tuple[float, float]]) -> list[Box]:
    pairs = itertools.pairwise(corners)
    return [Box(min(a, c), min(b, d), max(a, c), max(b, d)).grown(0.5) for (a, b), (c, d) in pairs]


def _bar(point: Point, at: tuple[float, float], up: Axis) -> Box | None:
    if point.low is None or point.high is None or not math.isfinite(point.low) or not math.isfinite(point.high):
        return None
    ends = sorted((up.at(point.low), up.at(point.high)))
    return Box(at[0] - 1.2, ends[0], at[0] + 1.2, ends[1])


def _name(label: Label, point: tuple[float, float]) -> str:
    lead = ""
    if label.lead is not None:
        (x, y), (px, py) = label.lead, point
        apart = math.dist((x, y), (px, py))
        near = (_RADIUS + 1.5) / apart
        lead = (
            f'<line class="lead" x1="{_number(x)}" y1="{_number(y)}" '
            f'x2="{_number(px + (x - px) * near)}" y2="{_number(py + (y - py) * near)}"/>'
        )
    height = (label.box.bottom - label.box.top) / len(label.lines)
    lines = "".join(
        f'<text class="name" x="{_number(label.x)}" y="{_number(label.box.top + height * (number + 0.78))}" '
        f'text-anchor="{label.anchor}">{_t(line)}</text>'
        for number, line in enumerate(label.lines)
    )
    return lead + lines


def _t(text: str) -> str:
    return escape(text, {'"': "&quot;"})


def _number(value: float) -> str:
    return f"{value:.1f}"
