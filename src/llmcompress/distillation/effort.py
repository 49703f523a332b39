"""What a training keeps in memory beside weights, from sizes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..anatomy.layers import weight_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers kept for the backward pass for each input and output of a layer: what products, norms, gates and dropout keep.
_KEPT = 2
# Tables of all tokens by all classes: logits of both, their logarithms, probabilities, and gradients.
_TABLES = 6
_EXACT = 4


def activation_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return about how many bytes a step of training on `tokens` tokens keeps until its backward pass is done.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> activation_bytes(model, 32) == 2 * activation_bytes(model, 16)
        True
    """
    kept = 0
    for layer in weight_layers(model):
        inputs, outputs = layer.weight.shape[layer.input_axis], layer.weight.shape[-1 if layer.input_axis == 0 else 0]
        if layer.place == "head":
            kept += _TABLES * outputs
        elif layer.kind in ("linear", "conv1d"):
            kept += _KEPT * (inputs + outputs)
        elif layer.kind == "experts":
            kept += _KEPT * sum(layer.weight.shape[1:])
    return kept * tokens * _EXACT
