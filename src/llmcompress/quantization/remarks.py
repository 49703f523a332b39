"""Remarks for plans and reports, put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..compressor import Action, Context
from . import kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def int8_remarks(
    model: PreTrainedModel, context: Context, layers: Iterable[WeightLayer], *, smoothed: bool
) -> list[Action]:
    """Say what int8 changes beside its layers, and what products take in memory, which no size has before they ran.

    Args:
        model: as it is.
        context: its device is where a model without weights will be.
        layers: that become int8.
        smoothed: whether activations are smoothed first.
    """
    remarks = [FOLDED] if smoothed else []
    if kernels.copies_codes(torch.device(context.device) if model.device.type == "meta" else model.device):
        multiplied = {id(layer.weight): layer.weight.numel() for layer in layers if layer.kind != "embedding"}
        reason = (
            f"when a layer is first used its product makes a copy of the codes, about "
            f"{sum(multiplied.values()) / 1e6:.3g} MB in all, which is memory and never saved"
        )
        remarks.append(Action(path="", reason=reason))
    return remarks
