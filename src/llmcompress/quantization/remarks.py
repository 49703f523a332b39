"""Remarks for plans and reports, put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..compressor import Action
from . import kernels

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer


FOLDED = Action(
    path="",
    reason="norms and layers before are divided by scales where nothing else reads them; which, is found by trying",
)
"""What a plan says of scales that are folded into other tensors: it has no weights to try them on."""


def joined(*remarks: str | None) -> str | None:
    """Return the remarks that there are as one, or None.

    Example:
        >>> joined("shared with wte", None, "its last group has 8 of 64 inputs")
        'shared with wte; its last group has 8 of 64 inputs'
    """
    return "; ".join(filter(None, remarks)) or None


def of_copies(layers: Iterable[WeightLayer], device: torch.device) -> list[Action]:
    """Say what products with int8 codes take in memory beside the codes, which no size of a model that never ran has.

    Args:
        layers: that become int8.
        device: where the products will be computed.
    """
    if not kernels.copies_codes(device):
        return []
    multiplied = {id(layer.weight): layer.weight.numel() for layer in layers if layer.kind != "embedding"}
    reason = (
        f"when a layer is first used its product makes a copy of the codes, about {sum(multiplied.values()) / 1e6:.3g} "
        f"MB in all, which is memory and never saved"
    )
    return [Action(path="", reason=reason)]
