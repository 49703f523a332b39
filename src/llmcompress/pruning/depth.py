"""Depth pruning: whole blocks go, those that matter least on real texts, and the folder loads in plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from ..anatomy.depth import keep_blocks, plan_depth
from ..anatomy.probe import probe_inputs, probe_outputs, refuse_nonfinite_outputs, relative_error
from ..anatomy.sizes import matches_config, shapes_of
from ..anatomy.stacks import Stack, token_stacks
from ..calibration import calibration_batches
from ..compressor import Action, Compressor, Context, Need, Outline
from ..errors import ConfigError, NothingToCompressError, UnsupportedModelError, VerificationError
from ..registry import register
from .block_choice import Choice, complement, deviation, early_and_last, legal_choice
from .block_criteria import lowest_loss, most_influence, nearest_run
from .bypass import bypassed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CRITERIA = {"block_influence": most_influence, "angular_distance": nearest_run, "perplexity": lowest_loss}
# The same operations in the same order; only kernels that choose their own order may differ.
_TOLERANCE = 1e-5


@register("depth_pruning")
class DepthPruning(Compressor):
    """Remove the blocks that matter least (ShortGPT, arXiv 2403.03853).

    The new depth is written to the plain config, with lists that have an entry a block (`layer_types`), and each block
    left finds its own part of the cache: the saved folder loads in plain transformers. Not every block can go: the
    first one of T5 holds the position bias of all, and some architectures have another kind of block at fixed places.
    Then the best choice that is legal is taken, and the report says so. Before it returns, the step proves itself: the
    shallow model must give the outputs of the deep one with the same blocks bypassed. Which blocks stayed is left in
    `context.history`, where a `KnowledgeDistillation` that follows finds which teacher layers each block stands for.

    Args:
        layers: how many blocks each stack keeps, or the indices of the blocks to keep, ascending: `(0, 2, 5)`.
        ratio: share of the blocks of each stack to remove, in (0, 1); at least one block goes and one stays. 0.25 if
            neither is given.
        criterion: which blocks go; not used where `layers` names them.
            `"block_influence"`: those that turn the hidden states least (arXiv 2403.03853).
            `"angular_distance"`: the run of consecutive blocks behind which the states are nearest to those before it
            (arXiv 2403.17887; all tokens count here, since encoders have no last one).
            `"perplexity"`: one after the other, the block without which the loss is lowest: of the next token for
            language models, or else the KL divergence from the model as it is (greedy, as in SLEB, arXiv 2402.09025).
            As many passes over the data as blocks, for each block that goes; worth it on small models, where it finds
            the best of all choices (benchmarks/depth_criteria.py).
            `"last"`: the last ones, but for the very last, which the head relies on (the simple rule of arXiv
            2403.17887); needs no data.
        targets: shell patterns over the paths of the stacks, as `("encoder.*",)` for one side of an encoder-decoder;
            None takes all stacks.
        samples: how many texts to calibrate on at most.
        max_length: how many tokens of a text to take at most.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("llama")
        >>> step = lc.DepthPruning(layers=1)
        >>> shallow = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False).model
        >>> shallow.config.num_hidden_layers
        1
    """

    layers: int | tuple[int, ...] | None = Field(None, description="how many blocks each stack keeps, or which ones")
    ratio: float | None = Field(None, gt=0, lt=1, description="share of the blocks to remove")
    criterion: Literal["block_influence", "angular_distance", "perplexity", "last"] = Field(
        "block_influence", description="which blocks go"
    )
    targets: tuple[str, ...] | None = Field(None, description="patterns of the stacks to cut; None: all")
    samples: int = Field(128, ge=1, description="texts to calibrate on at most")
    max_length: int = Field(512, ge=1, description="tokens of a text at most")

    @model_validator(mode="after")
    def _agree(self) -> DepthPruning:
        if self.layers is not None and self.ratio is not None:
            raise ConfigError(
                f"DepthPruning must have layers or ratio, not both, got layers={self.layers!r} and ratio={self.ratio}."
            )
        if isinstance(self.layers, tuple):
            if not self.layers or min(self.layers) < 0 or any(b <= a for a, b in pairwise(self.layers)):
                raise ConfigError(
                    f"DepthPruning.layers must name blocks once, in ascending order from 0, got {self.layers!r}."
                )
        elif self.layers is not None and self.layers < 1:
            raise ConfigError(f"DepthPruning.layers must keep at least one block, got {self.layers}.")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """Data and a tokenizer, where data choose the blocks."""
        return frozenset({"data", "tokenizer"}) if self._asks_data else frozenset()

    @property
    def _asks_data(self) -> bool:
        return not isinstance(self.layers, tuple) and self.criterion != "last"

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each stack with its old and new depth, and the blocks that go where no data choose them."""
        actions = []
        for part in self._parts(model):
            of, path = len(part.stack), part.stack.path
            if part.choice is None:
                actions.append(Action(path=path, reason=part.remark))
            elif self._asks_data:
                by = self.criterion.replace("_", " ")
                actions.append(Action(path=path, does=f"{of} -> {part.choice.keep} blocks by {by}", reason=part.remark))
            else:
                gone = ", ".join(map(str, complement(self._without_data(part.choice), of)))
                does = f"{of} -> {part.choice.keep} blocks: {gone} removed"
                actions.append(Action(path=path, does=does, reason=part.remark))
        return actions

    def predicted_shapes(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Return the shape that each tensor of the state dict will have. Reads no weight.

        Where data choose among blocks of different sizes, the prediction is for those that `criterion="last"` takes.

        Example:
            >>> from llmcompress.testing import tiny_model
            >>> shapes = DepthPruning(layers=1).predicted_shapes(tiny_model("gpt2"))
            >>> sum(name.endswith("c_fc.weight") for name in shapes)
            1
        """
        chosen = [part.choice for part in self._parts(model) if part.choice is not None]
        return _shallow_shapes(model, {choice.stack.path: self._without_data(choice) for choice in chosen})

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Choose the blocks, cut, write the config, and prove the cut."""
        choices = [part.choice for part in self._parts(model) if part.choice is not None]
        if not choices:
            return model
        kept = self._choose(model, choices, context)
        predicted = _shallow_shapes(model, kept)
        gone = [
            choice.stack.block_path(index)
            for choice in choices
            for index in complement(kept[choice.stack.path], len(choice.stack))
        ]
        inputs = probe_inputs(model, seed=context.seed)
        told_by_config = matches_config(model)
        with bypassed(model, gone):
            expected = probe_outputs(model, inputs)
        refuse_nonfinite_outputs(model, expected)
        cuts = keep_blocks(model, kept)
        if shapes_of(model) != predicted or (told_by_config and not matches_config(model)):
            raise VerificationError(
                f"DepthPruning: the shallow {type(model).__name__} has other shapes than predicted, or than its config "
                f"tells; the result is withheld. Please report this model."
            )
        try:
            shallow = probe_outputs(model, inputs)
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run without {', '.join(gone)} ({type(error).__name__}: {error}); "
                f"another part of it depends on their places. Choose other blocks with layers=(0, ...), or use "
                f"StructuredPruning."
            ) from error
        difference = relative_error(shallow, expected)
        if not difference <= _TOLERANCE:
            raise UnsupportedModelError(
                f"DepthPruning: the shallow {type(model).__name__} differs from the deep one with {', '.join(gone)} "
                f"bypassed by {difference:.1e} (relative): what its blocks do depends on their number. Choose other "
                f"blocks with layers=(0, ...), or use StructuredPruning."
            )
        context.history.extend(cuts)
        return model

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Drop as many blocks as will go: those named, or where data choose those that `criterion="last"` takes."""
        choices = [part.choice for part in self._parts(model) if part.choice is not None]
        shapes = [_block_shapes(choice.stack) for choice in choices]
        scratch, flops = self._effort(model, context) if self._asks_data else (0, 0.0)
        uneven = self._asks_data and any(any(block != own[0] for block in own) for own in shapes)
        context.history.extend(
            keep_blocks(model, {choice.stack.path: self._without_data(choice) for choice in choices})
        )
        estimated = "the blocks differ in size, and data choose which go" if uneven else None
        return Outline(model, estimated, scratch=scratch, flops=flops)

    def _effort(self, model: PreTrainedModel, context: Context) -> tuple[int, float]:
        """Return the bytes of a batch's states behind every block and of its outputs, and the passes' arithmetic."""
        batches = calibration_batches(
            model, context, who="DepthPruning", samples=self.samples, max_length=self.max_length
        )
        sizes = [batch["input_ids"].numel() for batch in batches]
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        blocks = sum(len(stack) for stack in token_stacks(model))
        numbers = table.shape[1] * (blocks + 1) + (0 if head is None else table.shape[0])
        passes = blocks if self.criterion == "perplexity" else 1
        return max(sizes) * numbers * 4, 2.0 * passes * sum(sizes) * model.num_parameters()

    def _parts(self, model: PreTrainedModel) -> list[_Part]:
        stacks = token_stacks(model)
        if not stacks:
            raise UnsupportedModelError(
                f"DepthPruning needs repeated blocks in a ModuleList, and {type(model).__name__} has none; use "
                f"StructuredPruning, or for convolutional networks TorchPruning."
            )
        if self._asks_data and model.main_input_name != "input_ids":
            raise UnsupportedModelError(
                f"DepthPruning.criterion={self.criterion!r} calibrates on texts, and {type(model).__name__} reads "
                f"{model.main_input_name}; use criterion='last', or name the blocks with layers=(0, ...)."
            )
        paths = [stack.path for stack in stacks]
        for pattern in self.targets or ():
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise NothingToCompressError(
                    f"DepthPruning.targets: no stack of {type(model).__name__} matches {pattern!r}; it has: "
                    f"{', '.join(paths)}."
                )
        return [self._part(model, stack) for stack in stacks]

    def _part(self, model: PreTrainedModel, stack: Stack) -> _Part:
        of = len(stack)
        if self.targets is not None and not any(fnmatchcase(stack.path, pattern) for pattern in self.targets):
            return _Part(stack, None, "not among the targets")
        if isinstance(self.layers, tuple):
            if self.layers[-1] >= of:
                raise ConfigError(
                    f"DepthPruning.layers must name blocks that are there, got {self.layers!r}; {stack.path} of "
                    f"{type(model).__name__} has {of}."
                )
            if len(self.layers) == of:
                return _Part(stack, None, f"has {of} blocks, and all are to stay")
            plan_depth(model, {stack.path: self.layers})
            return _Part(stack, Choice(stack, len(self.layers), tuple((index,) for index in range(of)), None), None)
        if of == 1:
            return _Part(stack, None, "has one block, which stays")
        asked = self.layers if self.layers is not None else of - self.ratio_or_default * of
        if asked > of:
            raise ConfigError(
                f"DepthPruning.layers must be below the number of blocks, got {self.layers}; {stack.path} of "
                f"{type(model).__name__} has {of}."
            )
        if self.layers == of:
            return _Part(stack, None, f"has {of} blocks, and all are to stay")
        keep = self.layers or min(max(of - round(of - asked), 1), of - 1)
        choice = _nearest(model, stack, keep)
        if choice.keep != keep:
            return _Part(
                stack, choice, f"{keep} were to stay; {choice.keep} is the nearest depth that its config tells"
            )
        return _Part(stack, choice, None if self._asks_data else deviation(choice, early_and_last(choice)))

    @property
    def ratio_or_default(self) -> float:
        """The share of the blocks that goes where `layers` says nothing."""
        return 0.25 if self.ratio is None else self.ratio

    def _without_data(self, choice: Choice) -> tuple[int, ...]:
        """Return what stays by the fields alone: the blocks named, or all but the last ones before the very last."""
        if isinstance(self.layers, tuple):
            return self.layers
        kept = choice.dearest(early_and_last(choice))
        assert kept is not None
        return kept

    def _choose(
        self, model: PreTrainedModel, choices: Sequence[Choice], context: Context
    ) -> dict[str, tuple[int, ...]]:
        if not self._asks_data:
            return {choice.stack.path: self._without_data(choice) for choice in choices}
        batches = calibration_batches(
            model, context, who="DepthPruning", samples=self.samples, max_length=self.max_length
        )
        choose = _CRITERIA[self.criterion]
        return choose(model, batches, choices, context, who="DepthPruning")


@dataclass(frozen=True)
class _Part:
    """A stack with what may stay of it, or with the reason (`remark`) why it is left."""

    stack: Stack
    choice: Choice | None
    remark: str | None


def _nearest(model: PreTrainedModel, stack: Stack, keep: int) -> Choice:
    """Return the choice of `keep` blocks, or where that is not legal of the nearest number, more before fewer."""
    refused = None
    for number in sorted(range(1, len(stack)), key=lambda number: (abs(number - keep), -number)):
        try:
            return legal_choice(model, stack, number)
        except UnsupportedModelError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _block_shapes(stack: Stack) -> list[dict[str, torch.Size]]:
    return [{name: tensor.shape for name, tensor in block.state_dict().items()} for block in stack.blocks]


def _shallow_shapes(model: PreTrainedModel, kept: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state dict once only the blocks `kept` are left, each under its new number."""
    shapes = {}
    for name, shape in shapes_of(model).items():
        for path, indices in kept.items():
            if not name.startswith(f"{path}."):
                continue
            number, _, rest = name[len(path) + 1 :].partition(".")
            if int(number) in indices:
                shapes[f"{path}.{indices.index(int(number))}.{rest}"] = shape
            break
        else:
            shapes[name] = shape
    return shapes
