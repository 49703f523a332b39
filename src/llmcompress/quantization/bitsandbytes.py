"""Weights in bitsandbytes' 4-bit or 8-bit formats, as transformers knows them: the folder needs no llmcompress."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from ..anatomy.layers import WeightLayer, refuse_nonfinite, select, weight_layers
from ..anatomy.saved import saved_tensors
from ..compressor import Action, Compressor, Context, Outline
from ..errors import ConfigError, NothingToCompressError, PluginError, VerificationError
from ..registry import register
from .bitsandbytes_empty import empty_layer
from .bitsandbytes_paths import product_path
from .checks import refuse_quantized, refuse_sizes
from .modules import replace_modules

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

# BitsAndBytesConfig has no field for the block size, and bitsandbytes' own default is this one.
_BLOCK = 64
# The CPU kernels of bitsandbytes work on so many outputs at a time, and stop at a layer that they do not divide.
_OUTPUTS = 32

_EXPERTS = "3-D experts, which bitsandbytes leaves in float (bitsandbytes#1849); DynamicQuantization codes them in int8"


@register("bitsandbytes_quantization")
class BitsAndBytesQuantization(Compressor):
    """Store the linear layers of the blocks in a format of bitsandbytes; needs `pip install 'llmcompress[bnb]'`.

    The result is transformers' own: `config.quantization_config` is a `BitsAndBytesConfig`, and the folder loads by
    plain `from_pretrained` wherever bitsandbytes is installed. Made for GPUs. On a CPU the model becomes smaller but
    slower: the plan says which kernel there is, the report of the run by how much it is slower. All weights of the
    result are frozen, since the CPU kernels fail where gradients are asked for.

    Left in float, and told: heads, embeddings, 3-D experts with their share of the weights (bitsandbytes skips those
    without a word), modules that transformers keeps in float32, and for 4 bits layers whose sizes the kernels do not
    divide.

    Args:
        kind: `"nf4"`, 4 bits with levels at the quantiles of a normal distribution; `"fp4"`, 4-bit floats; `"int8"`,
            LLM.int8(), 8 bits with outlier columns multiplied in 16 bits.
        double_quant: whether the scales of 4-bit blocks are quantized too, which saves 0.37 bits a weight.
        compute_dtype: the dtype 4-bit weights are expanded to for the product; None takes the model's.
        targets: shell patterns of layers to quantize; None takes the linear layers of the repeated blocks.
        skip: patterns of layers to leave in float; they win over `targets`.

    Source:
        Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314; Dettmers et al. 2022 (LLM.int8()),
        https://arxiv.org/abs/2208.07339.

    Example:
        >>> from llmcompress.compressor import Context
        >>> from llmcompress.testing import tiny_model
        >>> model = BitsAndBytesQuantization().compress(tiny_model("llama"), Context())
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'Linear4bit'
    """

    kind: Literal["nf4", "fp4", "int8"] = Field("nf4", description="the format of the weights")
    double_quant: bool = Field(False, description="whether the scales of 4-bit blocks are quantized too")
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype that 4-bit weights are expanded to; None takes the model's"
    )
    targets: tuple[str, ...] | None = Field(None, description="patterns of layers to quantize; None takes the blocks'")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave in float")

    @model_validator(mode="after")
    def _only_4_bits(self) -> BitsAndBytesQuantization:
        for name in ("double_quant", "compute_dtype"):
            if self.kind == "int8" and getattr(self, name):
                raise ConfigError(
                    f"BitsAndBytesQuantization.{name} must be left out with kind='int8', which has no blocks and "
                    f"multiplies in int8, got {getattr(self, name)!r}."
                )
        return self

    @property
    def terminal(self) -> bool:
        """Coded weights cannot be pruned or trained further."""
        return True

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each layer that is quantized, and why each other one is left; say how this device will multiply."""
        chosen, left = self._choose(model)
        does = f"bitsandbytes {self.kind}"
        actions = [Action(path=layer.name, does=does) for layer in chosen] + left
        dtype = getattr(torch, self._compute_dtype(model))
        # Of a model without weights the work says where it will be.
        device = torch.device(context.device) if model.device.type == "meta" else model.device
        fast, how = product_path(self.kind, device, dtype)
        actions.append(Action(path="", reason=f"{'fast path' if fast else 'no fast path'}: {how}"))
        return actions

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Return a new model with the layers quantized, built from the weights of `model`.

        Raises:
            PluginError: bitsandbytes is not installed.
            UnsupportedModelError: the model is already quantized.
            NothingToCompressError: no layer is chosen.
            CompressionError: a weight is NaN or infinite.
        """
        chosen, _ = self._choose(model)
        refuse_nonfinite(chosen)
        names = {layer.path for layer in chosen}
        result = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=model.state_dict(),
            quantization_config=self._config(model, names),
            dtype=model.dtype,
            device_map={"": model.device},
        )
        _refuse_difference(result, names)
        # With gradients on, the CPU kernel of bitsandbytes (0.50.2) fails as soon as any weight before it wants one.
        result.requires_grad_(False)
        if result.can_generate():
            result.generation_config = copy.deepcopy(model.generation_config)
        result.config.name_or_path = model.config.name_or_path
        keep_exact(result)
        return result.train(model.training)

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Put empty layers of bitsandbytes in place."""
        chosen, _ = self._choose(model)
        config = self._config(model, {layer.path for layer in chosen})
        for layer in chosen:
            empty = empty_layer(layer.module, self.kind, block=_BLOCK, double_quant=self.double_quant)
            replace_modules(model, {layer.module: empty})
        model.config.quantization_config = config
        model.quantization_method, model.is_quantized = config.quant_method, True
        # The real one is read from tensors that have their names in memory, and is saved by those.
        model._weight_conversions = []
        offsets = "the mean of a layer's scales is stored in words, of which the length is not known before"
        # The new model is built beside the float one.
        built = sum(tensor.nbytes for tensor in saved_tensors(model).values())
        return Outline(model, offsets if self.double_quant else None, scratch=built)

    def _config(self, model: PreTrainedModel, names: set[str]) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig
        from transformers.pytorch_utils import Conv1D

        # Said module by module: what transformers would leave of its own accord differs from version to version.
        linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        return BitsAndBytesConfig(
            load_in_4bit=self.kind != "int8",
            load_in_8bit=self.kind == "int8",
            llm_int8_skip_modules=[path for path in linear if path not in names],
            bnb_4bit_quant_type=self.kind if self.kind != "int8" else "fp4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self._compute_dtype(model),
        )

    def _compute_dtype(self, model: PreTrainedModel) -> str:
        return self.compute_dtype or str(model.dtype).removeprefix("torch.")

    def _choose(self, model: PreTrainedModel) -> tuple[list[WeightLayer], list[Action]]:
        who = type(self).__name__
        if find_spec("bitsandbytes") is None:
            raise PluginError(f"{who} needs the package bitsandbytes; run: pip install 'llmcompress[bnb]'.")
        refuse_quantized(model, who)
        refuse_sizes(model, who)
        chosen, left = select(model, who=who, targets=self.targets, skip=self.skip, kinds=("linear", "conv1d"))
        tied = {id(layer.weight) for layer in weight_layers(model) if layer.tied_to is not None}
        kept, refused = [], []
        for layer in chosen:
            reason = "tied to another layer" if id(layer.weight) in tied else self._why_float(model, layer)
            if reason is None:
                kept.append(layer)
            else:
                refused.append(Action(path=layer.name, reason=reason))
        if not kept:
            why = "; ".join(f"{action.path}: {action.reason}" for action in refused[:4])
            raise NothingToCompressError(f"{who} can quantize no layer of {type(model).__name__}. {why}")
        experts = [layer for layer in weight_layers(model) if layer.kind == "experts"]
        names = {layer.name for layer in experts}
        left = [
            Action(path=action.path, reason=_EXPERTS)
            if action.path in names and "skip=" not in (action.reason or "")
            else action
            for action in left
        ]
        if experts:
            share = sum(layer.weight.numel() for layer in experts) / model.num_parameters()
            left.append(Action(path="", reason=f"{share:.0%} of the weights are {_EXPERTS}"))
        return kept, [*refused, *left]

    def _why_float(self, model: PreTrainedModel, layer: WeightLayer) -> str | None:
        """Say why a layer that was asked for cannot be quantized, or None."""
        from transformers.quantizers.quantizers_utils import should_convert_module

        if not should_convert_module(layer.path, list(model._keep_in_fp32_modules or ())):
            return "transformers keeps it in float32"
        inputs = layer.weight.shape[layer.input_axis]
        outputs = layer.weight.shape[1 - layer.input_axis]
        if self.kind != "int8" and inputs % _BLOCK:
            return f"its {inputs} inputs are no multiple of bitsandbytes' block of {_BLOCK}"
        if self.kind != "int8" and outputs % _OUTPUTS:
            return f"its {outputs} outputs are no multiple of {_OUTPUTS}, as the CPU kernels of bitsandbytes need"
        return None


def _refuse_difference(result: PreTrainedModel, names: set[str]) -> None:
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {path for path, module in result.named_modules() if isinstance(module, kinds)}
    if found != names:
        odd = sorted(found ^ names)
        raise VerificationError(f"transformers did not quantize the layers it was told to; first difference: {odd[0]}.")


def keep_exact(model: nn.Module) -> None:
    """Keep the scales of the 4-bit layers as they are now, and put them back whenever the state dict is taken.

    Call it before the first forward pass. On a CPU with AVX-512 BF16, bitsandbytes (0.50.2) repacks a layer at its
    first pass and rounds its scales to bfloat16; when the state dict is taken it packs back, but leaves the scales
    rounded and transposed. What is saved then, and the model in memory itself, would be broken from there on.
    """
    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            layer._exact_quant_state = copy.deepcopy(state)
            layer.register_state_dict_post_hook(_restore_exact)


def _restore_exact(layer: Any, state_dict: dict[str, torch.Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    if not hasattr(layer.weight.quant_state, "packing_format_for_cpu"):
        return
    layer.weight.quant_state = layer.quant_state = copy.deepcopy(layer._exact_quant_state)
    for name, tensor in layer._exact_quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}weight.{name}"] = tensor
