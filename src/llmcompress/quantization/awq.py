"""AWQ: what a model computes most with is rounded most finely; no retraining, a few texts (arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from pydantic import Field, model_validator

from ..anatomy.scaling import ScaleSite, fold, scale_sites
from ..anatomy.stacks import find_stacks
from ..calibration import Statistic, calibration_batches
from ..compressor import Action, Context
from ..errors import ConfigError
from ..registry import register
from .calibrated_grouping import CalibratedGrouping
from .clipping import clipped
from .fitting import quantize
from .grid import Coded, Grid, encode
from .grouped import finish
from .remarks import FOLDED, joined
from .scale_search import InputMoments, Reader, ScaleChoice, search_scales, searching_bytes
from .targets import Target, by_weight
from .upright import upright

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy.layers import WeightLayer


@register("awq")
class AWQ(CalibratedGrouping):
    """Store weights in 2 to 8 bits, with scales and clipped ranges chosen by what texts make the layers compute.

    Channels with large inputs get larger weights, which are rounded more finely, and what makes these inputs is divided
    by the same: the norm before, the values, the up projection. Then the range of each group is clipped to where the
    layer's outputs are off the least. Both are searched on sums of x x^T, exactly and without running the layers again.
    The folder is the one `WeightOnlyQuantization` writes.

    A layer is scaled where something before it can be divided that nothing else reads, which is found by trying; the
    others are clipped only, and the report says which: those in the middle of 3-D experts, for instance. Experts that
    no calibration token reached are rounded plainly, and told. Embeddings and heads stay in float by default;
    embeddings that are named are rounded plainly. Zeros of a pruned model stay zeros.

    Args:
        samples: how many texts of the data to calibrate on at most.
        max_length: how many tokens of a text to take at most.
        inputs: `"quantized"` calibrates each block on what the quantized blocks before it put out; `"dense"` on the
            float model's, in one pass.
        scales: whether to search scales.
        n_grid: into how many steps the search divides the exponent of the scales, from 0 to 1.
        clip: whether to search ranges; else they cover their groups.
        fine_zeros: zero points of 8 bits, with parts of a step: nearer below 5 bits, for `8 - bits` bits more a group.
            None takes them wherever there are zero points; layers with zeros of a pruning keep whole ones.
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
        Lin et al. 2023, arXiv 2306.00978. Different here: errors are those of the layers themselves, with all groups of
        a row together, and the two ends of a range are searched apart.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("llama")
        >>> step = lc.AWQ(bits=4, group_size=32)
        >>> result = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        >>> result.model.model.layers[0].mlp.up_proj
        PackedLinear(64, 128, bias=False, bits=4, group_size=32, affine, compute='auto')
    """

    _rounded: ClassVar[str] = "rounded plainly"

    scales: bool = Field(True, description="search scales of the input channels, and fold them")
    n_grid: int = Field(20, ge=1, le=1000, description="steps of the exponent of the scales")
    clip: bool = Field(True, description="search the range of each group")

    @model_validator(mode="after")
    def _agree(self) -> AWQ:
        who = type(self).__name__
        if not (self.scales or self.clip):
            raise ConfigError(
                f"{who}.clip must be True with scales=False, or nothing is searched; use "
                f"WeightOnlyQuantization, which needs no data."
            )
        return self

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Scale, clip and round block after block, and replace the layers by packed ones."""
        if self.bits == "auto":
            return self.resolved(model, context).compress(model, context)
        who = type(self).__name__
        targets, _ = self._choose(model)
        self._refuse_unstorable(targets)
        batches = calibration_batches(model, context, who=who, samples=self.samples, max_length=self.max_length)
        sites = self._sites(model, targets)
        self._tell_sites(targets, sites, context)
        known = {target.layer.name: target for target in targets}
        layers = self._heard(targets)
        sharing = by_weight(targets)
        for turn in self._turns(model, batches, layers, InputMoments.of, progress=context.progress):
            for site in sites:
                readers = [reader for name in site.consumers for reader in _readers(known.get(name), turn.statistics)]
                if readers:
                    self._scale(model, site, readers, turn.statistics, context)
            done: list[tuple[Target, Coded]] = []
            for name, statistics in turn.statistics.items():
                target = known[name]
                rounded = partial(self._round, target.grid)
                coded = self._rounded_parts(target, statistics, rounded, context, unseen=name in turn.unseen)
                done += [(other, coded) for other in sharing.pop(id(target.layer.weight))]
            self._replace(model, done)
        tables = []
        for together in sharing.values():
            coded = quantize(upright(together[0].layer), together[0].grid)
            tables += [(target, coded) for target in together]
        self._replace(model, tables)
        finish(model)
        return model

    def _remarks(self, model: PreTrainedModel, targets: Sequence[Target]) -> list[Action]:
        return [*([FOLDED] if self.scales else []), *super()._remarks(model, targets)]

    def _tell_sites(self, targets: Sequence[Target], sites: Sequence[ScaleSite], context: Context) -> None:
        """Say of each layer whether it is scaled, and with what."""
        scaled = {name: site for site in sites for name in site.consumers}
        tables = self._tables(targets)
        for target in targets if self.scales else ():
            name = target.layer.name
            if target in tables:
                continue
            how = f"scaled with {scaled[name].source}" if name in scaled else self._unscaled
            context.tell(Action(path=name, does=str(target), reason=joined(target.remark, how)), instead=True)

    @property
    def _unscaled(self) -> str:
        how = "clipped" if self.clip else self._rounded
        return f"{how}, not scaled: nothing before it can be divided that only it reads"

    def _sites(self, model: PreTrainedModel, targets: Sequence[Target]) -> list[ScaleSite]:
        """Return the places where scales of the targets' inputs can be folded, each within one block."""
        if not self.scales:
            return []
        names = {target.layer.name for target in targets}
        blocks = [stack.block_path(index) for stack in find_stacks(model) for index in range(len(stack))]

        def is_within(site: ScaleSite) -> bool:
            # What a block before this one puts out is final when the turn comes to this one.
            paths = (site.source, *site.consumers)
            return any(all(path.startswith(f"{block}.") for path in paths) for block in blocks)

        return [site for site in scale_sites(model) if not names.isdisjoint(site.consumers) and is_within(site)]

    def _solving_bytes(self, layer: WeightLayer) -> int:
        # Experts are searched one after the other.
        return searching_bytes(layer.weight.shape[-2:].numel())

    def _scale(
        self,
        model: PreTrainedModel,
        site: ScaleSite,
        readers: Sequence[Reader],
        statistics: Mapping[str, Sequence[Statistic]],
        context: Context,
    ) -> None:
        """Search the scales of a site and fold them; the readers' sums become those of the divided inputs."""
        choice = search_scales(site, readers, self.n_grid)
        if choice.after >= choice.before:
            names = ", ".join(name for name in site.consumers if name in statistics)
            reason = f"not divided: no scale lowers the rounding error of {names}"
            context.tell(Action(path=site.source, reason=reason))
            return
        fold(model, site, choice.scales)
        for reader in readers:
            reader.inputs.divide(choice.scales[site.columns.to(choice.scales.device)])
        context.tell(Action(path=site.source, does=_told(choice), reason=f"folded into {', '.join(site.consumers)}"))

    @torch.no_grad()
    def _round(self, grid: Grid, weight: torch.Tensor, inputs: Statistic) -> tuple[Coded, Sequence[str]]:
        """Choose the ranges of a matrix (outputs, inputs), and put its weights on the grid."""
        moments = cast(InputMoments, inputs)
        if not self.clip:
            return quantize(weight, grid), ()
        scale, zero = clipped(weight, grid, moments.products / moments.count)
        return Coded(encode(weight, scale, zero, grid), scale, zero), ()


def _readers(target: Target | None, statistics: Mapping[str, Sequence[Statistic]]) -> list[Reader]:
    """Return the matrices of a layer whose inputs are known: one, or one for each expert that tokens reached."""
    seen = statistics.get(target.layer.name, ()) if target is not None else ()
    if target is None or not any(one.count for one in seen):
        return []
    matrices = upright(target.layer).chunk(len(seen))
    pairs = zip(matrices, (cast(InputMoments, one) for one in seen), strict=True)
    return [Reader(matrix, target.grid, one) for matrix, one in pairs if one.count]


def _told(choice: ScaleChoice) -> str:
    low, high = float(choice.scales.amin()), float(choice.scales.amax())
    form = f"mean|x|^{choice.alpha:.3g}" + (f" / mean|w|^{1 - choice.alpha:.3g}" if choice.by_weights else "")
    gain = choice.after / choice.before
    return f"output divided by {low:.3g} to {high:.3g} ({form}); readers' rounding error x {gain:.2f}"
