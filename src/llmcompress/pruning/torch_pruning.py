"""Structured pruning of what no adapter describes, convolutional networks first, along Torch-Pruning's graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..anatomy.empty import filled
from ..anatomy.footprint import footprint
from ..anatomy.groups import Group, cut, new_shapes, silence, tensor_of
from ..anatomy.probe import probe_inputs, probe_outputs, relative_error
from ..anatomy.sizes import Values, adopt_config, matches_config, shapes_of, solve_config
from ..anatomy.surgery import retie, ties
from ..compressor import Action, Compressor, Context, Cut, Outline
from ..errors import CompressionError, ConfigError, UnsupportedModelError, VerificationError
from ..registry import register
from .cutting import cut_outlined
from .dependency_graph import Found, Importance, dependency_groups
from .selection import dearest, shared_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sliced and masked networks add the same numbers in another order; more than this is a wrong slice.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# Beside the model while it is looked through: the one that the graph follows, and the one that a group is tried on.
_COPIES = 2


@register("torch_pruning")
class TorchPruning(Compressor):
    """Remove channels of image models along Torch-Pruning's dependency graph (Fang et al., arXiv 2301.12900).

    For convolutional networks (ResNet, ConvNeXt...), which `StructuredPruning` does not know; needs
    `pip install 'llmcompress[torch-pruning]'`. Vision transformers work, too, but their heads stay: there
    `StructuredPruning` does more. Text models are refused: Torch-Pruning does not return from the graphs of many, and
    breaks tied weights.

    Torch-Pruning only says which channels belong together and how much they matter. Each group is tried alone first,
    on a copy: one that the model cannot lose (its outputs, heads, a mean over channels) stays and is told. Then all are
    cut by this library, which proves on random images that the cut model gives the outputs of the model with the same
    channels silenced (and every LayerNorm over the others only, as it is after the cut), and has exactly the shapes
    that were predicted. Where a plain config can tell the sizes (a ResNet or ConvNeXt of which every group keeps the
    same share), they go there; else the folder loads by plain `from_pretrained` after `import llmcompress`.

    Args:
        ratio: share of the channels of each group to remove, in (0, 1).
        importance: Torch-Pruning's measure: `"magnitude"` (L2 norm over the group), `"lamp"` (arXiv 2010.07611),
            `"fpgm"` (distance from the geometric median, arXiv 1811.00250), `"random"`.
        scope: `"layer"` ranks the channels of each group; `"global"` those of all groups together.
        floor: share of its channels that each group keeps at least under the global scope.
        round_to: numbers of channels are the nearest multiple of this, at least one.
        skip: shell patterns of layers whose output channels all stay.
        time_limit: seconds that Torch-Pruning may take for its graph.

    Example:
        >>> import llmcompress as lc
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
        >>> model = ResNetForImageClassification(ResNetConfig(**sizes))
        >>> pruned = lc.compress(model, lc.TorchPruning(ratio=0.5), progress=False).model
        >>> pruned.resnet.embedder.embedder.convolution.out_channels
        8
    """

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the channels of each group to remove")
    importance: Importance = Field("magnitude", description="how channels are ranked")
    scope: Literal["layer", "global"] = Field("layer", description="rank within each group, or across all")
    floor: float = Field(0.2, gt=0, lt=1, description="share that each group keeps at least under the global scope")
    round_to: int = Field(8, ge=1, le=1024, description="numbers of channels are a multiple of this")
    skip: tuple[str, ...] = Field((), description="patterns of layers whose output channels stay")
    time_limit: float = Field(60.0, gt=0, description="seconds that the graph may take")

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each group by its first layer, with its old and new number of channels, and those that stay."""
        actions = []
        for part in self._parts(model):
            if part.why_not is not None:
                actions.append(Action(path=part.group.path, reason=part.why_not))
            else:
                about = "about " if self.scope == "global" else ""
                does = f"{about}{part.group.count} -> {part.kept} channels"
                actions.append(Action(path=part.group.path, does=does, reason=f"in {len(part.layers)} layers"))
        return actions

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Cut the sizes; which channels stay is open, and the first ones stand for it."""
        cuts = [(part.group, torch.arange(part.kept)) for part in self._parts(model) if part.why_not is None]
        cut_outlined(model, cuts, context, values=_told_by_config(model, cuts) or None)
        competing = self.scope == "global" and "under the global scope widths depend on the weights"
        return Outline(model, competing or None, scratch=_COPIES * footprint(model).memory_bytes)

    def predicted_shapes(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Return the shape that each tensor of the state dict will have (`scope="layer"`)."""
        changed = [(part.group, part.kept) for part in self._parts(model) if part.why_not is None]
        return {**shapes_of(model), **new_shapes(model, changed)}

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Rank, silence, cut, and prove the cut."""
        parts = [part for part in self._parts(model) if part.why_not is None]
        for part in parts:
            if not bool(torch.isfinite(part.scores).all()):
                raise CompressionError(f"the weights around {part.group.path} hold NaN or infinity; repair them first.")
        counts = [part.kept for part in parts]
        if self.scope == "global":
            groups, scores = [part.group for part in parts], [part.scores for part in parts]
            counts = shared_out(groups, scores, share=self.ratio, floor=self.floor, multiple=self.round_to)
        cuts = [(part.group, dearest(part.group, part.scores, kept)) for part, kept in zip(parts, counts, strict=True)]
        cuts = [(group, keep) for group, keep in cuts if len(keep) < group.count]
        tied, values = ties(model), _told_by_config(model, cuts)
        predicted = {**shapes_of(model), **new_shapes(model, [(group, len(keep)) for group, keep in cuts])}
        inputs = probe_inputs(model, seed=context.seed)
        expected = _silenced_outputs(model, cuts, inputs)
        for group, keep in cuts:
            cut(model, group, keep)
            context.history.append(Cut(group.path, group.kind, tuple(keep.tolist()), group.count))
        retie(model, tied)
        if values:
            adopt_config(model, values)
            told = ", ".join(f"{name}={value}" for name, value in values.items())
            context.tell(
                Action(path="", reason=f"the plain config tells the sizes ({told}): loads without llmcompress")
            )
        if shapes_of(model) != predicted or (values and not matches_config(model)):
            raise VerificationError(
                f"TorchPruning: the pruned {type(model).__name__} has other shapes than predicted, or than its config "
                f"tells; the result is withheld. Please report this model."
            )
        difference = relative_error(probe_outputs(model, inputs), expected)
        if not difference <= _TOLERANCE.get(model.dtype, 1e-4):
            raise VerificationError(
                f"TorchPruning: the sliced {type(model).__name__} differs from the silenced one by {difference:.1e} "
                f"(relative); the result is withheld. Please report this model."
            )
        return model

    def _parts(self, model: PreTrainedModel) -> list[_Part]:
        """Return all groups, those that stay with the reason."""
        if model.main_input_name != "pixel_values":
            raise UnsupportedModelError(
                f"TorchPruning is for image models, and {type(model).__name__} reads {model.main_input_name}; use "
                f"StructuredPruning, which knows the parts of language models."
            )
        # The graph and the trials are of a pass that runs; where there are no weights yet, any will do.
        model = filled(model) if model.device.type == "meta" else model
        found = dependency_groups(model, self.importance, seconds=self.time_limit, who="TorchPruning")
        for pattern in self.skip:
            if not any(fnmatchcase(layer, pattern) for one in found for layer in one.layers):
                layers = ", ".join(layer for one in found for layer in one.layers)
                raise ConfigError(
                    f"TorchPruning.skip must name layers of {type(model).__name__}, got {pattern!r}; it has: {layers}."
                )
        return [self._part(model, one) for one in found]

    def _part(self, model: PreTrainedModel, one: Found) -> _Part:
        count = one.group.count
        kept = min(max(round(count * (1 - self.ratio) / self.round_to), 1) * self.round_to, count)
        why_not = one.why_not
        if why_not is None and any(fnmatchcase(layer, pattern) for layer in one.layers for pattern in self.skip):
            why_not = "left out by skip"
        if why_not is None and kept == count:
            why_not = (
                f"has {count} channels; about {count * (1 - self.ratio):g} would be no multiple of {self.round_to}"
            )
        if why_not is None:
            why_not = _trial(model, one.group, kept)
        return _Part(one.group, one.scores, one.layers, kept, why_not)


@dataclass(frozen=True)
class _Part:
    """A group, how many of its channels stay, or why all do."""

    group: Group
    scores: torch.Tensor
    layers: tuple[str, ...]
    kept: int
    why_not: str | None


def _told_by_config(model: PreTrainedModel, cuts: Sequence[tuple[Group, torch.Tensor]]) -> Values:
    """Return the config attributes that tell the sizes after the cuts; none where no plain config does."""
    sizes: dict[int, set[int]] = {}
    for group, keep in cuts:
        sizes.setdefault(group.count, set()).add(len(keep))
    if any(len(kept) > 1 for kept in sizes.values()):
        return {}
    wanted = new_shapes(model, [(group, len(keep)) for group, keep in cuts])
    try:
        return solve_config(model, wanted, sizes, what="numbers of channels")
    except UnsupportedModelError:
        return {}


def _trial(model: PreTrainedModel, group: Group, kept: int) -> str | None:
    """Cut one group alone on a copy, anywhere; return why it may not be cut, or None."""
    twin = copy.deepcopy(model).float()
    inputs = {name: tensor.float() for name, tensor in probe_inputs(model).items()}
    # Channels in no regular order: every second half of the heads, say, could be cut where single channels cannot.
    keep = torch.randperm(group.count, generator=torch.Generator().manual_seed(0))[:kept].sort().values
    try:
        expected = _silenced_outputs(twin, [(group, keep)], inputs)
        cut(twin, group, keep)
        outputs = probe_outputs(twin, inputs)
    except Exception as error:  # code of any model runs here
        return f"the model does not run with fewer of these channels ({type(error).__name__}: {error})"
    if outputs.shape != expected.shape:
        return "these are the model's outputs"
    difference = relative_error(outputs, expected)
    if not difference <= _TOLERANCE[torch.float32]:
        return (
            f"single channels cannot go: something computes across them (cut and silenced differ by {difference:.0e})"
        )
    return None


@torch.no_grad()
def _silenced_outputs(
    model: PreTrainedModel, cuts: Sequence[tuple[Group, torch.Tensor]], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Silence all channels but those kept, for good, and return the outputs."""
    for group, keep in cuts:
        silence(model, group, keep)
    with _normalising_over(model, cuts):
        return probe_outputs(model, inputs)


@contextmanager
def _normalising_over(model: PreTrainedModel, cuts: Sequence[tuple[Group, torch.Tensor]]) -> Iterator[None]:
    """Make each layer norm over channels of a group take its mean and variance over those kept only."""
    kept = {}
    for group, keep in cuts:
        for member in group.members:
            if not member.consumes:
                kept[tensor_of(model, member.tensor).data_ptr()] = torch.isin(member.channel, keep).nonzero().flatten()
    with _NarrowNorms(kept):
        yield


class _NarrowNorms(TorchFunctionMode):
    """Computes layer norms whose weight is known here over some of the features, and zero for the others."""

    def __init__(self, kept: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_norm(
        self,
        features: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        index = self.kept.get(weight.data_ptr()) if weight is not None and len(normalized_shape) == 1 else None
        if weight is None or index is None:
            return functional.layer_norm(features, list(normalized_shape), weight, bias, eps)
        index = index.to(features.device)
        part = functional.layer_norm(
            features.index_select(-1, index),
            [len(index)],
            weight.index_select(0, index),
            None if bias is None else bias.index_select(0, index),
            eps,
        )
        return torch.zeros_like(features).index_copy_(-1, index, part.to(features.dtype))
