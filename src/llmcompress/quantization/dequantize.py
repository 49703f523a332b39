"""A quantized model as a plain float model again: to train it, to prune it, or to save it for other tools."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy.module_sizes import build, module_sizes, quantized_by, resize
from ..errors import ConfigError, UnsupportedModelError
from .between import use_plain
from .fast_path import leave_fast_path
from .hf import METHOD, mark
from .modules import QuantizedModule, replace_modules

_BITSANDBYTES = "bitsandbytes"
# transformers notes these on a model that it loaded by bitsandbytes.
_LOADED = ("is_loaded_in_4bit", "is_4bit_serializable", "is_loaded_in_8bit", "is_8bit_serializable")


def dequantize(model: PreTrainedModel, *, inplace: bool = False) -> PreTrainedModel:
    """Return `model` with float weights in the place of codes: those that the codes stand for.

    What quantization lost stays lost: the float weights are the rounded ones, and all memory of float weights is needed
    again. Logits are those of the quantized model where that computes exactly (`compute="float"`); where activations
    are coded too, they come out a little better. What a strategy changed beside the codes (scales folded into norms)
    stays as it is. The result trains, is pruned on, and its folder loads without llmcompress, unless sizes were pruned
    that a plain config does not tell.

    Args:
        model: quantized by llmcompress or by bitsandbytes.
        inplace: whether to change `model` itself; otherwise it is copied first.

    Returns:
        The float model, in the dtype, on the device, and in the train or eval mode of `model`. Weights that were frozen
        before they were quantized in this process are so again; of a model that was loaded, or that bitsandbytes
        quantized, all can be trained.

    Raises:
        ConfigError: `model` is no transformers model.
        UnsupportedModelError: `model` is not quantized, or by a method that is not known here, or its config does not
            build a model of its modules.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> small = lc.compress(tiny_model("llama"), lc.DynamicQuantization(), progress=False).model
        >>> lc.dequantize(small).model.layers[0].mlp.up_proj
        Linear(in_features=64, out_features=128, bias=False)
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model must be a transformers model, such as result.model, got {model!r:.80}.")
    method = quantized_by(model)
    if method is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} must be quantized for lc.dequantize, and has float weights already; use it as it "
            "is."
        )
    if method not in (METHOD, _BITSANDBYTES):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized by {method!r}, which lc.dequantize cannot read; it must be "
            f"llmcompress or bitsandbytes. Try model.dequantize() of transformers."
        )
    result = model if inplace else copy.deepcopy(model)
    dtype = result.dtype
    floats = build(result)
    # Layers that bitsandbytes coded have no sizes of their own, and it refuses pruned ones: see `refuse_sizes`.
    resize(floats, module_sizes(result) if method == METHOD else {})
    places = dict(floats.named_modules(remove_duplicate=False))
    shared: dict[int, nn.Parameter] = {}
    # One layer at a time: codes and floats of the whole model need not fit in memory together.
    leave_fast_path(result)
    use_plain(result)
    for path, module in list(result.named_modules()):
        weights = _float_weights(module)
        if weights is None:
            continue
        layer = _filled(places[path], module, weights, dtype, shared)
        replace_modules(result, {module: layer})
    if method == _BITSANDBYTES:
        _forget_bitsandbytes(result)
    mark(result)
    return result


def _filled(
    layer: nn.Module,
    module: nn.Module,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    shared: dict[int, nn.Parameter],
) -> nn.Module:
    """Give the empty float `layer` the `weights` that `module` stored in codes, and all else of `module` as it is."""
    for name, value in vars(module).items():
        # A config of the model itself, not of the copy that built the layer: switches of the attention live there.
        if name in vars(layer) and hasattr(value, "to_dict"):
            setattr(layer, name, value)
    for name in layer._parameters:
        if name not in weights:
            layer._parameters[name] = module._parameters.get(name)
            continue
        codes = module._parameters.get(name)
        if codes is None or id(codes) not in shared:
            weight = weights[name].T.contiguous() if isinstance(layer, Conv1D) else weights[name]
            trains = not isinstance(module, QuantizedModule) or name not in module.frozen
            parameter = nn.Parameter(weight.to(dtype), requires_grad=trains)
            if codes is None:
                layer._parameters[name] = parameter
                continue
            shared[id(codes)] = parameter
        layer._parameters[name] = shared[id(codes)]
    for name in layer._buffers:
        layer._buffers[name] = module._buffers[name]
    for name in layer._modules:
        layer._modules[name] = module._modules[name]
    return layer.train(module.training)


def _float_weights(module: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return what the codes of `module` stand for, by name; None where it has none. A `Conv1D` is given upright."""
    if isinstance(module, QuantizedModule):
        return module.float_weights()
    weight = cast(Any, module._parameters.get("weight"))
    if type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return None
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    # On some CPUs bitsandbytes lays the codes out anew at the first pass; taking the state dict brings them back.
    module.state_dict()
    return {"weight": dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach().float()}


def _forget_bitsandbytes(model: PreTrainedModel) -> None:
    """Take away what transformers and `BitsAndBytesQuantization` noted on the model, its frozen weights among it."""
    for name in (*_LOADED, "hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.requires_grad_(True)
