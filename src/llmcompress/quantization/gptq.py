"""GPTQ: weights are rounded one after the other, and those behind make up for each error (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field

from ..calibration import InputProducts, Statistic, calibration_batches
from ..calibration.hessian import damped_root, remark_on
from ..compressor import Context
from ..registry import register
from .calibrated_grouping import CalibratedGrouping
from .fitting import Fit, fit, quantize
from .gptq_rounding import lay_again, round_again, round_with_feedback
from .grid import Coded, Grid, decode
from .grouped import finish
from .targets import PRUNED, Target, by_weight, share_of_zeros
from .upright import as_stored, upright

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy.layers import WeightLayer

# For each pair of a layer's inputs, at most: their product twice more in float32, and in float64 as it is factored.
_CURVATURE_BYTES = 24


@register("gptq")
class GPTQ(CalibratedGrouping):
    """Store weights in 2 to 8 bits, rounded so that the errors of a row make up for one another on real inputs.

    Goes block by block, each on what the quantized ones before it put out: sums of x x^T tell how much each weight's
    error matters, and by how much the others can undo it. Columns are rounded one after the other as in the paper. Then
    the scales are fitted once more to the codes that were chosen, and each code to the scales, which the paper has not.
    The folder is the one `WeightOnlyQuantization` writes, whatever the order of rounding: the groups are those of the
    stored columns.

    Rounded to nearest instead, and told: embeddings that are named, and layers and experts that no calibration
    token reached. Zeros of a pruned layer (more than one weight in a hundred) stay exactly zero, and only the others
    make up for errors. Left in float, and told: embeddings and heads unless `targets`, or `overrides` without
    `targets`, name them; layers whose weight the model's code reads itself.

    Args:
        samples: how many texts of the data to calibrate on at most.
        max_length: how many tokens of a text to take at most.
        inputs: `"quantized"` calibrates each block on what the quantized blocks before it put out; `"dense"` on the
            float model's, in one pass, with the sums of all layers in memory.
        true_sequential: whether the later layers of a block, too, see what its quantized ones put out: the layer behind
            the attention those of q, k and v, and so on; for `inputs="quantized"` only. Takes more passes, and made no
            difference on small trained models.
        dampening: share of the mean diagonal that is added to the diagonal of x x^T. Grows tenfold, and says so, as
            often as the matrix has no Cholesky factor.
        act_order: whether the columns with the largest inputs are rounded first.
        block_size: columns after which the rest of a matrix is updated at once: changes the time, not the result.
        fit: how a group's grid is laid at first: `"min_max"` just covers its weights; `"mse"` clips the range to the
            least squared error, inputs weighted by their squares; `"hqq"` is robust to outliers.
        fine_zeros: zero points of 8 bits, with parts of a step: nearer below 5 bits, for `8 - bits` bits more a group.
            None takes them wherever there are zero points; layers with zeros of a pruning keep whole ones.
        refinements: how often scales are fitted to the codes, and codes chosen again, behind the rounding; 0 is GPTQ as
            in the paper. On small trained models two took away a tenth of the divergence from the float model at 4
            bits, and a sixth at 3.
        bits: bits a weight, 2 to 8; a scale a group (16 bits) and a zero point come on top. `"auto"` chooses for each
            layer those that do the least damage within `target_bits`, as plain rounding has it.
        target_bits: with `bits="auto"`, the most stored bits a weight, scales and zero points included, averaged over
            the layers that `overrides` do not name.
        auto_bits: with `bits="auto"`, what may be chosen.
        group_size: how many consecutive inputs share a scale, a multiple of 8; None is one scale a row.
        symmetric: whether to do without zero points.
        indivisible: where `group_size` does not divide the inputs of a layer: `"error"`; `"pad"`, a shorter last group;
            or `"smaller_group"`, the largest common divisor.
        scale_dtype: of the stored scales; `"bfloat16"` for weights beyond the range of float16.
        overrides: other bits for the layers whose names match a shell pattern (`{"*.down_proj": 8, "lm_head": None}`).
            The first match decides; None leaves the layer in float. Without `targets`, every embedding and head that a
            pattern matches is packed as well.
        compute: `"int8"`, `"float"`, or `"auto"`; see `WeightOnlyQuantization`.
        targets: shell patterns of layers to quantize, embeddings and heads too; None takes the linear layers of the
            repeated blocks.
        skip: patterns of layers to leave in float; they win over all others.

    Raises:
        ConfigError: a field is out of range, or the group size divides the inputs of a layer not.
        MissingInputError: no data or tokenizer, or texts too short.
        UnsupportedModelError: the model is quantized already, reads no token ids, or has no weights.
        CompressionError: a weight, an input of a layer or a scale is NaN or infinite; the message names the layer.

    Source:
        Frantar et al. 2022, arXiv 2210.17323.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("llama")
        >>> step = lc.GPTQ(bits=4, group_size=32)
        >>> result = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        >>> result.model.model.layers[0].mlp.up_proj
        PackedLinear(64, 128, bias=False, bits=4, group_size=32, affine, compute='auto')
    """

    _rounded: ClassVar[str] = "rounded to nearest"

    true_sequential: bool = Field(False, description="calibrate within a block, too, on what quantized layers put out")
    dampening: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the diagonal of x x^T")
    act_order: bool = Field(True, description="round the columns with the largest inputs first")
    block_size: int = Field(128, ge=1, description="columns after which the rest of a matrix is updated at once")
    fit: Fit = Field("mse", description="how the grid of a group is laid at first")
    refinements: int = Field(2, ge=0, le=100, description="how often scales and codes are fitted to each other again")

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Round block after block, and replace the layers by packed ones."""
        if self.bits == "auto":
            return self.resolved(model, context).compress(model, context)
        who = type(self).__name__
        targets, _ = self._choose(model)
        self._refuse_unstorable(targets)
        batches = calibration_batches(model, context, who=who, samples=self.samples, max_length=self.max_length)
        sharing = by_weight(targets)
        layers = self._heard(targets)
        known = {target.layer.name: target for target in targets}
        done: list[tuple[Target, Coded]] = []
        sequential = self.true_sequential
        turns = self._turns(model, batches, layers, InputProducts.of, sequential=sequential, progress=context.progress)
        for heard in turns:
            curvatures = _Curvatures(self.dampening, self.act_order)
            for name, statistics in heard.statistics.items():
                target = known[name]
                rounded = partial(self._round, curvatures, target.grid)
                coded = self._rounded_parts(target, statistics, rounded, context, unseen=name in heard.unseen)
                done += [(other, coded) for other in sharing.pop(id(target.layer.weight))]
                if not heard.last:
                    # The layers behind it are calibrated on what it will put out.
                    target.layer.weight.detach().copy_(as_stored(target.layer, decode(coded, target.grid)))
            del curvatures  # as large as a block, and not needed while the next one is in memory
            if heard.last:
                self._replace(model, done)
                done = []
        tables = []
        for together in sharing.values():
            coded = quantize(upright(together[0].layer), together[0].grid)
            tables += [(target, coded) for target in together]
        self._replace(model, tables)
        finish(model)
        return model

    @property
    def _auto_fit(self) -> Fit:
        return self.fit

    def _solving_bytes(self, layer: WeightLayer) -> int:
        return _CURVATURE_BYTES * layer.weight.shape[layer.input_axis] ** 2

    @torch.no_grad()
    def _round(
        self, curvatures: _Curvatures, grid: Grid, weight: torch.Tensor, inputs: Statistic
    ) -> tuple[Coded, list[str]]:
        """Round `weight` (rows, columns); return the codes, and remarks for the report."""
        curvature = curvatures.of(cast(InputProducts, inputs).products)
        remarks = []
        pruned = share_of_zeros(weight)
        zeros = weight == 0 if pruned > PRUNED else None
        if zeros is not None:
            remarks.append(f"its zeros stay, {pruned:.4g} of its weights")
        grown = remark_on(self.dampening, curvature.dampening)
        remarks += [grown] if grown else []
        hessian, order = curvature.hessian, curvature.order
        laid = fit(weight, grid, self.fit, hessian.diagonal() if self.fit == "mse" else None)
        coded = round_with_feedback(
            weight, curvature.root, laid, grid, order=order, zeros=zeros, block_size=self.block_size
        )
        product = weight @ hessian if self.refinements else None
        for _ in range(self.refinements):
            coded = lay_again(weight, hessian, coded, grid, product=product)
            coded = round_again(weight, hessian, coded, grid, order=order, zeros=zeros, block_size=self.block_size)
        return coded, remarks


