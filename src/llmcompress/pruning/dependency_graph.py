"""Groups of channels as Torch-Pruning's dependency graph finds them, for models whose parts nobody has described.

The graph follows the operations of one forward pass (Fang et al., DepGraph, arXiv 2301.12900). Torch-Pruning finds what
belongs together and how much it matters; what is cut, silenced and proven is this library's own `Group`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..anatomy.groups import Group, Member
from ..anatomy.probe import probe_inputs
from ..errors import PluginError, UnsupportedModelError
from .time_limit import within

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Importance = Literal["magnitude", "lamp", "fpgm", "random"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Found:
    """One group of the graph.

    Attributes:
        group: its channels; without members where `why_not` is given.
        scores: how much each channel matters, shape (count,); higher is dearer.
        layers: paths of the modules whose outputs are the channels.
        why_not: why the group cannot be cut, or None.
    """

    group: Group
    scores: torch.Tensor
    layers: tuple[str, ...]
    why_not: str | None


def dependency_groups(
    model: PreTrainedModel, importance: Importance, *, seconds: float, who: str, whose: str = "time_limit"
) -> list[Found]:
    """Return all groups of channels of `model`, with their scores.

    Traces a float32 copy of the model on one small random image. The time limit is there because Torch-Pruning 1.6.1
    does not return from the graphs of some models.

    Args:
        model: the model; not changed.
        importance: one of Torch-Pruning's that need no data.
        seconds: how long it may take.
        who: the strategy's name, for messages.
        whose: the field that sets the limit, for messages.

    Raises:
        PluginError: Torch-Pruning is not installed.
        UnsupportedModelError: its graph fails on this model, or does not return in time.
    """
    if find_spec("torch_pruning") is None:
        raise PluginError(f"{who} needs the package torch-pruning; run: pip install 'llmcompress[torch-pruning]'.")
    inputs = {name: tensor.float() for name, tensor in probe_inputs(model, rows=1).items()}
    twin = copy.deepcopy(model).float().eval().requires_grad_(True)
    name = type(model).__name__
    try:
        return within(seconds, lambda: list(_trace(twin, inputs, importance)))
    except TimeoutError:
        raise UnsupportedModelError(
            f"{who}: the dependency graph of {name} did not return within {seconds:g} s; pass a larger {whose}, or use "
            f"StructuredPruning or DepthPruning."
        ) from None
    except Exception as error:
        raise UnsupportedModelError(
            f"{who}: Torch-Pruning cannot follow {name} ({type(error).__name__}: {error}); use StructuredPruning or "
            f"DepthPruning."
        ) from error


def _trace(model: PreTrainedModel, inputs: dict[str, torch.Tensor], importance: Importance) -> Iterator[Found]:
    import torch_pruning

    score = _importance(importance)
    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad():
        graph.build_dependency(model, example_inputs=inputs, output_transform=_first, verbose=False)
    names = {id(module): path for path, module in model.named_modules()}
    names.update({id(parameter): path for path, parameter in model.named_parameters()})
    axes = {id(parameter): axis for parameter, axis in graph.unwrapped_parameters}
    taken: set[tuple[str, int]] = set()
    for items in graph.get_all_groups():
        root = names[id(items[0].dep.target.module)]
        count = len(items[0].idxs)
        members, layers, why_not = [], [], None
        for item in items:
            module = item.dep.target.module
            path = names.get(id(module))
            if path is None:  # an operation without weights
                continue
            outputs = graph.is_out_channel_pruning_fn(item.dep.handler)
            if outputs:
                layers.append(path)
            found = list(_axes(module, path, outputs, axes.get(id(module))))
            if not found:
                why_not = f"it runs through {path}, a {type(module).__name__} whose channels cannot go one by one"
                continue
            for tensor, axis, size, consumes in found:
                if max(item.idxs) >= size:  # wrong where tokens, not channels, are joined
                    why_not = f"Torch-Pruning finds channel {max(item.idxs)} in {tensor}, which has {size}"
                    continue
                channel = torch.full((size,), -1)
                channel[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
                members.append(Member(tensor, axis, channel, consumes))
        places = {(member.tensor, member.axis) for member in members}
        if places & taken:
            why_not = f"it shares {min(places & taken)[0]} with another group"
        if not why_not:
            taken |= places
        with torch.no_grad():
            scores = torch.zeros(count, dtype=torch.float32) if why_not else score(items).detach().float().cpu()
        group = Group("channels", root, count, () if why_not else tuple(members))
        yield Found(group, scores, tuple(dict.fromkeys(layers)), why_not)


def _axes(module: Any, path: str, outputs: bool, parameter_axis: int | None) -> Iterator[tuple[str, int, int, bool]]:
    """Yield (tensor, axis, size, whether it consumes) of what a module has of a group; nothing if it is not known."""
    if isinstance(module, nn.Parameter):
        axis = parameter_axis if parameter_axis is not None else module.dim() - 1
        yield path, axis, module.shape[axis], False
    elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        groups = getattr(module, "groups", 1)
        if groups > 1 and not groups == module.weight.shape[0] == module.in_channels:
            return
        axis = 0 if outputs or groups > 1 else 1
        yield f"{path}.weight", axis, module.weight.shape[axis], axis == 1
        if axis == 0 and module.bias is not None:
            yield f"{path}.bias", 0, module.bias.shape[0], False
    elif isinstance(module, nn.Embedding):
        yield f"{path}.weight", 1, module.embedding_dim, False
    elif isinstance(module, _BATCH_NORMS) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1):
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                yield f"{path}.{name}", 0, tensor.shape[0], False


def _importance(name: Importance) -> Callable[[Any], torch.Tensor]:
    from torch_pruning import importance

    kinds: dict[Importance, Callable[[], Callable[[Any], torch.Tensor]]] = {
        "magnitude": importance.GroupMagnitudeImportance,
        "lamp": importance.LAMPImportance,
        "fpgm": importance.FPGMImportance,
        "random": importance.RandomImportance,
    }
    return kinds[name]()


def _first(outputs: Any) -> torch.Tensor:
    logits = getattr(outputs, "logits", None)
    found: torch.Tensor = outputs[0] if logits is None else logits
    return found
