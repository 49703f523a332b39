"""Static int8 quantization: activations coded with ranges that were calibrated on texts, and are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field
from torch import nn

from ..anatomy.layers import Kind, WeightLayer, refuse_nonfinite
from ..calibration import calibration_batches, observe
from ..calibration.effort import calibration_effort
from ..compressor import Action, Compressor, Context, Need, Outline, Rounding
from ..errors import ConfigError
from ..registry import register
from .affine import round_rows
from .choice import CODING_SWEEPS, choose, coding_bytes, replace_in_turns
from .expert_modules import Int8Experts
from .hf import mark_quantized
from .kernels import Stored, rounded_activations
from .modules import Int8Embedding, QuantizedModule
from .ranges import InputHistogram, choose_range, coding_of
from .remarks import int8_remarks
from .row_wise import row_wise
from .smoothing import smooth
from .static_modules import Int8StaticLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of each layer's inputs that its error is measured on; they are in memory for all layers at once.
_ROWS, _ROWS_A_BATCH = 128, 16


@register("static_quantization")
class StaticQuantization(Compressor):
    """Store linear layers and embeddings in int8 and multiply in int8, with the ranges of activations calibrated.

    Weights get one symmetric scale an output channel (a row, in an embedding), activations one range a layer, chosen
    from what calibration texts bring: no call has to look for its own, and no row depends on the rest of its batch.
    Inputs outside of their range become its nearest end, so the texts should be like those of the task. Output heads,
    classifiers and poolers are included; a head tied to its embedding stays tied. A quarter of the float32 bytes
    remain, and the folder loads by plain `from_pretrained`.

    3-D experts are coded as `DynamicQuantization(activations="token")` does it.

    Left in float, and told: layers whose int8 outputs are too far off (`outliers`), layers that no token reached,
    layers whose weight the model's code reads itself, embedding classes with a forward of their own, very narrow tables
    and experts.

    Args:
        bits: bits a weight and an activation; 8.
        ranges: how a layer's range is chosen: `"minmax"` covers all that was seen; `"percentile"` all but a share;
            `"mse"` has the least squared error; `"entropy"` keeps the distribution most like itself.
        percentile: per cent of the values that `"percentile"` covers, in (50, 100].
        symmetric: whether ranges are symmetric around 0. Affine ones give a layer behind a ReLU twice the steps.
        smooth: SmoothQuant's alpha in [0, 1]: how much of what makes activations hard to code is first folded into the
            weights, wherever what comes before a layer can be divided; 0.5 is usual, and None does not.
        outliers: a layer stays in float if the outputs of its int8 form are off by more than this, relative to the norm
            of its own, on the calibration texts; None keeps none.
        embeddings: whether embeddings become int8 too. If not, a head tied to one stays in float with it.
        targets: shell patterns of layers to quantize (`"*.q_proj"`); None takes all.
        skip: patterns of layers to leave in float; they win over `targets`.
        samples: how many texts of the data to calibrate on at most.
        max_length: how many tokens of a text to take at most.

    Source:
        Jacob et al. 2018, https://arxiv.org/abs/1712.05877; Wu et al. 2020, https://arxiv.org/abs/2004.09602; Xiao et
        al. 2023 (SmoothQuant), https://arxiv.org/abs/2211.10438.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("bert")
        >>> step = lc.StaticQuantization(ranges="percentile", percentile=99.9)
        >>> result = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        >>> result.model.classifier.input_scale.shape, result.model.classifier.weight.dtype
        (torch.Size([]), torch.int8)
    """

    bits: Literal[8] = Field(8, description="bits a weight and an activation")
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = Field("mse", description="how ranges are chosen")
    percentile: float = Field(99.99, gt=50, le=100, description="per cent of the values that 'percentile' covers")
    symmetric: bool = Field(False, description="whether ranges are symmetric around 0")
    smooth: float | None = Field(None, ge=0, le=1, description="SmoothQuant's alpha, or None")
    outliers: float | None = Field(0.2, gt=0, description="relative error above which a layer stays in float, or None")
    embeddings: bool = Field(True, description="whether embeddings become int8 too")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layers to quantize; None takes all")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave in float")
    samples: int = Field(128, ge=1, description="texts of the data to calibrate on at most")
    max_length: int = Field(512, ge=1, description="tokens of a text to take at most")

    @property
    def needs(self) -> frozenset[Need]:
        """Texts to calibrate on, and what makes tokens of them."""
        return frozenset({"data", "tokenizer"})

    @property
    def terminal(self) -> bool:
        """int8 weights cannot be pruned or trained further."""
        return True

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each layer that becomes int8, and why each other one is left; outliers are found in the work itself."""
        chosen, left = self._choose(model, {})
        return [
            *(self._action(layer) for layer in chosen),
            *left,
            *int8_remarks(model, context, chosen, smoothed=self.smooth is not None),
        ]

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Calibrate the ranges and replace the layers by int8 ones.

        Raises:
            UnsupportedModelError: the model is already quantized, or reads no token ids.
            NothingToCompressError: no layer is chosen, or all of them are outliers.
            MissingInputError: no data or tokenizer, or texts too short.
            CompressionError: a weight or an activation is NaN or infinite; the message names the layer.
        """
        who = type(self).__name__
        chosen, _ = self._choose(model, {})
        refuse_nonfinite(chosen)
        batches = calibration_batches(model, context, who=who, samples=self.samples, max_length=self.max_length)
        if self.smooth is not None:
            for action in smooth(model, batches, chosen, self.smooth, who=who, progress=context.progress):
                context.tell(action)
        coded, refused = self._calibrated(model, chosen, batches, context)
        if refused:
            planned = {layer.name for layer in chosen}
            chosen, left = self._choose(model, refused)
            # With a head that stays, the embedding that it is tied to stays.
            for action in left:
                if action.path in planned:
                    context.tell(action, instead=True)
        replace_in_turns(model, chosen, lambda layer: _replacement(layer, coded), _quantize_experts)
        mark_quantized(model)
        return model

    def roundings(self, model: PreTrainedModel, context: Context | None = None) -> list[Rounding]:
        """Return how weights and activations will be rounded, for `KnowledgeDistillation(quantize_for=...)`.

        The ranges of activations are calibrated on the data of `context` before the training, and hold during it; the
        step behind it calibrates them anew on what was trained. Layers that are outliers before the training are left.

        Raises:
            ConfigError: activations are to be smoothed, which changes weights after the training.
            MissingInputError: `context` has no data or tokenizer, or texts too short.
        """
        who = type(self).__name__
        if self.smooth is not None:
            raise ConfigError(
                f"{who}.smooth must be None where a model is trained for the step, got {self.smooth}: smoothing would "
                f"change the weights after the training."
            )
        chosen, _ = self._choose(model, {})
        coded: Mapping[str, Int8StaticLinear] = {}
        if context is not None:
            batches = calibration_batches(model, context, who=who, samples=self.samples, max_length=self.max_length)
            coded, refused = self._calibrated(model, chosen, batches, context)
            chosen, _ = self._choose(model, refused)

        def inputs(layer: WeightLayer) -> Callable[[torch.Tensor], torch.Tensor] | None:
            if layer.kind not in ("linear", "conv1d"):
                return None
            if context is None:
                return _uncalibrated
            known = coded[layer.name]
            stored = Stored.of(float(known.input_scale), int(known.input_zero_point))
            return partial(rounded_activations, activations=stored)

        return [
            Rounding(
                layer.path,
                layer.parameter,
                layer.input_axis,
                partial(row_wise, round_rows, layer.input_axis),
                inputs(layer),
            )
            for layer in chosen
        ]

    def _calibrated(
        self,
        model: PreTrainedModel,
        chosen: Sequence[WeightLayer],
        batches: Sequence[dict[str, torch.Tensor]],
        context: Context,
    ) -> tuple[dict[str, Int8StaticLinear], dict[str, str]]:
        """Return the int8 forms of the linear layers, and which of them stay in float for what calibration showed."""
        who = type(self).__name__
        linears = [layer for layer in chosen if layer.kind in ("linear", "conv1d")]
        rows = 0 if self.outliers is None else _ROWS
        seen = observe(model, batches, linears, lambda _: _Inputs(rows), who=who, progress=context.progress)
        coded: dict[str, Int8StaticLinear] = {}
        refused: dict[str, str] = {}
        for layer in linears:
            inputs = cast(_Inputs, seen.pop(layer.name)[0])
            if not inputs.count:
                refused[layer.name] = "no calibration token reached it"
                continue
            coded[layer.name] = self._coded(layer, inputs)
            if self.outliers is None:
                continue
            error = _relative_error(layer, coded[layer.name], inputs.rows())
            if error > self.outliers:
                refused[layer.name] = f"its int8 outputs are off by {error:.1%}, above outliers={self.outliers:g}"
        return coded, refused

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Put empty int8 layers in place, as if no layer were an outlier."""
        chosen, _ = self._choose(model, {})
        linears = [layer for layer in chosen if layer.kind in ("linear", "conv1d")]
        weights = [layer.weight.numel() for layer in chosen]
        effort = calibration_effort(
            model, context, linears, who=type(self).__name__, samples=self.samples, max_length=self.max_length,
            products=False,
        )  # fmt: skip
        rows = sum(_ROWS * layer.weight.shape[layer.input_axis] * 4 for layer in linears) if self.outliers else 0
        replace_in_turns(model, chosen, _empty, _empty_experts)
        mark_quantized(model)
        few = None if self.outliers is None else "layers whose int8 outputs are too far off stay in float"
        # The coded layers stand beside the float ones until all are there.
        scratch = effort.scratch + rows + sum(weights) + coding_bytes(weights)
        return Outline(model, few, scratch=scratch, flops=effort.flops, swept=CODING_SWEEPS * sum(weights))

    def _choose(self, model: PreTrainedModel, refused: dict[str, str]) -> tuple[list[WeightLayer], list[Action]]:
        kinds: tuple[Kind, ...] = ("linear", "conv1d", "experts", *(("embedding",) if self.embeddings else ()))
        who = type(self).__name__
        return choose(model, who=who, targets=self.targets, skip=self.skip, kinds=kinds, refused=refused)

    def _action(self, layer: WeightLayer) -> Action:
        form = "symmetric" if self.symmetric else "affine"
        does = f"int8 per channel, activations {form} by {self.ranges}"
        if layer.kind == "embedding":
            does = "int8 per row"
        elif layer.kind == "experts":
            does = "int8 per channel, activations per token"
        return Action(path=layer.name, does=does, reason=f"shared with {layer.tied_to}" if layer.tied_to else None)

    def _coded(self, layer: WeightLayer, inputs: _Inputs) -> Int8StaticLinear:
        ends = choose_range(inputs.histogram, self.ranges, symmetric=self.symmetric, percentile=self.percentile)
        return Int8StaticLinear.calibrated(layer.module, *coding_of(*ends, symmetric=self.symmetric))


