"""What a search may choose among: widths, vocabularies, and forms of the weights; and the steps that make them."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ..anatomy.depth import keep_blocks, plan_depth
from ..anatomy.empty import weightless
from ..anatomy.layers import WeightLayer, weight_layers
from ..anatomy.stacks import Stack, token_stacks
from ..compressor import Compressor, Context
from ..distillation.heads import head_of
from ..errors import CompressionError, ConfigError, NothingToCompressError, UnsupportedModelError
from ..pruning.structured import StructuredPruning
from ..pruning.vocabulary import VocabularyPruning
from ..quantization.dynamic import DynamicQuantization
from ..quantization.weight_only import WeightOnlyQuantization
from .blocks import alike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scheme = Literal["float", "int8", "packed"]

SCHEMES: tuple[Scheme, ...] = ("float", "int8", "packed")
"""Which quantization a chain ends with; only packed ones give each block bits of its own."""

# Weights that share a scale where they are packed, and what divides so many that do in narrower layers.
_GROUP, _MULTIPLE = 64, 8

# Shares of the feed-forward channels and of the heads that go; in a short budget the last ones are not surveyed.
_SHAPES: tuple[tuple[float | None, float | None], ...] = (
    (0.5, None), (0.5, 0.5), (0.75, None), (0.25, None), (None, 0.5),
)  # fmt: skip
# Shares of the tokens seen in the data that stay; None keeps all of them.
_SEEN = (None, 0.6, 0.4)
# Smaller tables, and smaller matrices outside of the blocks, are not worth packing.
_SMALLEST = 4096


@dataclass(frozen=True)
class Form:
    """How weights are stored: which scheme, and how many bits in it."""

    scheme: Scheme
    bits: int

    @property
    def number(self) -> int:
        """Of the scheme."""
        return SCHEMES.index(self.scheme)

    def __str__(self) -> str:
        return f"{self.scheme} weights of {self.bits} bits"

    def of_blocks(self, paths: Sequence[str], unpacked: Sequence[str] = ()) -> Compressor | None:
        """Return the step that stores these blocks so; None where they stay as they are."""
        patterns = tuple(f"{glob.escape(path)}.*" for path in paths)
        if self.scheme == "int8":
            return DynamicQuantization(targets=patterns)
        return None if self.scheme == "float" else _packed(self.bits, targets=patterns, skip=unpacked)

    def of_rest(self, blocks: Sequence[str], rest: Sequence[str]) -> Compressor | None:
        """Return the step that stores all but the blocks so; None where nothing changes."""
        if self.scheme == "int8":
            return DynamicQuantization(skip=tuple(f"{glob.escape(path)}.*" for path in blocks))
        return None if self.scheme == "float" or not rest else _packed(self.bits, targets=exactly(rest))

    def of_all(self, rest: Sequence[str], unpacked: Sequence[str] = ()) -> Compressor | None:
        """Return the step that stores all of a model so."""
        return quantization(self.scheme, self.bits, dict.fromkeys(exactly(rest), self.bits), unpacked)


FORMS = (Form("float", 32), Form("int8", 8), Form("packed", 8), Form("packed", 4))


@dataclass(frozen=True)
class Shape:
    """Widths that all blocks of a chain have.

    Attributes:
        ffn: share of the feed-forward channels that goes, or None.
        heads: share of the attention heads that goes, or None.
        uniform: whether a plain config can tell them.
    """

    ffn: float | None = None
    heads: float | None = None
    uniform: bool = True

    def step(self) -> StructuredPruning | None:
        """Return the step that cuts to these widths; None where nothing is cut."""
        if self.ffn is None and self.heads is None:
            return None
        return StructuredPruning(
            ffn=self.ffn, heads=self.heads, importance="wanda", uniform=self.uniform, samples=64, max_length=64
        )


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens stay: all, or those that the data hold, or a share of those."""

    cut: bool = False
    share: float | None = None

    def step(self) -> VocabularyPruning | None:
        """Return the step that cuts to it; None where nothing is cut."""
        return VocabularyPruning(alphabet="seen", keep=self.share) if self.cut else None


