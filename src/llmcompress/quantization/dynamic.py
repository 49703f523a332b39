"""Dynamic int8 quantization: weights stored in 8 bits, activations coded in 8 bits as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from ..anatomy.layers import Kind, WeightLayer, refuse_nonfinite
from ..calibration import calibration_batches
from ..compressor import Action, Compressor, Context, Need, Outline, Rounding
from ..errors import ConfigError
from ..registry import register
from .affine import round_rows
from .choice import CODING_SWEEPS, choose, coding_bytes, replace_in_turns
from .expert_modules import Int8Experts
from .hf import mark_quantized
from .kernels import rounded_activations
from .modules import Int8Embedding, Int8Linear, QuantizedModule
from .remarks import int8_remarks
from .row_wise import row_wise
from .smoothing import smooth

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("dynamic_quantization")
class DynamicQuantization(Compressor):
    """Store linear layers and embeddings in int8 and multiply in int8, wherever they stand in the model.

    Weights get one symmetric scale an output channel (a row, in an embedding). Activations are coded in 8 bits at each
    call, from the values that call brings, so no data is needed unless they are smoothed. Output heads, classifiers and
    poolers are included; a head that is tied to its embedding stays tied, and both share one int8 weight. A quarter of
    the float32 bytes remain, and products run on the int8 units of the CPU. The folder loads by plain
    `from_pretrained`.

    3-D experts keep the model's own routing and gates; each expert's products are computed in int8.

    Left in float, and told: layers whose weight the model's code reads itself instead of calling them (some of
    Mamba's), classes with a forward of their own, very narrow tables and experts.

    Args:
        bits: bits a weight; 8.
        embeddings: whether embeddings become int8 too. If not, a head tied to one stays in float with it.
        activations: what shares one scale. `"token"`, each row of a layer's input, is more accurate, and a row's result
            depends neither on the batch nor on its padding. `"tensor"`, the whole input, costs a little less where the
            native kernels are missing.
        smooth: SmoothQuant's alpha in [0, 1]: how much of what makes activations hard to code is first folded into the
            weights, wherever what comes before a layer can be divided; needs data and a tokenizer. None does not.
        samples: how many texts of the data to smooth by at most.
        max_length: how many tokens of a text to take at most.
        targets: shell patterns of layers to quantize (`"*.q_proj"`); None takes all.
        skip: patterns of layers to leave in float; they win over `targets`.

    Source:
        Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Wu et al. 2020, https://arxiv.org/abs/2004.09602; Xiao et
        al. 2023 (SmoothQuant), https://arxiv.org/abs/2211.10438.

    Example:
        >>> from llmcompress.compressor import Context
        >>> from llmcompress.testing import tiny_model
        >>> model = DynamicQuantization().compress(tiny_model("bert"), Context())
        >>> model.classifier.weight.dtype
        torch.int8
    """

    bits: Literal[8] = Field(8, description="bits a weight")
    embeddings: bool = Field(True, description="whether embeddings become int8 too")
    activations: Literal["tensor", "token"] = Field("token", description="what shares one scale of activations")
    smooth: float | None = Field(None, ge=0, le=1, description="SmoothQuant's alpha, or None")
    samples: int = Field(128, ge=1, description="texts of the data to smooth by at most")
    max_length: int = Field(512, ge=1, description="tokens of a text to take at most")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layers to quantize; None takes all")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave in float")

    @property
    def needs(self) -> frozenset[Need]:
        """Texts and a tokenizer where activations are smoothed, otherwise nothing."""
        return frozenset() if self.smooth is None else frozenset({"data", "tokenizer"})

    @property
    def terminal(self) -> bool:
        """int8 weights cannot be pruned or trained further."""
        return True

    @property
    def in_turns(self) -> bool:
        """Layer by layer; smoothing asks the whole model first."""
        return self.smooth is None

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each layer that becomes int8, and why each other one is left."""
        chosen, left = self._choose(model)
        return [
            *(self._action(layer) for layer in chosen),
            *left,
            *int8_remarks(model, context, chosen, smoothed=self.smooth is not None),
        ]

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Replace the layers by int8 ones.

        Raises:
            UnsupportedModelError: the model is already quantized.
            NothingToCompressError: no layer is chosen.
            CompressionError: a weight is NaN or infinite; nothing is changed then.
            MissingInputError: activations are to be smoothed, and there are no data or tokenizer, or texts too short.
        """
        who = type(self).__name__
        chosen, _ = self._choose(model)
        refuse_nonfinite(chosen)
        if self.smooth is not None:
            batches = calibration_batches(model, context, who=who, samples=self.samples, max_length=self.max_length)
            for action in smooth(model, batches, chosen, self.smooth, who=who, progress=context.progress):
                context.tell(action)
        replace_in_turns(model, chosen, self._quantize, self._quantize_experts)
        mark_quantized(model)
        return model

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Put empty int8 layers in place."""
        chosen, _ = self._choose(model)
        weights = [layer.weight.numel() for layer in chosen]
        replace_in_turns(model, chosen, self._empty, self._empty_experts)
        mark_quantized(model)
        return Outline(model, scratch=coding_bytes(weights), swept=CODING_SWEEPS * sum(weights))

    def roundings(self, model: PreTrainedModel, context: Context | None = None) -> list[Rounding]:
        """Return how weights and activations will be rounded, for `KnowledgeDistillation(quantize_for=...)`.

        Activations inside of 3-D experts are left out: those are coded all the same.

        Raises:
            ConfigError: activations are to be smoothed, which changes weights after the training.
        """
        if self.smooth is not None:
            raise ConfigError(
                f"{type(self).__name__}.smooth must be None where a model is trained for the step, got {self.smooth}: "
                f"smoothing would change the weights after the training."
            )
        chosen, _ = self._choose(model)
        inputs = partial(rounded_activations, activations=self.activations)
        return [
            Rounding(
                layer.path,
                layer.parameter,
                layer.input_axis,
                partial(row_wise, round_rows, layer.input_axis),
                inputs if layer.kind in ("linear", "conv1d") else None,
            )
            for layer in chosen
        ]

    def _quantize(self, layer: WeightLayer) -> QuantizedModule:
        if isinstance(layer.module, nn.Embedding):
            return Int8Embedding.from_float(layer.module)
        return Int8Linear.from_float(layer.module, self.activations)

    def _quantize_experts(self, module: nn.Module, parameters: Sequence[str], transposed: bool) -> Int8Experts:
        return Int8Experts.from_float(module, parameters, transposed=transposed, activations=self.activations)

    def _empty(self, layer: WeightLayer) -> QuantizedModule:
        if isinstance(layer.module, nn.Embedding):
            return Int8Embedding.from_spec(layer.module, {})
        return Int8Linear.from_spec(layer.module, {"activations": self.activations})

    def _empty_experts(self, module: nn.Module, parameters: Sequence[str], transposed: bool) -> Int8Experts:
        spec = {"parameters": parameters, "transposed": transposed, "activations": self.activations}
        return Int8Experts.from_spec(module, spec)

    def _action(self, layer: WeightLayer) -> Action:
        does = "int8 per row" if layer.kind == "embedding" else f"int8 per channel, activations per {self.activations}"
        return Action(path=layer.name, does=does, reason=f"shared with {layer.tied_to}" if layer.tied_to else None)

    def _choose(self, model: PreTrainedModel) -> tuple[list[WeightLayer], list[Action]]:
        kinds: tuple[Kind, ...] = ("linear", "conv1d", "experts", *(("embedding",) if self.embeddings else ()))
        return choose(model, who=type(self).__name__, targets=self.targets, skip=self.skip, kinds=kinds)
