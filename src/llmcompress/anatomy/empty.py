"""A model's class built from a config without memory: the shapes that a folder with this config will have."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the class of `model` from `config` on the meta device.

    The config goes the way through its dict that saving and loading takes, with its own validation; notes of how
    weights are stored are left out.

    Raises:
        Exception: whatever the config or the model class raises.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> empty_model(model, model.config).device
        device(type='meta')
    """
    return empty_of_class(type(model), config)


def empty_of_class(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model class from `config` on the meta device, as `empty_model` does."""
    loaded = type(config).from_dict(copy.deepcopy(config).to_dict())
    if getattr(loaded, "quantization_config", None) is not None:
        loaded.quantization_config = None
    # The dict names the dtype by a string, which some modules cannot read; loading turns it back as well.
    if isinstance(loaded.dtype, str):
        loaded.dtype = getattr(torch, loaded.dtype)
    with torch.device("meta"):
        return model_class(loaded)