@dataclass(frozen=True)
class Space:
    """All that can be done to a model.

    Attributes:
        stacks: its blocks.
        shapes: widths; the first are the model's own.
        vocabularies: the first is the model's own.
        forms: of weights; the first is the model's own.
        rest: names of the layers outside of the blocks that are worth packing.
        notes: what cannot be done, and why.
        fixed: numbers of the blocks that must stay, whatever else goes.
        tapers: whether no stack may be deeper than the one before it.
        unpacked: patterns of the layers in blocks that stay float where the others are packed.
    """

    stacks: Sequence[Stack]
    shapes: Sequence[Shape]
    vocabularies: Sequence[Vocabulary]
    forms: Sequence[Form]
    rest: Sequence[str]
    notes: list[str] = field(default_factory=list)
    fixed: Sequence[int] = ()
    tapers: bool = False
    unpacked: Sequence[str] = ()

    @property
    def blocks(self) -> list[str]:
        """The path of each block, stack after stack."""
        return [stack.block_path(index) for stack in self.stacks for index in range(len(stack))]

    @property
    def stack_blocks(self) -> list[list[int]]:
        """The numbers of the blocks of each stack."""
        found, start = [], 0
        for stack in self.stacks:
            found.append(list(range(start, start + len(stack))))
            start += len(stack)
        return found


def find_space(model: PreTrainedModel, context: Context) -> Space:
    """Return what the strategies can do to `model`, by their own plans.

    Raises:
        UnsupportedModelError: the model has no repeated blocks.
    """
    stacks = token_stacks(model)
    if not stacks:
        raise UnsupportedModelError(f"fit needs a model with repeated blocks, and {type(model).__name__} has none.")
    notes: list[str] = []
    shapes = [Shape()]
    told: dict[str, bool | None] = {}
    for ffn, heads in _SHAPES:
        kinds = [kind for kind, share in (("ffn", ffn), ("heads", heads)) if share is not None]
        for kind in kinds:
            if kind not in told:
                told[kind] = _tells(model, context, Shape(ffn=0.5) if kind == "ffn" else Shape(heads=0.5), notes)
        asked = [told[kind] for kind in kinds]
        if None not in asked:
            shapes.append(Shape(ffn, heads, uniform=all(asked)))
    layers = weight_layers(model)
    rest = [
        layer.name
        for layer in layers
        if layer.place != "block" and layer.kind in ("linear", "conv1d", "embedding")
        and layer.weight.numel() >= _SMALLEST and _divides(layer)
    ]  # fmt: skip
    vocabularies = _vocabularies(model, context, notes)
    space = Space(stacks, shapes, vocabularies, [], rest, notes, unpacked=_unpacked(layers, stacks))
    forms = [form for form in FORMS if form.scheme == "float" or _works(model, context, form, space)]
    return replace(space, forms=forms, fixed=_fixed(model, space), tapers=_tapers(model, space))


def quantization(
    scheme: Scheme, bits: int, overrides: Mapping[str, int], unpacked: Sequence[str] = ()
) -> Compressor | None:
    """Return the last step of a chain; None where weights stay float.

    Args:
        scheme: which quantization.
        bits: of what no override names, where weights are packed.
        overrides: bits by patterns of layer names, where weights are packed.
        unpacked: patterns of layers that stay float there.
    """
    if scheme == "packed":
        return _packed(bits, overrides=overrides, skip=unpacked)
    return DynamicQuantization() if scheme == "int8" else None


def exactly(names: Sequence[str]) -> tuple[str, ...]:
    """Return patterns that match these names and nothing else."""
    return tuple(glob.escape(name) for name in names)


def _packed(
    bits: int,
    *,
    targets: tuple[str, ...] | None = None,
    overrides: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
) -> WeightOnlyQuantization:
    return WeightOnlyQuantization(
        bits=bits,
        group_size=_GROUP,
        indivisible="smaller_group",
        targets=targets,
        overrides=dict(overrides or {}),
        skip=tuple(skip),
    )


def _divides(layer: WeightLayer) -> bool:
    return layer.weight.shape[layer.input_axis] % _MULTIPLE == 0


