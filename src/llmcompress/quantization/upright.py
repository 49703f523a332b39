"""Weights as the matrices that grids are laid on, outputs first, and back in the form in which a layer stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer


def upright(layer: WeightLayer) -> torch.Tensor:
    """Return the weight as (outputs, inputs), or (entries, width) of a table, float32; experts one below the other."""
    weight = layer.weight.detach()
    if layer.kind == "experts":
        return (weight.mT if layer.input_axis == 1 else weight).flatten(0, 1).float()
    return (weight.T.contiguous() if layer.kind == "conv1d" else weight).float()


def as_stored(layer: WeightLayer, matrix: torch.Tensor) -> torch.Tensor:
    """Return an upright `matrix` in the shape and dtype in which `layer` stores its weight.

    Example:
        >>> from llmcompress.anatomy.layers import weight_layers
        >>> from llmcompress.testing import tiny_model
        >>> layers = weight_layers(tiny_model("gpt2"))
        >>> all(torch.equal(as_stored(layer, upright(layer)), layer.weight) for layer in layers)
        True
    """
    if layer.kind == "experts":
        stacked = matrix.unflatten(0, (layer.weight.shape[0], -1))
        matrix = stacked.mT if layer.input_axis == 1 else stacked
    elif layer.kind == "conv1d":
        matrix = matrix.T
    return matrix.to(layer.weight.dtype)
