"""Dynamic int8 quantization: weights stored in 8 bits, activations coded in 8 bits as they come. Needs no data."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from ..anatomy.layers import Kind, WeightLayer, select, weight_layers
from ..anatomy.reads import read_directly
from ..compressor import Action, Compressor, Context
from ..errors import NothingToCompressError
from ..registry import register
from .checks import refuse_nonfinite, refuse_quantized
from .hf import mark_quantized
from .modules import Int8Embedding, Int8Linear, QuantizedModule, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Each row gets a scale of 4 bytes: below this width (relative position biases, one number a head) it does not pay.
_NARROWEST_TABLE = 16


@register("dynamic_quantization")
class DynamicQuantization(Compressor):
    """Store linear layers and embeddings in int8 and multiply in int8, wherever they stand in the model.

    Weights get one symmetric scale an output channel (a row, in an embedding). Activations are coded in 8 bits at each
    call, from the values that call brings, so no data is needed. Output heads, classifiers and poolers are included; a
    head that is tied to its embedding stays tied, and both share one int8 weight. A quarter of the float32 bytes
    remain, and products run on the int8 units of the CPU. The folder loads by plain `from_pretrained`.

    Left in float, and told: 3-D experts, layers whose weight the model's code reads itself instead of calling them
    (some of Mamba's), classes with a forward of their own, very narrow tables.

    Args:
        bits: bits a weight; 8.
        embeddings: whether embeddings become int8 too. If not, a head tied to one stays in float with it.
        activations: what shares one scale: `"tensor"`, the whole input of a layer, is the fastest; `"token"`, each row,
            costs some time, is more accurate, and keeps a row's result independent of the batch and its padding.
        targets: shell patterns of layers to quantize (`"*.q_proj"`); None takes all.
        skip: patterns of layers to leave in float; they win over `targets`.

    Source:
        Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Wu et al. 2020, https://arxiv.org/abs/2004.09602.

    Example:
        >>> from llmcompress.compressor import Context
        >>> from llmcompress.testing import tiny_model
        >>> model = DynamicQuantization().compress(tiny_model("bert"), Context())
        >>> model.classifier.weight.dtype
        torch.int8
    """

    bits: Literal[8] = Field(8, description="bits a weight")
    embeddings: bool = Field(True, description="whether embeddings become int8 too")
    activations: Literal["tensor", "token"] = Field("tensor", description="what shares one scale of activations")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layers to quantize; None takes all")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave in float")

    @property
    def terminal(self) -> bool:
        """int8 weights cannot be pruned or trained further."""
        return True

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each layer that becomes int8, and why each other one is left."""
        chosen, left = self._choose(model)
        return [*(self._action(layer) for layer in chosen), *left]

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Replace the layers by int8 ones.

        Raises:
            UnsupportedModelError: the model is already quantized.
            NothingToCompressError: no layer is chosen.
            CompressionError: a weight is NaN or infinite; nothing is changed then.
        """
        chosen, _ = self._choose(model)
        refuse_nonfinite(chosen)
        shared: dict[int, QuantizedModule] = {}
        for layer in chosen:
            key = id(layer.weight)
            replacement = self._quantize(layer.module)
            if key in shared:
                replacement.tie(shared[key])
            shared.setdefault(key, replacement)
            replace_modules(model, {layer.module: replacement})
        mark_quantized(model)
        return model

    def _quantize(self, module: nn.Module) -> QuantizedModule:
        if isinstance(module, nn.Embedding):
            return Int8Embedding.from_float(module)
        return Int8Linear.from_float(module, self.activations)

    def _action(self, layer: WeightLayer) -> Action:
        does = "int8 per row" if layer.kind == "embedding" else f"int8 per channel, activations per {self.activations}"
        return Action(path=layer.name, does=does, reason=f"shared with {layer.tied_to}" if layer.tied_to else None)

    def _choose(self, model: PreTrainedModel) -> tuple[list[WeightLayer], list[Action]]:
        refuse_quantized(model, type(self).__name__)
        kinds: tuple[Kind, ...] = ("linear", "conv1d", *(("embedding",) if self.embeddings else ()))
        chosen, left = select(
            model,
            who=type(self).__name__,
            # Named so, tied layers are chosen too; those whose partner must stay in float are taken out below.
            targets=("*",) if self.targets is None else self.targets,
            skip=self.skip,
            kinds=kinds,
            places=("block", "head", "outside"),
        )
        reasons = {action.path: action.reason for action in left}
        direct = read_directly(model)
        reasons.update({layer.name: direct.get(layer.name) or _why_float(layer.module) for layer in chosen})
        partners = defaultdict(list)
        for layer in weight_layers(model):
            partners[id(layer.weight)].append(layer.name)
        kept, refused = [], []
        for layer in chosen:
            reason = reasons[layer.name]
            bound = next((name for name in partners[id(layer.weight)] if reasons[name]), None)
            if reason is None and bound is not None:
                reason = f"shares its weight with {bound}, which stays in float: {reasons[bound]}"
            if reason is None:
                kept.append(layer)
            else:
                refused.append(Action(path=layer.name, reason=reason))
        if not kept:
            why = "; ".join(f"{action.path}: {action.reason}" for action in refused[:4])
            raise NothingToCompressError(
                f"{type(self).__name__} can quantize no layer of {type(model).__name__}. {why}"
            )
        return kept, [*refused, *left]


def _why_float(module: nn.Module) -> str | None:
    """Say why a layer that was asked for cannot be int8, or None."""
    if not isinstance(module, nn.Embedding):
        return None
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is an embedding with a forward of its own"
    if module.max_norm is not None:
        return "it renormalises its rows at each call (max_norm)"
    if module.embedding_dim < _NARROWEST_TABLE:
        return f"rows of {module.embedding_dim} numbers are too short for a scale each"
    return None
