"""What the strategies share that store weights on grids of groups: their fields, the choice of layers, the exchange."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from ..anatomy.layers import Kind, WeightLayer, by_weight, refusal, refuse_nonfinite, select, weight_layers
from ..anatomy.reads import read_directly
from ..anatomy.turns import let_go
from ..compressor import Action, Compressor, Context, Need, Outline
from ..errors import CompressionError, ConfigError, NothingToCompressError
from . import kernels
from .auto_bits import at_target, free_targets, refuse_target, with_bits
from .checks import refuse_quantized
from .choice import all_or_none, replace_experts, replace_layers
from .fitting import Fit
from .grid import Coded, Grid, laid
from .hf import mark_quantized
from .modules import QuantizedModule
from .packed_experts import PackedExperts
from .packed_modules import Compute, PackedEmbedding, PackedLinear
from .remarks import joined
from .targets import PRUNED, Target, blank, share_of_zeros, why_float

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel
    from typing_extensions import Self

# Groups begin on whole bytes at any number of bits.
_MULTIPLE = 8
# A scale of fewer of the smallest steps of its dtype is off by a percent and more.
_LEAST_STEPS = 64
# Bits of a fine zero point.
_FINE = 8
# Bytes that each weight of a layer takes while it is coded, and how often each is read or written.
_CODING_BYTES = 24
_FIT_SWEEPS: dict[Fit, int] = {"min_max": 8, "mse": 80, "hqq": 100}


class GroupedQuantization(Compressor):
    """Base of the strategies that store weights as codes on grids of groups."""

    _kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv1d")
    """Kinds of layers that are packed unasked."""

    bits: int | Literal["auto"] = Field(
        4, description="bits a weight, 2 to 8, scales not included; 'auto' chooses for each layer"
    )
    target_bits: float | None = Field(
        None, description="for bits='auto': the most stored bits a weight on average, scales included"
    )
    auto_bits: tuple[int, ...] = Field((2, 3, 4, 5, 6, 8), description="for bits='auto': what may be chosen")
    group_size: int | None = Field(64, description="consecutive inputs that share a scale; None: a whole row")
    symmetric: bool = Field(False, description="no zero points: the middle code is zero")
    fine_zeros: bool | None = Field(None, description="zero points of 8 bits, with parts of a step; None: as is best")
    indivisible: Literal["error", "pad", "smaller_group"] = Field(
        "error", description="what to do where group_size does not divide the inputs of a layer"
    )
    scale_dtype: Literal["float16", "bfloat16"] = Field("float16", description="dtype of the stored scales")
    overrides: dict[str, int | None] = Field({}, description="bits by pattern of layer names; None leaves them alone")
    compute: Compute = Field("auto", description="how products are computed: 'int8', 'float', or the fastest")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layers to quantize; None takes the blocks'")
    skip: tuple[str, ...] = Field((), description="patterns of layers to leave in float")

    @field_validator("bits", mode="before")
    @classmethod
    def _known(cls, bits: Any) -> Any:
        if bits != "auto" and (type(bits) is not int or not 2 <= bits <= 8):
            raise ConfigError(f"{cls.__name__}.bits must be in [2, 8], got {bits!r}; or 'auto'.")
        return bits

    @field_validator("auto_bits", mode="after")
    @classmethod
    def _some(cls, auto_bits: tuple[int, ...]) -> tuple[int, ...]:
        if not auto_bits or not all(2 <= bits <= 8 for bits in auto_bits):
            raise ConfigError(f"{cls.__name__}.auto_bits must be some of 2 to 8, got {auto_bits}.")
        return tuple(sorted(set(auto_bits)))

    @model_validator(mode="after")
    def _zeros_are_there(self) -> Self:
        if self.fine_zeros and self.symmetric:
            raise ConfigError(
                f"{type(self).__name__}.fine_zeros must be False with symmetric=True: such a grid has no zero points."
            )
        return self

    @model_validator(mode="after")
    def _target_with_auto(self) -> Self:
        who = type(self).__name__
        if self.bits == "auto" and self.target_bits is None:
            raise ConfigError(
                f"{who}.target_bits must be given with bits='auto', got None; 4.5 stored bits a weight, for instance."
            )
        if self.bits != "auto" and self.target_bits is not None:
            raise ConfigError(f"{who}.target_bits must be None with bits={self.bits}, got {self.target_bits}.")
        if self.target_bits is not None and self.target_bits <= min(self.auto_bits):
            raise ConfigError(
                f"{who}.target_bits must be above the fewest bits of auto_bits={self.auto_bits}, scales come on top, "
                f"got {self.target_bits:g}."
            )
        return self

    @field_validator("group_size", mode="after")
    @classmethod
    def _whole_bytes(cls, group_size: int | None) -> int | None:
        if group_size is not None and (group_size < _MULTIPLE or group_size % _MULTIPLE):
            raise ConfigError(
                f"{cls.__name__}.group_size must be a multiple of {_MULTIPLE}, or None for a whole row, got "
                f"{group_size}."
            )
        return group_size

    @field_validator("overrides", mode="before")
    @classmethod
    def _possible(cls, overrides: Any) -> Any:
        for name, bits in overrides.items() if isinstance(overrides, dict) else ():
            if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
                raise ConfigError(
                    f"{cls.__name__}.overrides[{name!r}] must be in [2, 8], or None to leave the layers in float, got "
                    f"{bits!r}."
                )
        return overrides

    @property
    def needs(self) -> frozenset[Need]:
        """Texts to choose bits by, and what makes tokens of them, for `bits="auto"`."""
        return frozenset({"data", "tokenizer"}) if self.bits == "auto" else frozenset()

    @property
    def terminal(self) -> bool:
        """Packed weights cannot be pruned or trained further."""
        return True

    @property
    def in_turns(self) -> bool:
        """Block after block, unless the bits are still to be chosen, which takes passes through the whole model."""
        return self.bits != "auto"

    def resolved(self, model: PreTrainedModel, context: Context) -> Self:
        """Return this step with the bits that `bits="auto"` chooses for each layer, as `overrides`; or itself.

        What it returns gives the same layers the same bits without any data. Layers that `overrides` name keep those
        bits, and do not count in the average.

        Args:
            model: the float model; the same afterwards.
            context: its data and tokenizer are used; it is told the bits of each layer.

        Raises:
            ConfigError: `target_bits` is below what the fewest bits take.
            MissingInputError: no data or tokenizer, or texts too short.
        """
        return with_bits(self, model, context) if self.bits == "auto" else self

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Put empty packed layers in place."""
        targets, _ = self._choose(model)
        if self.bits == "auto":
            targets = at_target(self, targets)
        weights = [target.layer.weight.numel() for target in targets]
        self._replace(model, [(target, blank(target)) for target in targets])
        finish(model)
        scratch = _CODING_BYTES * max(weights)
        chosen = "bits='auto' chooses by the weights; as many bits as target_bits allows are counted"
        estimated = chosen if self.bits == "auto" else None
        return Outline(model, estimated, scratch=scratch, swept=_FIT_SWEEPS[self._auto_fit] * sum(weights))

    @property
    def _auto_fit(self) -> Fit:
        """How grids are laid where damages are measured."""
        return "min_max"

    def _remarks(self, model: PreTrainedModel, targets: Sequence[Target]) -> list[Action]:
        """Say for the plan what the products take in memory beside the packed weights."""
        layers = {id(target.layer.weight): target.layer for target in targets if target.layer.kind != "embedding"}
        if not kernels.takes_packed_copy(model.device, self.compute):
            return []
        megabytes = sum(layer.weight.numel() for layer in layers.values()) / 1e6
        reason = (
            f"products run in int8 on this CPU, from a copy of about {megabytes:.3g} MB that is made when a layer is "
            f"first used and never saved, since the native kernels are not there; compute='float' does without, slowly"
        )
        return [Action(path="", reason=reason)]

    def _does(self, targets: Sequence[Target]) -> list[str]:
        """Say for the plan what becomes of each layer."""
        if self.bits != "auto":
            return list(map(str, targets))
        widths = (", ".join(map(str, self.auto_bits[:-1])) + f" or {self.auto_bits[-1]}").removeprefix(" or ")
        chosen = f"int{widths}, chosen for {self.target_bits:g} stored bits a weight on average"
        free = set(map(id, free_targets(self, targets)))
        return [chosen if id(target) in free else str(target) for target in targets]

    def _grid_for(self, layer: WeightLayer, bits: int) -> Grid:
        """Return the grid of a layer with so many bits."""
        return self._fitted(layer, bits, None).grid

    @property
    def _fine_unasked(self) -> bool:
        """Whether zero points are fine where `fine_zeros` does not say so."""
        return False

    def _grid(self, bits: int) -> Grid:
        """Return the grid of a layer with so many bits, before its group size is fitted to the layer."""
        fine = self._fine_unasked if self.fine_zeros is None else self.fine_zeros
        zero_bits = _FINE if fine and not self.symmetric and bits < _FINE else None
        return Grid(bits, self.group_size, self.symmetric, None, getattr(torch, self.scale_dtype), zero_bits)

    def _choose(self, model: PreTrainedModel) -> tuple[list[Target], list[Action]]:
        """Return the layers that become packed, tied ones included, and those that do not, with the reasons.

        Raises:
            UnsupportedModelError: the model is quantized already.
            NothingToCompressError: nothing is chosen, or a pattern matches no layer.
            ConfigError: the group size divides the inputs of no layer or not of all.
        """
        who = type(self).__name__
        refuse_quantized(model, who)
        layers = weight_layers(model)
        kinds: tuple[Kind, ...] = (*self._kinds, "embedding")
        given = {layer.name: self._override(layer) for layer in layers}
        chosen, left = select(
            model, who=who, targets=self.targets, skip=self.skip, kinds=self._kinds if self.targets is None else kinds
        )
        asked = {layer.name for layer in chosen}
        if self.targets is None:
            asked |= {name for name, (_, bits) in given.items() if bits is not None}
        direct = read_directly(model)
        refused: dict[str, str] = {}
        for layer in layers:
            pattern, bits = given[layer.name]
            unwanted = f"overrides[{pattern!r}] = None" if pattern is not None and bits is None else None
            reason = refusal(layer, self.skip, kinds) or unwanted or direct.get(layer.name) or why_float(layer)
            if reason is not None:
                refused[layer.name] = reason
        reasons = {action.path: action.reason for action in left}
        self._refuse_idle(model, layers, asked, reasons)
        kept, stay = all_or_none(model, layers, who=who, asked=asked, refused=refused, left=reasons)
        partners = by_weight(kept)
        targets = []
        for layer in kept:
            shared = f"shared with {layer.tied_to}" if layer.tied_to else None
            targets.append(self._fitted(layer, self._bits_of(partners[id(layer.weight)]), shared))
        if self.bits == "auto":
            refuse_target(self, free_targets(self, targets))
        return targets, stay

    def _override(self, layer: WeightLayer) -> tuple[str | None, int | None]:
        """Return the pattern of `overrides` that decides for a layer, and what it says; or None and None."""
        return next((item for item in self.overrides.items() if fnmatchcase(layer.name, item[0])), (None, None))

    def _bits_of(self, together: Sequence[WeightLayer]) -> int:
        """Return the bits of layers that share a weight."""
        said = {bits: layer for layer in reversed(together) if (bits := self._override(layer)[1]) is not None}
        if len(said) > 1:
            (one, first), (other, second) = list(said.items())[:2]
            raise ConfigError(
                f"{type(self).__name__}.overrides must give {second.name} and {first.name} the same bits, since they "
                f"share one weight, got {other} and {one}."
            )
        # The most that "auto" may choose: which layers are packed does not depend on it.
        usual = max(self.auto_bits) if self.bits == "auto" else self.bits
        return next(iter(said), usual)

    def _refuse_idle(
        self,
        model: PreTrainedModel,
        layers: Sequence[WeightLayer],
        asked: Container[str],
        left: Mapping[str, str | None],
    ) -> None:
        """Raise where a pattern of `overrides` decides for no layer."""
        who = type(self).__name__
        near = {id(layer.weight) for layer in layers if layer.name in asked}
        for pattern, bits in self.overrides.items():
            matching = [layer for layer in layers if fnmatchcase(layer.name, pattern)]
            if not matching:
                raise NothingToCompressError(
                    f"no layer of {type(model).__name__} matches {who}.overrides[{pattern!r}]; it has: "
                    f"{', '.join(layer.name for layer in layers[:8])}{', ...' if len(layers) > 8 else ''}."
                )
            deciding = {layer.name: self._override(layer)[0] for layer in matching}
            if pattern not in deciding.values():
                first = next(iter(deciding.values()))
                raise ConfigError(
                    f"{who}.overrides[{pattern!r}] decides for no layer: each that it matches is matched by a pattern "
                    f"before it, {matching[0].name} by {first!r}; put the narrower pattern first."
                )
            if bits is not None and not any(id(layer.weight) in near for layer in matching):
                raise ConfigError(
                    f"{who}.overrides[{pattern!r}] gives {bits} bits to no layer: {matching[0].name} stays in float, "
                    f"{left.get(matching[0].name) or 'not asked for'}; let targets name it too."
                )

    def _fitted(self, layer: WeightLayer, bits: int, remark: str | None) -> Target:
        """Fit the grid to a layer: its group size as `indivisible` says, its zero points to the zeros of a pruning."""
        grid = self._grid(bits)
        # A zero point between two levels would make every zero of a pruned layer a small number.
        if grid.zero_parts > 1 and share_of_zeros(layer.weight) > PRUNED:
            grid = replace(grid, zero_bits=None)
            remark = joined(remark, "whole zero points, since it has weights that are zero")
        columns = layer.weight.shape[layer.input_axis]
        size = grid.group_size
        if size is None or columns % size == 0:
            return Target(layer, grid, remark)
        if self.indivisible == "pad":
            note = f"its last group has {columns % size} of {size} inputs"
            return Target(layer, grid, joined(remark, note))
        who = type(self).__name__
        if self.indivisible == "smaller_group":
            smaller = gcd(columns, size)
            if smaller % _MULTIPLE == 0:
                note = f"{size} does not divide its {columns} inputs"
                small = replace(grid, group_size=smaller)
                return Target(layer, small, joined(remark, note))
            raise ConfigError(
                f"{who}.group_size must share a factor of {_MULTIPLE} with the inputs of every layer, and {layer.name} "
                f"has {columns}; leave it out with skip=({layer.name!r},), or take indivisible='pad'."
            )
        raise ConfigError(
            f"{who}.group_size={size} must divide the inputs of every layer, and {layer.name} has {columns}; take "
            f"indivisible='pad' or 'smaller_group', another group_size, or skip=({layer.name!r},)."
        )

    def _refuse_unstorable(self, targets: Sequence[Target]) -> None:
        """Raise `CompressionError` naming the first layer with NaN, infinity, or weights that no stored scale fits."""
        for target in targets:
            low, high = torch.aminmax(target.layer.weight.detach())
            let_go(target.layer.weight)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                refuse_nonfinite([target.layer])
            lowest, highest = low.float().clamp_max(0.0).view(1, 1), high.float().clamp_min(0.0).view(1, 1)
            scale = laid(lowest, highest, replace(target.grid, scale_dtype=torch.float32))[0].abs()
            if not torch.isfinite(scale.to(target.grid.scale_dtype)):
                self._refuse_scale(target)
            kind = torch.finfo(target.grid.scale_dtype)
            if (lowest < 0 or highest > 0) and scale < _LEAST_STEPS * kind.smallest_normal * kind.eps:
                raise CompressionError(
                    f"{type(self).__name__}: the weights of {target.layer.name}, at most {max(-low, high):.2g}, are "
                    f"too small for scales in {self.scale_dtype}: take scale_dtype='bfloat16', or leave it out with "
                    f"skip=({target.layer.name!r},)."
                )

    def _refuse_scale(self, target: Target) -> None:
        raise CompressionError(
            f"{type(self).__name__}: the scales of {target.layer.name} hold NaN or infinity in {self.scale_dtype}; its "
            f"weights are too large for it: take scale_dtype='bfloat16', or leave it out with "
            f"skip=({target.layer.name!r},)."
        )

    def _replace(self, model: PreTrainedModel, coded: Sequence[tuple[Target, Coded]]) -> None:
        """Put packed layers in the place of those that were coded; all that share a weight must come together.

        Raises:
            CompressionError: a scale is NaN or infinite; none of these layers is changed then.
        """
        for target, codes in coded:
            if not codes.scale.is_meta and not torch.isfinite(codes.scale).all():
                self._refuse_scale(target)
        found = {(target.layer.module, target.layer.parameter): (codes, target.grid) for target, codes in coded}

        def packed(layer: WeightLayer) -> QuantizedModule:
            codes, grid = found[layer.module, layer.parameter]
            if isinstance(layer.module, nn.Embedding):
                return PackedEmbedding.from_coded(layer.module, codes, grid)
            return PackedLinear.from_coded(layer.module, codes, grid, self.compute)

        def packed_experts(module: nn.Module, parameters: Sequence[str], transposed: bool) -> QuantizedModule:
            weights = {name: found[module, name] for name in parameters}
            return PackedExperts.from_coded(module, weights, transposed=transposed, compute=self.compute)

        layers = [target.layer for target, _ in coded]
        replace_layers(model, [layer for layer in layers if layer.kind != "experts"], packed)
        replace_experts(model, [layer for layer in layers if layer.kind == "experts"], packed_experts)


def finish(model: PreTrainedModel) -> None:
    """Mark a model whose layers were replaced, and drop what running it on the way made: reports measure it fresh."""
    for module in model.modules():
        if isinstance(module, (PackedLinear, PackedExperts)):
            module.drop_derived()
    mark_quantized(model)
