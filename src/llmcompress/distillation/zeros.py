"""Zeros that stay zero: weights that an earlier step pruned are held during training.

Training updates every weight, so a pruned model that is trained freely is dense again after a few hundred steps (seen:
47 % of zeros became 0.1 %). Here the gradient of a held zero is zero, and the zero is written again after each step of
the optimizer, whose weight decay and momentum do not ask for a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..anatomy.layers import weight_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_SHARE = 0.01
"""A weight with a smaller share of zeros was not pruned: a few exact zeros happen."""


def pruned_weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Yield the layer name, the weight and the mask of its zeros, for each weight matrix that was pruned.

    These are the linear, Conv1D and expert weights whose share of zeros is in [`SMALLEST_SHARE`, 1).

    Example:
        >>> from torch import nn
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> _ = nn.init.zeros_(model.bert.encoder.layer[0].output.dense.weight[:, ::2])
        >>> [(name, int(zero.sum())) for name, weight, zero in pruned_weights(model)]
        [('bert.encoder.layer.0.output.dense', 4096)]
    """
    for layer in weight_layers(model):
        weight = layer.weight
        if layer.kind == "embedding" or layer.tied_to is not None or weight.device.type == "meta":
            continue
        zero = weight.detach() == 0
        if SMALLEST_SHARE <= float(zero.float().mean()) < 1:
            yield layer.name, weight, zero


class HeldZeros:
    """The zeros of a pruned model's weight matrices, kept while it is trained; one byte a weight that was pruned.

    Args:
        model: its `pruned_weights` are held.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._held = [(weight, zero) for _, weight, zero in pruned_weights(model)]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the zeros again."""
        for weight, zero in self._held:
            weight.masked_fill_(zero.to(weight.device), 0)

    @contextmanager
    def masked_gradients(self) -> Iterator[None]:
        """Keep gradients off the zeros inside, so that neither clipping nor momentum sees them."""
        handles = []
        for weight, zero in self._held:
            if weight.requires_grad:
                # The weight may have been moved after the zeros were found.
                handles.append(weight.register_hook(lambda g, zero=zero: g.masked_fill(zero.to(g.device), 0)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
