"""What `GPTQ` and `AWQ` share: they look at the inputs of the layers, block after block or all at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field

from ..anatomy.layers import Kind, WeightLayer
from ..anatomy.turns import in_turns
from ..calibration import InputProducts, Statistic, block_by_block, observe
from ..calibration.effort import calibration_effort
from ..compressor import Action, Context, Need, Outline
from .fitting import quantize
from .grid import Coded
from .grouped import GroupedQuantization
from .remarks import joined
from .targets import Target
from .upright import upright

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Heard:
    """What is known of the inputs of some layers of a block.

    Attributes:
        statistics: by layer name, as in `Turn`.
        unseen: names of layers whose inputs cannot be told.
        last: whether no other layer of the block is still to come.
    """

    statistics: dict[str, list[Statistic]]
    unseen: tuple[str, ...] = ()
    last: bool = True


class CalibratedGrouping(GroupedQuantization):
    """Base of the strategies that choose codes by statistics of a layer's inputs on calibration texts."""

    _kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv1d", "experts")
    _rounded: ClassVar[str]
    """How a layer is rounded of whose inputs nothing is known, in words."""

    samples: int = Field(128, ge=1, description="texts of the data to calibrate on at most")
    max_length: int = Field(512, ge=1, description="tokens of a text to take at most")
    inputs: Literal["quantized", "dense"] = Field("quantized", description="calibrate on what quantized blocks put out")

    @property
    def needs(self) -> frozenset[Need]:
        """Texts to calibrate on, and what makes tokens of them."""
        return frozenset({"data", "tokenizer"})

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each layer that is packed, with its bits a weight, and why each other one is left."""
        targets, left = self._choose(model)
        tables = {id(target.layer.weight) for target in self._tables(targets)}
        actions = []
        for target, does in zip(targets, self._does(targets), strict=True):
            plainly = f"{self._rounded}: the inputs of a table are tokens"
            reason = joined(target.remark, plainly if id(target.layer.weight) in tables else None)
            actions.append(Action(path=target.layer.name, does=does, reason=reason))
        return actions + left + self._remarks(model, targets)

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Put empty packed layers in place, and count what the calibration takes."""
        layers = self._heard(self._choose(model)[0])
        effort = calibration_effort(
            model, context, layers, who=type(self).__name__, samples=self.samples, max_length=self.max_length,
            products=True,
        )  # fmt: skip
        solving = sum(self._solving_flops(layer) for layer in layers)
        plain = super().outline(model, context)
        scratch = plain.scratch + effort.scratch + max(map(self._solving_bytes, layers), default=0)
        return replace(plain, scratch=scratch, flops=effort.flops + solving)

    def _solving_bytes(self, layer: WeightLayer) -> int:
        """Return what the inputs' products of a layer take while they are worked with, beside the sums themselves."""
        return 0

    def _solving_flops(self, layer: WeightLayer) -> float:
        """Return the arithmetic that a layer takes once its inputs are known: an inverse, and updates by it."""
        inputs = layer.weight.shape[layer.input_axis]
        return 4.0 * inputs**3 + 8.0 * layer.weight.numel() * inputs

    @property
    def _fine_unasked(self) -> bool:
        return True

    @staticmethod
    def _heard(targets: Sequence[Target]) -> list[WeightLayer]:
        """Return the layers whose inputs are looked at: all but tables, and of those that share a weight the first."""
        layers = [target.layer for target in targets if target.layer.kind != "embedding"]
        return list({id(layer.weight): layer for layer in reversed(layers)}.values())[::-1]

    def _tables(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets whose weight no layer shares whose inputs are looked at."""
        heard = {id(layer.weight) for layer in self._heard(targets)}
        return [target for target in targets if id(target.layer.weight) not in heard]

    def _rounded_parts(
        self,
        target: Target,
        statistics: Sequence[Statistic],
        rounded: Callable[[torch.Tensor, Statistic], tuple[Coded, Sequence[str]]],
        context: Context,
        *,
        unseen: bool,
    ) -> Coded:
        """Round a layer, or one expert after the other; plainly where nothing is known of the inputs, which is told.

        Args:
            target: the layer.
            statistics: one, or one for each expert, all `InputProducts`.
            rounded: codes a matrix (outputs, inputs), and returns remarks.
            context: is told the remarks.
            unseen: whether the inputs of the layer cannot be told.
        """
        unknown = "its inputs cannot be seen" if unseen else "no calibration token reached it"
        remarks: dict[str, list[int]] = defaultdict(list)
        parts = []
        for number, (matrix, statistic) in enumerate(
            zip(upright(target.layer).chunk(len(statistics)), statistics, strict=True)
        ):
            if statistic.count and cast(InputProducts, statistic).products.any():
                coded, found = rounded(matrix, statistic)
            else:
                why = "its inputs were zero on every calibration token" if statistic.count else unknown
                coded, found = quantize(matrix, target.grid), [f"{self._rounded}: {why}"]
            parts.append(coded)
            for remark in found:
                remarks[remark].append(number)
        for remark, numbers in remarks.items():
            where = f"experts {', '.join(map(str, numbers))}: " if len(statistics) > 1 else ""
            context.tell(Action(path=target.layer.name, does=str(target), reason=f"{where}{remark}"))
        zeros = [part.zero for part in parts if part.zero is not None]
        return Coded(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
        )

    def _turns(
        self,
        model: PreTrainedModel,
        batches: Sequence[dict[str, torch.Tensor]],
        layers: Sequence[WeightLayer],
        statistic: Callable[[WeightLayer], Statistic],
        *,
        sequential: bool = False,
        progress: bool,
    ) -> Iterator[Heard]:
        """Yield what is known of the inputs of `layers`, as `inputs` says; the layers are replaced in their turn."""
        who = type(self).__name__
        if not layers:
            return
        if self.inputs == "dense":
            seen = observe(model, batches, layers, statistic, who=who, progress=progress)
            for _, own in in_turns(model, layers):
                yield Heard({layer.name: seen.pop(layer.name) for layer in own})
            return
        turns = block_by_block(model, batches, layers, statistic, who=who, sequential=sequential, progress=progress)
        for turn in turns:
            yield Heard(turn.statistics, turn.unseen, turn.last)
