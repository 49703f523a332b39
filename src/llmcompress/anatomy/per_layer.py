"""What differs from layer to layer in a pruned model, in the words of transformers' `per_layer_config`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .find import anatomy
from .module_sizes import ModuleSizes, build, resize
from .parts import Block

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def per_layer_config(model: PreTrainedModel, sizes: ModuleSizes) -> dict[str, dict[str, int]]:
    """Return FFN width, heads and experts of each block where they are not what the config says.

    For the reader of a `config.json`, and for tools: `sizes` alone is what a folder is loaded by. transformers has a
    `per_layer_config` of the same form in every config, but its own models do not build from it, and with it refuse or
    warn at every look at the plain attribute; so it is not written there.

    Args:
        model: its config and class are used, its weights are not.
        sizes: what `module_sizes` returned for it.

    Returns:
        Block index -> attribute -> value; empty for a model with no or more than one stack of blocks.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> up, down = {"weight": [96, 64], "bias": [96]}, {"weight": [64, 96]}
        >>> sizes = {
        ...     "bert.encoder.layer.1.intermediate.dense": {"tensors": up, "attributes": {}},
        ...     "bert.encoder.layer.1.output.dense": {"tensors": down, "attributes": {}},
        ... }
        >>> per_layer_config(model, sizes)
        {'1': {'intermediate_size': 96}}
    """
    told, real = build(model), build(model)
    resize(real, sizes)
    try:
        plain, pruned = anatomy(told), anatomy(real)
    except UnsupportedModelError:
        return {}
    if [len(stack) for stack in plain.stacks] != [len(stack) for stack in pruned.stacks] or len(plain.stacks) != 1:
        return {}
    found = {}
    for index, blocks in enumerate(zip(plain.stacks[0], pruned.stacks[0], strict=True)):
        before, after = map(_numbers, blocks)
        differs = {name: value for name, value in after.items() if value != before.get(name)}
        if differs:
            found[str(index)] = differs
    return found


def _numbers(block: Block) -> dict[str, int]:
    numbers = {}
    for feed_forward in (*(experts.inner for experts in block.experts), *block.feed_forwards):
        numbers["intermediate_size"] = feed_forward.width
    for attention in block.attentions:
        numbers["num_attention_heads"] = attention.heads
        if attention.kv_heads != attention.heads:
            numbers["num_key_value_heads"] = attention.kv_heads
    for experts in block.experts:
        numbers["num_local_experts"] = experts.count
    return numbers
