"""Models without memory: built from a config, the shapes that a folder with it will have; or a twin of a real one."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ZEROS = "_llmcompress_zeros"


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
    with torch.device("meta"), _unfilled():
        model = model_class(loaded)
    model.tie_weights()
    return model


def _unfilled() -> AbstractContextManager[None]:
    """Leave out the filling of weights, which takes as long as all else even where there is nothing to fill."""
    # Not at the top: transformers, while it is imported, imports this file to register what quantizes.
    from transformers import initialization, modeling_utils

    module = initialization if hasattr(initialization, "no_init_weights") else modeling_utils
    unfilled: AbstractContextManager[None] = module.no_init_weights()
    return unfilled


def weightless(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` on the meta device: all but the values of its tensors, ties included.

    How many weights of each tensor are zero is noted on the copy's.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> twin = weightless(model)
        >>> twin.device, twin.lm_head.weight is twin.model.embed_tokens.weight
        (device(type='meta'), True)
    """
    known: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            zeros = noted_zeros(tensor) if tensor.is_meta else tensor.numel() - int(torch.count_nonzero(tensor))
            note_zeros(empty, zeros)
        known[id(tensor)] = empty
    return copy.deepcopy(model, known)


def filled(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on the CPU of a model without weights, with random ones: signals neither vanish nor grow in it.

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("resnet")
        >>> bool(filled(weightless(model))(**tiny_inputs(model)).logits.isfinite().all())
        True
    """
    model = copy.deepcopy(model).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.dim() > 1:
                tensor.normal_(std=(tensor.shape[0] / tensor.numel()) ** 0.5, generator=draw)
            else:
                # Scales and variances are near 1, what is added is near 0.
                tensor.normal_(float(not name.endswith(("bias", "mean"))), 0.1, generator=draw)
    return model


def note_zeros(weight: torch.Tensor, zeros: int) -> None:
    """Note on a weight without content how many of its values are, or will be, zero.

    Example:
        >>> weight = torch.empty(3, device="meta")
        >>> note_zeros(weight, 2)
        >>> noted_zeros(weight)
        2
    """
    setattr(weight, _ZEROS, zeros)


def carry_zeros(before: torch.Tensor, after: torch.Tensor) -> None:
    """Note on `after`, a part of `before`, its share of the zeros noted there; tensors with content need no note."""
    if before.is_meta:
        note_zeros(after, round(noted_zeros(before) * after.numel() / max(before.numel(), 1)))


def noted_zeros(weight: torch.Tensor) -> int:
    """Return how many zeros were noted on a weight without content; 0 where nothing was."""
    zeros: int = getattr(weight, _ZEROS, 0)
    return zeros


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return which parameters transformers loads in another dtype than `dtype`, by patterns of their names.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> dtype_plan(tiny_model("bert"), torch.bfloat16)
        {}
    """
    if hasattr(model, "_get_dtype_plan"):
        return dict(model._get_dtype_plan(dtype))
    return dict(model.dtype_plan)  # transformers 5.0
