"""A layer that becomes packed, and the grid that it gets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..anatomy.empty import noted_zeros
from ..anatomy.layers import WeightLayer
from ..anatomy.turns import let_go
from .choice import own_forward
from .grid import Coded, Grid

# 3-D weights that are no experts (a mix of two tokens, a kernel) have such an axis.
_NARROWEST = 16
PRUNED = 0.01
"""With a larger share of exact zeros than this a layer counts as pruned, and keeps them."""


@dataclass(frozen=True)
class Target:
    """A layer that becomes packed.

    Attributes:
        layer: the layer.
        grid: the levels of its weights.
        remark: for the plan, or None.
    """

    layer: WeightLayer
    grid: Grid
    remark: str | None = None

    def __str__(self) -> str:
        columns = self.layer.weight.shape[self.layer.input_axis]
        kind = self.grid.codebook or f"int{self.grid.bits}"
        group = "one scale a row" if self.grid.group_size is None else f"groups of {self.grid.size(columns)}"
        return f"{kind}, {group}: {self.grid.bits_a_weight(columns):.2f} bits a weight"


def blank(target: Target) -> Coded:
    """Return codes without content for a layer without weights."""
    layer, grid = target.layer, target.grid
    columns = layer.weight.shape[layer.input_axis]
    rows = layer.weight.numel() // max(columns, 1)
    groups = grid.groups(columns)
    return Coded(
        torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        torch.empty(rows, groups, dtype=grid.scale_dtype, device="meta"),
        torch.empty(rows, groups, dtype=torch.uint8, device="meta") if grid.has_zero else None,
    )


def share_of_zeros(weight: torch.Tensor) -> float:
    """Return the share of weights that are exactly 0; on the meta device of those noted."""
    if weight.is_meta:
        return noted_zeros(weight) / max(weight.numel(), 1)
    share = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    let_go(weight)
    return share


def by_weight(targets: Sequence[Target]) -> dict[int, list[Target]]:
    """Return the targets that share a weight together, by its id."""
    sharing: dict[int, list[Target]] = defaultdict(list)
    for target in targets:
        sharing[id(target.layer.weight)].append(target)
    return sharing


def why_float(layer: WeightLayer) -> str | None:
    """Say why a layer cannot be packed, or None."""
    if layer.kind == "experts" and min(layer.weight.shape[1:]) < _NARROWEST:
        rows, columns = layer.weight.shape[1:]
        return f"matrices of {rows} x {columns} are too small for groups of their own"
    return own_forward(layer.module)
