"""What passes over texts take: the memory of states, statistics and gradients, and the arithmetic, from sizes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..anatomy.layers import WeightLayer, weight_layers
from ..anatomy.turns import in_turns
from .batches import calibration_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..compressor import Context

# Statistics, gradients and what is kept for them are float32.
_EXACT = 4
# Numbers kept for the backward pass for each input and output of a layer: what products, norms, gates and dropout keep.
_KEPT = 1
# Tables of all tokens by all classes: logits of both, their logarithms, probabilities, and gradients.
_TABLES = 4


@dataclass(frozen=True)
class Effort:
    """What a pass over calibration texts takes.

    Attributes:
        scratch: bytes at most, beside the model.
        flops: of the passes and of the statistics.
        tokens: of all texts.
    """

    scratch: int
    flops: float
    tokens: int


def calibration_effort(
    model: PreTrainedModel,
    context: Context,
    layers: Sequence[WeightLayer],
    *,
    who: str,
    samples: int,
    max_length: int,
    products: bool,
    passes: int = 2,
) -> Effort:
    """Return what it takes to hear the inputs of `layers` block after block.

    Args:
        model: on the meta device.
        context: its texts are tokenised.
        layers: whose inputs are heard.
        who: the strategy, for messages.
        samples: texts at most.
        max_length: tokens a text at most.
        products: whether sums of x x^T are kept, or one number an input.
        passes: through each block.

    Raises:
        MissingInputError: as the calibration itself.
    """
    batches = calibration_batches(model, context, who=who, samples=samples, max_length=max_length)
    sizes = [batch["input_ids"].numel() for batch in batches]
    tokens, largest = sum(sizes), max(sizes)
    width = model.get_input_embeddings().weight.shape[-1]
    states = 2 * tokens * width * model.dtype.itemsize
    flops = 0.0
    kept: dict[str, int] = defaultdict(int)
    passing: dict[str, int] = defaultdict(int)
    for block, own in in_turns(model, layers):
        for layer in own:
            inputs = layer.weight.shape[layer.input_axis]
            experts = layer.weight.shape[0] if layer.kind == "experts" else 1
            outputs = layer.weight.numel() // (inputs * experts)
            kept[block] += experts * (inputs**2 if products else inputs) * _EXACT
            passing[block] += largest * outputs * model.dtype.itemsize
            flops += passes * 2 * tokens * inputs * outputs + (2 * tokens * inputs**2 if products else 0)
    return Effort(states + max(kept[block] + passing[block] for block in kept), flops, tokens)


def activation_bytes(model: PreTrainedModel, tokens: int, *, backward: bool = True) -> int:
    """Return about how many bytes a pass over `tokens` tokens keeps, until its backward pass is done where it has one.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> activation_bytes(model, 32) == 2 * activation_bytes(model, 16)
        True
    """
    if not backward:
        return max(layer.weight.shape[0] for layer in weight_layers(model)) * tokens * _EXACT
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
