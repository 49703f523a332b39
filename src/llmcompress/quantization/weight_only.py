"""Weight-only quantization to 2 to 8 bits, with no data: round to nearest on grids laid in several ways."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from ..anatomy.layers import Kind
from ..anatomy.turns import in_turns
from ..compressor import Action, Context, Rounding
from ..errors import ConfigError
from ..registry import register
from .fitting import Fit, quantize
from .grid import Grid, decode
from .grouped import GroupedQuantization, finish
from .row_wise import row_wise
from .targets import by_weight
from .upright import upright

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("weight_only_quantization")
class WeightOnlyQuantization(GroupedQuantization):
    """Store weights in 2 to 8 bits, in groups with a scale and a zero point each, rounded to the nearest level.

    Needs no data and takes seconds, but for `bits="auto"`, which looks at texts first. `GPTQ` and `AWQ` store the same
    layout and lose less, but always need texts. The folder loads by plain `from_pretrained` after `import
    llmcompress`; the bits that are told are the bits on disk, scales and zero points included.

    On a CPU, products are computed from the packed codes themselves, with activations in 8 bits, one scale a token;
    `compute="float"` leaves activations as they are, and is exact and slower. Without the native kernels
    (`llmcompress.kernels()` tells) it takes a copy of the weights in 8 bits, or unpacks them at every call.

    3-D experts keep the model's own routing and gates; each expert's products are computed from its codes.

    Left in float, and told: embeddings and heads unless `targets`, or `overrides` without `targets`, name them; layers
    whose weight the model's code reads itself; classes with a forward of their own. Layers that share a weight go one
    way: packed if one of them is asked for and none is left in float.

    Args:
        bits: bits a weight, 2 to 8; a scale a group (16 bits) and a zero point come on top. `"auto"` chooses for each
            layer, on texts: those that do the least damage within `target_bits`.
        target_bits: with `bits="auto"`, the most stored bits a weight, scales and zero points included, averaged over
            the layers that `overrides` do not name.
        auto_bits: with `bits="auto"`, what may be chosen.
        group_size: how many consecutive inputs share a scale, a multiple of 8; None is one scale a row.
        symmetric: whether to do without zero points.
        fit: how a group's grid is laid: `"min_max"` just covers its weights; `"mse"` clips the range to the least
            squared error; `"hqq"` is robust to outliers (half-quadratic; its zero points have 8 bits).
        codebook: `"nf4"` or `"fp4"`: 16 unequal levels instead of equal steps; then `bits` is 4, with no zero points.
        fine_zeros: zero points of 8 bits, with parts of a step: nearer below 5 bits, for `8 - bits` bits more a group.
            None takes them with `fit="hqq"`; layers with zeros of a pruning keep whole ones.
        indivisible: where `group_size` does not divide the inputs of a layer: `"error"`; `"pad"`, a shorter last group;
            or `"smaller_group"`, the largest common divisor.
        scale_dtype: of the stored scales; `"bfloat16"` for weights beyond the range of float16.
        overrides: other bits for the layers whose names match a shell pattern (`{"*.down_proj": 8, "lm_head": None}`).
            The first match decides; None leaves the layer in float. Without `targets`, every embedding and head that a
            pattern matches is packed as well.
        compute: `"int8"`, `"float"`, or `"auto"`, the fastest on the device where the model is.
        targets: shell patterns of layers to quantize, embeddings and heads too; None takes the linear layers of the
            repeated blocks.
        skip: patterns of layers to leave in float; they win over all others.

    Raises:
        ConfigError: a field is out of range, or the group size divides the inputs of a layer not.
        CompressionError: a weight or a scale is NaN or infinite; the message names the layer.

    Source:
        HQQ: Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/; NF4: Dettmers et al. 2023, arXiv 2305.14314.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> result = lc.compress(tiny_model("llama"), lc.WeightOnlyQuantization(bits=4, group_size=32), progress=False)
        >>> result.model.model.layers[0].mlp.up_proj
        PackedLinear(64, 128, bias=False, bits=4, group_size=32, affine, compute='auto')
    """

    _kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv1d", "experts")

    fit: Fit = Field("min_max", description="how the grid of a group is laid")
    codebook: Literal["nf4", "fp4"] | None = Field(None, description="unequal levels instead of equal steps")

    @model_validator(mode="after")
    def _agree(self) -> WeightOnlyQuantization:
        who = type(self).__name__
        if self.codebook is None:
            return self
        if self.fine_zeros:
            raise ConfigError(
                f"{who}.fine_zeros must be None or False with codebook={self.codebook!r}, whose levels have no zero "
                f"point, got True."
            )
        if any(bits not in (4, None) for bits in (self.bits, *self.overrides.values())):
            raise ConfigError(f"{who}.bits must be 4 with codebook={self.codebook!r}, in overrides too.")
        if self.fit != "min_max" or self.symmetric:
            raise ConfigError(
                f"{who}.fit must be 'min_max' and symmetric False with codebook={self.codebook!r}, whose levels are "
                f"made for the largest magnitude of a group."
            )
        return self

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each layer that is packed, with its bits a weight, and why each other one is left."""
        targets, left = self._choose(model)
        actions = [
            Action(path=target.layer.name, does=does, reason=target.remark)
            for target, does in zip(targets, self._does(targets), strict=True)
        ]
        return actions + left + self._remarks(model, targets)

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Replace the layers by packed ones."""
        if self.bits == "auto":
            return self.resolved(model, context).compress(model, context)
        targets, _ = self._choose(model)
        self._refuse_unstorable(targets)
        sharing = by_weight(targets)
        # Of those that share a weight the last, which is in no block: nothing outside of a turn is changed.
        for _, own in in_turns(model, [together[-1].layer for together in sharing.values()]):
            coded = []
            for layer in own:
                together = sharing[id(layer.weight)]
                codes = quantize(upright(layer), together[0].grid, self.fit)
                coded += [(target, codes) for target in together]
            self._replace(model, coded)
        finish(model)
        return model

    def roundings(self, model: PreTrainedModel, context: Context | None = None) -> list[Rounding]:
        """Return how each layer's weight will be rounded, for `KnowledgeDistillation(quantize_for=...)`.

        Raises:
            ConfigError: bits are not chosen yet.
        """
        if self.bits == "auto":
            raise ConfigError(
                f"{type(self).__name__}.bits must be chosen before it is trained for, got 'auto'; take "
                f"step.resolved(model, context), or sensitivity(...).allocate(...) as overrides."
            )
        targets, _ = self._choose(model)
        return [
            Rounding(
                target.layer.path,
                target.layer.parameter,
                target.layer.input_axis,
                partial(row_wise, partial(self._rounded, target.grid), target.layer.input_axis),
            )
            for target in targets
        ]

    def _rounded(self, grid: Grid, rows: torch.Tensor) -> torch.Tensor:
        return decode(quantize(rows, grid, self.fit), grid)

    @property
    def _auto_fit(self) -> Fit:
        return self.fit

    @property
    def _fine_unasked(self) -> bool:
        return self.fit == "hqq"

    def _grid(self, bits: int) -> Grid:
        grid = super()._grid(bits)
        return replace(grid, codebook=self.codebook, zero_bits=None if self.codebook else grid.zero_bits)
