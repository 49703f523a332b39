"""The heat map of a sensitivity: layers down, widths across, damage in colours that run over powers of ten."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import MissingInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .sensitivity_table import Sensitivity

# Below this part of the largest damage all is one colour: differences there decide nothing.
_DECADES = 5
# From harmless to harmful: light to dark of one hue, which is read in print and by the colour-blind as well.
_LIGHT, _DARK = (255, 247, 236), (127, 0, 0)
# Up to so many cells, each has its number written in it.
_MOST_NUMBERS = 400


def colour(damage: float, largest: float) -> tuple[str, str]:
    """Return the colours of a cell and of the text on it, in CSS.

    Example:
        >>> colour(1.0, 1.0), colour(0.0, 1.0)
        (('rgb(127,0,0)', 'white'), ('rgb(255,247,236)', 'black'))
    """
    depth = _depth(damage, largest)
    shade = (round(light + (dark - light) * depth) for light, dark in zip(_LIGHT, _DARK, strict=True))
    return f"rgb({','.join(map(str, shade))})", "white" if depth > 0.5 else "black"


def heat_map(found: Sensitivity) -> Figure:
    """Draw `found`.

    Raises:
        MissingInputError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap, LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingInputError(
            "Sensitivity.plot() needs matplotlib, which is not installed; do pip install matplotlib, or print the "
            "table."
        ) from error
    layers, widths = found.layers, found.bits
    values = [[_known(found, layer, width) for width in widths] for layer in layers]
    largest = max((value for row in values for value in row if math.isfinite(value)), default=0.0) or 1.0
    low = largest * 10.0**-_DECADES
    size = (2.6 + 0.075 * max(map(len, layers)) + 0.62 * len(widths), 1.5 + 0.24 * len(layers))
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.add_subplot()
    ends = [tuple(part / 255 for part in end) for end in (_LIGHT, _DARK)]
    shades = LinearSegmentedColormap.from_list("damage", ends)
    clipped = [[max(value, low) if math.isfinite(value) else math.nan for value in row] for row in values]
    image = axes.imshow(clipped, aspect="auto", cmap=shades, norm=LogNorm(low, largest), interpolation="nearest")
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("bits of a code")
    how = "measured" if found.method == "kl" else "estimated from gradients"
    group = "one scale a row" if found.group_size is None else f"groups of {found.group_size}"
    figure.suptitle(
        f"{found.model}: damage of one layer rounded alone\n{how} on {found.answers:,} answers, {group}, {found.fit}",
        fontsize=10,
    )
    if len(layers) * len(widths) <= _MOST_NUMBERS:
        for row, own in enumerate(values):
            for column, value in enumerate(own):
                if math.isfinite(value):
                    ink = colour(value, largest)[1]
                    axes.text(column, row, f"{value:.1e}", ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(image, ax=axes, extend="min")
    bar.set_label("KL to the float model, nats an answer")
    return figure


def _depth(damage: float, largest: float) -> float:
    """Return where a damage is on the scale: 0 harmless, 1 the largest."""
    if not damage > 0 or not largest > 0:
        return 0.0
    return min(max(1 + math.log10(damage / largest) / _DECADES, 0.0), 1.0)


def _known(found: Sensitivity, layer: str, width: int) -> float:
    return next((row.damage for row in found.rows if row.layer == layer and row.bits == width), math.nan)