@dataclass(frozen=True)
class _Curvature:
    """What the inputs of a layer say of its errors.

    Attributes:
        products: sums of x x^T.
        order: the columns in the order in which they are rounded.
        root: see `damped_root`, in that order.
        dampening: what it took.
        hessian: the products, dampened, near 1 so that nothing overflows, in the order of the columns.
    """

    products: torch.Tensor
    order: torch.Tensor
    root: torch.Tensor
    dampening: float
    hessian: torch.Tensor


class _Curvatures:
    """The curvatures of the layers of a block: for those with the same inputs (q, k and v) one is computed."""

    def __init__(self, dampening: float, act_order: bool) -> None:
        self._dampening, self._act_order = dampening, act_order
        self._latest: _Curvature | None = None

    @torch.no_grad()
    def of(self, products: torch.Tensor) -> _Curvature:
        """Return the curvature of a layer whose inputs have these sums of x x^T."""
        known = self._latest
        if known is not None and torch.equal(known.products, products):
            return known
        order = torch.arange(len(products), device=products.device)
        if self._act_order:
            order = products.diagonal().argsort(descending=True, stable=True)
        root, share = damped_root(products[order][:, order], self._dampening, who=GPTQ.__name__)
        hessian = products / float(products.diagonal().mean())
        hessian.diagonal().add_(share)
        self._latest = _Curvature(products, order, root, share, hessian)
        return self._latest
