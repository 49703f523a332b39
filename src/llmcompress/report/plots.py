"""Quality against cost, as an SVG that takes its colours from the page it stands in."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MissingInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib draws with these; they are then replaced by the page's own colours, so that one drawing serves light and
# dark. Each is a colour that nothing else uses.
_INK, _FAINT, _ACCENT, _MUTED, _PAPER = "#010203", "#010204", "#010205", "#010206", "#010207"
_PAGE_COLOURS = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    _ACCENT: "var(--accent)",
    _MUTED: "var(--muted)",
    _PAPER: "var(--paper)",
}
_INCHES = (5.4, 3.5)
_FONT_POINTS = 10.5
# A cost axis begins at zero unless the models lie further apart than this: then it is logarithmic.
_LARGEST_LINEAR_RATIO = 25
_LABEL_WIDTH = 24  # characters a line
_DOT = 7  # pixels around the middle of a point that no label may cover
# Where a label may stand beside its point, in points of print: the first free place is taken.
_LABEL_PLACES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (8, 9, "left", "bottom"),
    (8, -9, "left", "top"),
    (-8, 9, "right", "bottom"),
    (-8, -9, "right", "top"),
    (9, 20, "left", "bottom"),
    (9, -20, "left", "top"),
    (-9, 20, "right", "bottom"),
    (-9, -20, "right", "top"),
)


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
    prefix: str,
) -> str:
    """Draw quality against cost, the front marked, each point labelled, and return the `<svg>` element.

    Args:
        points: the models.
        cost: title of the horizontal axis.
        quality: title of the plot: what the vertical axis shows.
        higher_is_better: direction of the quality.
        cost_text: writes a tick of the horizontal axis.
        quality_text: writes a tick of the vertical axis.
        prefix: makes the ids of this drawing differ from those of others on the page.

    Raises:
        MissingInputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise MissingInputError(
            "the HTML report needs matplotlib, which is not installed; do pip install llmcompress[report]."
        ) from error

    # Text stays text: it takes the page's font, can be searched and copied, and a name is never read as mathematics.
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": _FONT_POINTS}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _draw_axes(axes, cost)
        front = pareto_front(points, higher_is_better=higher_is_better)
        axes.plot(
            [point.cost for point in front],
            [point.quality for point in front],
            drawstyle="steps-post",
            color=_ACCENT,
            alpha=0.45,
            linewidth=1.4,
            zorder=1,
        )
        for point in points:
            colour = _ACCENT if point in front else _MUTED
            if point.low is not None and point.high is not None:
                axes.plot([point.cost] * 2, [point.low, point.high], color=colour, alpha=0.35, linewidth=2.5, zorder=2)
            # The base is a ring: what the others are measured against.
            face = _PAPER if point.base else colour
            axes.plot(point.cost, point.quality, "o", color=colour, markerfacecolor=face, markersize=8, zorder=3)
        _scale(axes, points)
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost_text(value)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quality_text(value)))
        if not higher_is_better:
            axes.invert_yaxis()  # up is better in every plot
        _label(figure, axes, points, front)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), prefix, f"{quality} against {cost}")


def _draw_axes(axes: Axes, cost: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(colors=_MUTED, length=0, pad=6)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(cost, color=_MUTED, loc="right", parse_math=False)


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    costs = [point.cost for point in points]
    if min(costs) > 0 and max(costs) / min(costs) > _LARGEST_LINEAR_RATIO:
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.8, max(costs) * 1.8)
    else:
        axes.set_xlim(0, max(costs) * 1.12 or 1)
    axes.margins(y=0.18)


def _label(figure: Figure, axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Put each name beside its point, where it covers neither a point, nor a line, nor another name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = axes.get_window_extent(renderer)

    def between(ends: Sequence[tuple[float, float]], around: float) -> Bbox:
        corners = axes.transData.transform(ends)
        return Bbox([corners.min(0) - around, corners.max(0) + around])

    taken = [between([(point.cost, point.quality)], _DOT) for point in points]
    lines = [
        between([(p.cost, p.low), (p.cost, p.high)], 1) for p in points if p.low is not None and p.high is not None
    ]
    for left, right in itertools.pairwise(front):
        corner = (right.cost, left.quality)
        lines += [between([(left.cost, left.quality), corner], 1), between([corner, (right.cost, right.quality)], 1)]
    for index, point in enumerate(points):
        text = axes.annotate(
            "\n".join(textwrap.wrap(point.name, _LABEL_WIDTH, max_lines=2, placeholder="…")),
            (point.cost, point.quality),
            xytext=(0, 0),
            textcoords="offset points",
            color=_INK,
            parse_math=False,
            zorder=4,
        )
        others = [box for number, box in enumerate(taken) if number != index]
        best, fewest = _LABEL_PLACES[0], None
        for place in _LABEL_PLACES:
            _place(text, place)
            box = text.get_window_extent(renderer)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            hits = 3 * outside + 2 * box.count_overlaps(others) + box.count_overlaps(lines)
            if fewest is None or hits < fewest:
                best, fewest = place, hits
        _place(text, best)
        taken.append(text.get_window_extent(renderer))


def _place(text: Any, place: tuple[int, int, str, str]) -> None:
    right, up, horizontal, vertical = place
    text.set_position((right, up))
    text.set_horizontalalignment(horizontal)
    text.set_verticalalignment(vertical)


def _inline(svg: str, prefix: str, title: str) -> str:
    """Make a drawing part of a page: no prologue, own ids, the page's colours and font, any width."""
    from xml.sax.saxutils import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for drawn, wanted in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, wanted)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    opening = svg.index(">") + 1
    return f'{svg[: opening - 1]} role="img"><title>{escape(title)}</title>{svg[opening:]}'
