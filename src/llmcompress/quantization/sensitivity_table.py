"""What was found about each layer and width: a table, a heat map, and the best choice of bits within a target."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from ..errors import ConfigError
from .allocation import Choice, allocate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LayerDamage(BaseModel, frozen=True, extra="forbid"):
    """One layer at one width, all others in float."""

    layer: str = Field(description="name of the layer, as patterns see it")
    weights: int = Field(description="how many it has")
    bits: int = Field(description="of a code")
    bits_a_weight: float = Field(description="stored: with scales and zero points")
    damage: float = Field(description="mean KL(base || model with this layer rounded), nats an answer")


class Sensitivity(BaseModel, frozen=True, extra="forbid"):
    """The damage of each layer at each width; printed as a table, shown as a heat map in a notebook.

    Damages of several layers add up, roughly: `predicted` says what a choice of bits would do, `allocate` finds the
    best one.

    Example:
        >>> one = {"layer": "up", "weights": 64}
        >>> rows = [LayerDamage(**one, bits=2, bits_a_weight=2.5, damage=0.5)]
        >>> rows.append(LayerDamage(**one, bits=4, bits_a_weight=4.5, damage=0.01))
        >>> found = Sensitivity(model="Tiny", method="kl", answers=100, fit="min_max", group_size=32, rows=rows)
        >>> print(found)
        Tiny: KL to the float model with one layer rounded, nats an answer (100 answers, groups of 32, min_max)
        layer  weights  2 bits  4 bits
        up          64     0.5    0.01
        >>> found.allocate(4.5), found.predicted(2)
        ({'up': 4}, 0.5)
    """

    model: str = Field(description="class of the model")
    method: Literal["kl", "fisher"] = Field(description="measured, or estimated to second order")
    answers: int = Field(description="tokens, texts or labels that were compared")
    fit: str = Field(description="how grids were laid")
    group_size: int | None = Field(description="inputs that share a scale; None: a row")
    rows: tuple[LayerDamage, ...] = Field(description="a row for each layer and width")

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the model's order."""
        return list(self._by_layer)

    @property
    def bits(self) -> list[int]:
        """The widths, ascending."""
        return sorted({row.bits for row in self.rows})

    def damage(self, layer: str, bits: int) -> float:
        """Return the damage of a layer at a width, in nats.

        Raises:
            ConfigError: that was not measured.
        """
        try:
            return self._by_layer[layer][bits].damage
        except KeyError:
            raise ConfigError(
                f"Sensitivity.damage must be asked for one of the layers, at bits of {self.bits}, got {layer!r} "
                f"and {bits!r}."
            ) from None

    def predicted(self, bits: int | Mapping[str, int]) -> float:
        """Return the sum of the damages for one width, or for one a layer: what is to be expected of all together."""
        chosen = dict.fromkeys(self.layers, bits) if isinstance(bits, int) else bits
        return sum(self.damage(layer, width) for layer, width in chosen.items())

    def bits_a_weight(self, bits: int | Mapping[str, int]) -> float:
        """Return the stored bits a weight, averaged over the weights of all layers, for one width or one a layer.

        Raises:
            ConfigError: a layer has none, is not of this table, or was not measured at its width.
        """
        chosen = dict.fromkeys(self.layers, bits) if isinstance(bits, int) else bits
        if chosen.keys() != self._by_layer.keys():
            odd = next(iter(chosen.keys() ^ self._by_layer.keys()))
            raise ConfigError(
                f"Sensitivity.bits_a_weight must be given bits for each of its layers, got {odd!r} amiss."
            )
        absent = next((width for width in chosen.values() if width not in self.bits), None)
        if absent is not None:
            raise ConfigError(f"Sensitivity.bits_a_weight must be given bits of {self.bits}, got {absent!r}.")
        rows = [self._by_layer[layer][width] for layer, width in chosen.items()]
        return sum(row.bits_a_weight * row.weights for row in rows) / sum(row.weights for row in rows)

    def allocate(self, target_bits: float, bits: Sequence[int] | None = None) -> dict[str, int]:
        """Return the bits of each layer that do the least damage within a target; good as `overrides` of a strategy.

        Args:
            target_bits: the most stored bits a weight, scales and zero points included, averaged over all weights.
            bits: widths that may be chosen; None takes all that were measured.

        Raises:
            ConfigError: the target is below what the fewest bits take, or a width was not measured.
        """
        if isinstance(target_bits, bool) or not isinstance(target_bits, (int, float)) or not math.isfinite(target_bits):
            raise ConfigError(f"Sensitivity.allocate: target_bits must be a number, such as 4.5, got {target_bits!r}.")
        allowed = self.bits if bits is None else sorted(set(bits))
        absent = [width for width in allowed if width not in self.bits]
        if absent or not allowed:
            raise ConfigError(f"Sensitivity.allocate: bits must be of {self.bits}, got {list(allowed)}.")
        choices = {
            name: [Choice(width, own[width].bits_a_weight, own[width].damage) for width in allowed]
            for name, own in self._by_layer.items()
        }
        weights = {name: next(iter(own.values())).weights for name, own in self._by_layer.items()}
        return allocate(choices, weights, target_bits)

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values; `Sensitivity.model_validate` reads it."""
        return self.model_dump(mode="json")

    def to_json(self, path: str | Path | None = None) -> str:
        """Return all as JSON, and write it to `path` if one is given; `Sensitivity.model_validate_json` reads it."""
        text = self.model_dump_json(indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the heat map, and save it to `path` (`.png`, `.svg`, `.pdf`) if one is given; needs matplotlib.

        Raises:
            MissingInputError: matplotlib is not installed.
        """
        from .sensitivity_plot import heat_map

        figure = heat_map(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def title(self) -> str:
        """Return what the numbers are, in words."""
        how = "KL" if self.method == "kl" else "estimated KL"
        group = "one scale a row" if self.group_size is None else f"groups of {self.group_size}"
        return (
            f"{self.model}: {how} to the float model with one layer rounded, nats an answer "
            f"({self.answers:,} answers, {group}, {self.fit})"
        )

    def __str__(self) -> str:
        cells = [self._head(), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in pairs).rstrip()
            for pairs in ([*enumerate(zip(row, widths, strict=True))] for row in cells)
        ]
        return "\n".join([self.title(), *lines])

    def _repr_html_(self) -> str:
        from .sensitivity_plot import colour

        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self._head())
        body = []
        largest = max((row.damage for row in self.rows), default=0.0)
        for name, cells in zip(self.layers, self._cells(), strict=True):
            row = f'<td style="text-align:left">{html.escape(cells[0])}</td><td>{cells[1]}</td>'
            for width, cell in zip(self.bits, cells[2:], strict=True):
                shade = colour(self._by_layer[name][width].damage, largest) if cell else ("transparent", "inherit")
                row += f'<td style="background:{shade[0]};color:{shade[1]}">{cell}</td>'
            body.append(f"<tr>{row}</tr>")
        caption = f"<caption>{html.escape(self.title())}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    @cached_property
    def _by_layer(self) -> dict[str, dict[int, LayerDamage]]:
        found: dict[str, dict[int, LayerDamage]] = {}
        for row in self.rows:
            found.setdefault(row.layer, {})[row.bits] = row
        return found

    def _head(self) -> list[str]:
        return ["layer", "weights", *(f"{width} bits" for width in self.bits)]

    def _cells(self) -> list[list[str]]:
        rows = []
        for name, own in self._by_layer.items():
            weights = next(iter(own.values())).weights
            rows.append([name, f"{weights:,}", *(f"{own[w].damage:.2g}" if w in own else "" for w in self.bits)])
        return rows
