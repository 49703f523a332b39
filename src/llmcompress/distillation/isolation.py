"""What training touches of a model beside the weights, given back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..anatomy.kept import modes_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def traces_removed(model: PreTrainedModel) -> Iterator[None]:
    """Train in fp32, and undo all that Trainer and accelerate leave on a model beside its weights."""
    attributes = set(vars(model))
    device, cache = model.device, getattr(model.config, "use_cache", None)
    dtypes = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # Steps of a small learning rate vanish in the rounding of half precision.
    for parameter in dtypes:
        parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
    try:
        with modes_kept(model):
            yield
    finally:
        model.to(device)
        model.zero_grad(set_to_none=True)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        # Accelerate puts its autocast around `forward` as an attribute of the instance.
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        if cache is not None:
            model.config.use_cache = cache
        elif "use_cache" in vars(model.config):
            del model.config.use_cache


@contextmanager
def checkpointed_activations(model: PreTrainedModel) -> Iterator[None]:
    """Keep only what enters each block for the backward pass, and compute the rest again there (arXiv 1604.06174)."""
    again = {"use_reentrant": False}
    # Releases before 5.20 or so know them by their older name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=again)
        end = model.activation_checkpointing_disable
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        end = model.gradient_checkpointing_disable
    try:
        yield
    finally:
        end()
        model.disable_input_require_grads()
