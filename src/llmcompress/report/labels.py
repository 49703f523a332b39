"""Where the names go in a plot: beside their points, across no line, point, or other name."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

FONT = 12.0
"""Size of a label, in units of the drawing."""

_LINE = 1.2 * FONT
_WRAP = 24  # characters a line
# So many names may take two lines each; of more, each takes one.
_MOST_TALL = 6
_ROUNDS = 3
# Places around a point are tried from near to far; from the second ring on a thin line leads from name to point.
_RINGS = (11.0, 22.0, 36.0, 52.0, 70.0, 95.0, 125.0)
_ANGLES = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 300, 240))
# Widths of letters in ems, of the widest of the usual fonts (DejaVu Sans, Verdana): in others names only get more room.
_NARROW, _WIDE = frozenset("iljtfrI.,:;'|!()[] "), frozenset("mwMWQ@%—…<>+=~&#")


@dataclass(frozen=True)
class Box:
    """An upright rectangle; `y` grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    @property
    def area(self) -> float:
        """Its own area."""
        return (self.right - self.left) * (self.bottom - self.top)

    def grown(self, by: float) -> Box:
        """Return it with a margin of `by` on every side."""
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)


@dataclass(frozen=True)
class Label:
    """A placed name.

    Attributes:
        lines: the name, broken into lines, cut where it is too long.
        box: where it stands.
        anchor: where its text begins: `start`, `middle` or `end` of a line.
        x: of that place.
        lead: from where a thin line leads to the point; None where the name stands next to it.
    """

    lines: tuple[str, ...]
    box: Box
    anchor: str
    x: float
    lead: tuple[float, float] | None


def text_width(text: str) -> float:
    """Estimate the width of `text` in units of the drawing.

    Example:
        >>> text_width("mm") > text_width("nn") > text_width("ii")
        True
    """
    ems = 0.0
    for sign in text:
        if unicodedata.east_asian_width(sign) in "WF":
            ems += 1.0
        elif sign in _NARROW:
            ems += 0.36
        elif sign in _WIDE:
            ems += 0.98
        else:
            ems += 0.72 if sign.isupper() else 0.63
    return ems * FONT


def shortened(name: str, most: int) -> str:
    """Return `name` in at most `most` characters: its middle goes, since names often differ at their ends.

    Example:
        >>> shortened("magnitude pruning of 50 % of the weights", 20)
        'magnitude pr…weights'
    """
    end = most * 3 // 8
    return name if len(name) <= most else f"{name[: most - end - 1].rstrip()}…{name[-end:].lstrip()}"


def place(
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    *,
    lines: Sequence[Box],
    frame: Box,
    radius: float,
) -> list[Label]:
    """Return a place for each name.

    Args:
        names: to be written, in the order of `points`.
        points: middle of each point.
        lines: what no name may cross: error bars, the front.
        frame: what no name may leave.
        radius: of a point.
    """
    dots = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    placed: dict[int, Label] = {}
    lines_each = 2 if len(names) <= _MOST_TALL else 1
    # The most crowded first: it has the fewest places to go.
    crowd = [sum(math.dist(a, b) < 90 for b in points) for a in points]
    order = sorted(range(len(names)), key=lambda number: -crowd[number])
    # A name that came late may have left its neighbours a better place: all are looked at again.
    for index in order * _ROUNDS:
        taken = [*(dot.grown(1) for dot in dots)]
        taken += [label.box.grown(1.5) for number, label in placed.items() if number != index]
        best, least = None, math.inf
        for label in _candidates(names[index], points[index], lines_each):
            outside = label.box.area - label.box.overlap(frame)
            covered = sum(label.box.overlap(box) for box in taken)
            crossed = sum(label.box.grown(1).overlap(box.grown(0.5)) for box in lines)
            cost = 20 * (outside + covered + crossed) + _led_through(label, points[index], taken, dots[index])
            if cost < least:
                best, least = label, cost
            if cost == 0:
                break
        assert best is not None
        placed[index] = best
    return [placed[index] for index in range(len(names))]


def _candidates(name: str, point: tuple[float, float], lines: int) -> list[Label]:
    wrapped = tuple(textwrap.wrap(shortened(name, lines * _WRAP - 2), _WRAP, max_lines=lines, placeholder="…") or [""])
    width, height = max(map(text_width, wrapped)), _LINE * len(wrapped)
    x, y = point
    found = []
    for ring, distance in enumerate(_RINGS):
        for angle in _ANGLES:
            across, up = math.cos(angle), math.sin(angle)
            at, level = x + distance * across, y - distance * up
            anchor = "start" if across > 0.3 else "end" if across < -0.3 else "middle"
            left = at if anchor == "start" else at - width if anchor == "end" else at - width / 2
            top = level - height * (0.5 + 0.5 * up)
            lead = (at, level) if ring else None
            found.append(Label(wrapped, Box(left, top, left + width, top + height), anchor, at, lead))
    return found


def _led_through(label: Label, point: tuple[float, float], taken: Sequence[Box], own: Box) -> float:
    """What it costs that the line from a name to its point runs through others, or that there must be one."""
    if label.lead is None:
        return 0.0
    (x, y), (px, py) = label.lead, point
    steps = [(x + (px - x) * part, y + (py - y) * part) for part in (0.2, 0.4, 0.6, 0.8)]
    hits = sum(
        box.left < a < box.right and box.top < b < box.bottom
        for box in taken
        for a, b in steps
        if box.overlap(own) < own.area
    )
    return 40.0 * hits + 0.3 * math.dist((x, y), (px, py))