def _unpacked(layers: Sequence[WeightLayer], stacks: Sequence[Stack]) -> list[str]:
    """Return patterns of the layers in blocks that no groups fit, and of small tables, whichever blocks are left.

    T5's table of relative positions is as wide as there are heads: 4, 6 or 12 are no whole groups.
    """
    found: dict[str, None] = {}
    for layer in layers:
        small = layer.kind == "embedding" and layer.weight.numel() < _SMALLEST
        stack = next((stack for stack in stacks if layer.name.startswith(f"{stack.path}.")), None)
        if stack is not None and layer.kind != "other" and (small or not _divides(layer)):
            _, _, inner = layer.name.removeprefix(f"{stack.path}.").partition(".")
            found[f"{glob.escape(stack.path)}.*.{glob.escape(inner)}"] = None
    return list(found)


def _fixed(model: PreTrainedModel, space: Space) -> list[int]:
    """Return the blocks that cannot go: of those that are like no other, such as T5's first one, some do more."""
    kinds = alike(model, space.blocks)
    found = []
    for stack, numbers in zip(space.stacks, space.stack_blocks, strict=True):
        for number in numbers:
            if len(stack) == 1 or kinds.count(kinds[number]) > 1:
                continue
            try:
                plan_depth(model, {stack.path: [other - numbers[0] for other in numbers if other != number]})
            except UnsupportedModelError as error:
                space.notes.append(f"{space.blocks[number]} stays: {error}")
                found.append(number)
    return found


def _tells(model: PreTrainedModel, context: Context, shape: Shape, notes: list[str]) -> bool | None:
    """Return whether a plain config can tell such widths, or None where they cannot be cut at all."""
    why = ""
    # Where the size of a head follows from their number no config tells it, and finding that out takes many tries.
    derived = shape.heads is not None and getattr(model.config.get_text_config(), "head_dim", None) is None
    for uniform in (False,) if derived else (True, False):
        step = replace(shape, uniform=uniform).step()
        assert step is not None
        try:
            if any(action.touched for action in step.plan(model, context)):
                return uniform
        except (UnsupportedModelError, NothingToCompressError, ConfigError) as error:
            why = str(error)
    notes.append(f"{'heads' if shape.heads else 'FFNs'} are not pruned: {why or 'no smaller size is legal'}")
    return None


def _vocabularies(model: PreTrainedModel, context: Context, notes: list[str]) -> list[Vocabulary]:
    whole = [Vocabulary()]
    if model.get_output_embeddings() is not None:
        notes.append("the vocabulary stays: a language model would choose among fewer tokens, which no score compares")
        return whole
    try:
        head_of(model)
        plan = VocabularyPruning(alphabet="seen").plan(model, context)
    except CompressionError as error:
        notes.append(f"the vocabulary stays: {error}")
        return whole
    if not any(action.touched for action in plan):
        notes.append("the vocabulary stays: the data hold all of it")
        return whole
    return [*whole, *(Vocabulary(True, share) for share in _SEEN)]


def _tapers(model: PreTrainedModel, space: Space) -> bool:
    """Tell whether a decoder may be no deeper than its encoder: of some, as T5, transformers mistakes their depths."""
    if not model.config.is_encoder_decoder or len(space.stacks) != 2:
        return False
    encoder, decoder = space.stacks
    shallower = range(min(len(encoder), len(decoder) - 1))
    if not shallower or len(shallower) == len(encoder):
        return False
    try:
        keep_blocks(weightless(model), {encoder.path: shallower})
    except UnsupportedModelError as error:
        space.notes.append(f"{encoder.path} stays as deep as {decoder.path}: {error}")
        return True
    return False


def _works(model: PreTrainedModel, context: Context, form: Form, space: Space) -> bool:
    # Patterns of blocks name the tables in them as well, which else stay float.
    whole, blocks = form.of_all(space.rest, space.unpacked), form.of_blocks(space.blocks, space.unpacked)
    assert whole is not None
    assert blocks is not None
    try:
        return all(any(action.touched for action in step.plan(model, context)) for step in (whole, blocks))
    except (UnsupportedModelError, NothingToCompressError, ConfigError) as error:
        space.notes.append(f"no {form}: {error}")
        return False
