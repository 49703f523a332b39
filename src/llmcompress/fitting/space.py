"""What a search may choose among: widths, vocabularies, and forms of the weights; and the steps that make them."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ..anatomy.layers import weight_layers
from ..anatomy.stacks import Stack, token_stacks
from ..compressor import Compressor, Context
from ..distillation.heads import head_of
from ..errors import CompressionError, ConfigError, NothingToCompressError, UnsupportedModelError
from ..pruning.structured import StructuredPruning
from ..pruning.vocabulary import VocabularyPruning
from ..quantization.dynamic import DynamicQuantization
from ..quantization.weight_only import WeightOnlyQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scheme = Literal["float", "int8", "packed"]

SCHEMES: tuple[Scheme, ...] = ("float", "int8", "packed")
"""Which quantization a chain ends with; only packed ones give each block bits of its own."""

# Weights that share a scale where they are packed.
_GROUP = 64

# Shares of the feed-forward channels and of the heads that go.
_SHAPES: tuple[tuple[float | None, float | None], ...] = (
    (0.25, None), (0.5, None), (0.75, None), (None, 0.5), (0.5, 0.5),
)  # fmt: skip
# Shares of the tokens seen in the data that stay; None keeps all of them.
_SEEN = (None, 0.6, 0.4)
# Smaller tables and matrices outside of the blocks are not worth packing.
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

    def of_blocks(self, paths: Sequence[str]) -> Compressor | None:
        """Return the step that stores these blocks so; None where they stay as they are."""
        patterns = tuple(f"{glob.escape(path)}.*" for path in paths)
        if self.scheme == "int8":
            return DynamicQuantization(targets=patterns)
        return None if self.scheme == "float" else _packed(self.bits, targets=patterns)

    def of_rest(self, blocks: Sequence[str], rest: Sequence[str]) -> Compressor | None:
        """Return the step that stores all but the blocks so; None where nothing changes."""
        if self.scheme == "int8":
            return DynamicQuantization(skip=tuple(f"{glob.escape(path)}.*" for path in blocks))
        return None if self.scheme == "float" or not rest else _packed(self.bits, targets=exactly(rest))

    def of_all(self, rest: Sequence[str]) -> Compressor | None:
        """Return the step that stores all of a model so."""
        return quantization(self.scheme, self.bits, dict.fromkeys(exactly(rest), self.bits))


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
    """

    stacks: Sequence[Stack]
    shapes: Sequence[Shape]
    vocabularies: Sequence[Vocabulary]
    forms: Sequence[Form]
    rest: Sequence[str]
    notes: list[str] = field(default_factory=list)

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
    rest = [
        layer.name
        for layer in weight_layers(model)
        if layer.place != "block" and layer.kind in ("linear", "conv1d", "embedding")
        and layer.weight.numel() >= _SMALLEST and layer.weight.shape[layer.input_axis] % 8 == 0
    ]  # fmt: skip
    space = Space(stacks, shapes, _vocabularies(model, context, notes), [], rest, notes)
    forms = [form for form in FORMS if form.scheme == "float" or _works(model, context, form, space)]
    return Space(stacks, shapes, space.vocabularies, forms, rest, notes)


def quantization(scheme: Scheme, bits: int, overrides: Mapping[str, int]) -> Compressor | None:
    """Return the last step of a chain; None where weights stay float.

    Args:
        scheme: which quantization.
        bits: of what no override names, where weights are packed.
        overrides: bits by patterns of layer names, where weights are packed.
    """
    if scheme == "packed":
        return _packed(bits, overrides=overrides)
    return DynamicQuantization() if scheme == "int8" else None


def exactly(names: Sequence[str]) -> tuple[str, ...]:
    """Return patterns that match these names and nothing else."""
    return tuple(glob.escape(name) for name in names)


def _packed(
    bits: int, *, targets: tuple[str, ...] | None = None, overrides: Mapping[str, int] | None = None
) -> WeightOnlyQuantization:
    return WeightOnlyQuantization(
        bits=bits, group_size=_GROUP, indivisible="smaller_group", targets=targets, overrides=dict(overrides or {})
    )


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


def _works(model: PreTrainedModel, context: Context, form: Form, space: Space) -> bool:
    # Patterns of blocks name the tables in them as well, such as T5's of relative positions, which else stay float.
    whole, blocks = form.of_all(space.rest), form.of_blocks(space.blocks)
    assert whole is not None
    assert blocks is not None
    try:
        return all(any(action.touched for action in step.plan(model, context)) for step in (whole, blocks))
    except (UnsupportedModelError, NothingToCompressError, ConfigError) as error:
        space.notes.append(f"no {form.scheme} weights of {form.bits} bits: {error}")
        return False