class _Inputs:
    """What calibration keeps of a layer's inputs: the histogram of all values, and some rows as they are."""

    def __init__(self, rows: int) -> None:
        self.count = 0
        self.histogram = InputHistogram()
        self._kept: list[torch.Tensor] = []
        self._room = rows

    def update(self, inputs: torch.Tensor) -> None:
        """Count all values, and keep some rows, evenly spread over the batch."""
        self.count += len(inputs)
        self.histogram.update(inputs)
        wanted = min(_ROWS_A_BATCH, self._room, len(inputs))
        if wanted:
            picked = torch.arange(wanted, device=inputs.device) * len(inputs) // wanted
            self._kept.append(inputs[picked].clone())
            self._room -= wanted

    def rows(self) -> torch.Tensor:
        """Return the kept rows, shape (rows, features)."""
        return torch.cat(self._kept)


def _replacement(layer: WeightLayer, coded: Mapping[str, QuantizedModule]) -> QuantizedModule:
    if isinstance(layer.module, nn.Embedding):
        return Int8Embedding.from_float(layer.module)
    return coded[layer.name]


def _uncalibrated(inputs: torch.Tensor) -> torch.Tensor:
    """Stand for the rounding of inputs whose range a plan does not know."""
    return inputs


def _empty(layer: WeightLayer) -> QuantizedModule:
    return (Int8Embedding if layer.kind == "embedding" else Int8StaticLinear).from_spec(layer.module, {})


def _empty_experts(module: nn.Module, parameters: Sequence[str], transposed: bool) -> Int8Experts:
    return Int8Experts.from_spec(module, {"parameters": parameters, "transposed": transposed, "activations": "token"})


def _quantize_experts(module: nn.Module, parameters: Sequence[str], transposed: bool) -> Int8Experts:
    # Which tokens an expert gets, and how many, differs from batch to batch: a range for each token needs no texts.
    return Int8Experts.from_float(module, parameters, transposed=transposed, activations="token")


@torch.no_grad()
def _relative_error(layer: WeightLayer, coded: nn.Module, rows: torch.Tensor) -> float:
    """Return the norm of the error of the int8 form's outputs over the norm of the float layer's; 0 if that is 0."""
    expected = layer.module(rows).float()
    size = expected.norm()
    return float((coded(rows).float() - expected).norm() / size) if size > 0 else 0.0
