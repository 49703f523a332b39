"""Cutting and replacing parts: linears, Conv1D, experts, embeddings, norms; with biases, sizes and ties kept right.

Every function changes the module in place and keeps dtype, device and `requires_grad`. `keep` always is a 1-D tensor of
the indices that stay, in the order in which they shall stand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .find import ties
from .parts import FeedForward, Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points to.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> replace(model, "0", nn.Identity())
        >>> model
        Sequential(
          (0): Identity()
        )
    """
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def keep_outputs(module: nn.Module, keep: torch.Tensor) -> None:
    """Keep the output features `keep` of a Linear or Conv1D: rows of the weight and of the bias.

    Example:
        >>> layer = nn.Linear(2, 4)
        >>> keep_outputs(layer, torch.tensor([0, 3]))
        >>> layer.out_features, tuple(layer.weight.shape), tuple(layer.bias.shape)
        (2, (2, 2), (2,))
    """
    _cut(module, "weight", keep, axis=1 if isinstance(module, Conv1D) else 0)
    if getattr(module, "bias", None) is not None:
        _cut(module, "bias", keep, axis=0)
    setattr(module, "nf" if isinstance(module, Conv1D) else "out_features", len(keep))


def keep_inputs(module: nn.Module, keep: torch.Tensor) -> None:
    """Keep the input features `keep` of a Linear or Conv1D: columns of the weight; the bias stays whole."""
    _cut(module, "weight", keep, axis=0 if isinstance(module, Conv1D) else 1)
    setattr(module, "nx" if isinstance(module, Conv1D) else "in_features", len(keep))


def keep_rows(module: nn.Embedding, keep: torch.Tensor) -> None:
    """Keep the rows `keep` of an embedding; a padding index moves with its row, or is dropped with it.

    Example:
        >>> table = nn.Embedding(5, 2, padding_idx=4)
        >>> keep_rows(table, torch.tensor([1, 4]))
        >>> table.num_embeddings, table.padding_idx
        (2, 1)
    """
    _cut(module, "weight", keep, axis=0)
    module.num_embeddings = len(keep)
    if module.padding_idx is not None:
        position = (keep == module.padding_idx).nonzero().flatten()
        module.padding_idx = int(position[0]) if len(position) else None


def keep_features(module: nn.Module, keep: torch.Tensor) -> None:
    """Keep the features `keep` of an embedding (its columns) or of a norm (its weight and bias)."""
    if isinstance(module, nn.Embedding):
        _cut(module, "weight", keep, axis=1)
        module.embedding_dim = len(keep)
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() == 1:
            _cut(module, name, keep, axis=0)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (len(keep),)


def keep_channels(feed_forward: FeedForward, keep: torch.Tensor) -> None:
    """Keep the channels `keep` of a feed-forward network: outputs of up and gate, inputs of down.

    Args:
        feed_forward: the network, as `anatomy` found it; of experts or dense.
        keep: channels that stay, shape (new width,), or (experts, new width) with each expert's own.
    """
    width = feed_forward.width
    for part in feed_forward.projections():
        fused = part is feed_forward.gate_up
        index = fused_rows(feed_forward, keep) if fused else keep
        if part.layer.kind == "experts":
            _keep_of_experts(part, index, inputs=part is feed_forward.down, width=2 * width if fused else width)
        elif part is feed_forward.down:
            keep_inputs(part.layer.module, index)
        else:
            keep_outputs(part.layer.module, index)


def zero_channels(feed_forward: FeedForward, drop: torch.Tensor) -> None:
    """Zero the channels `drop` in place, weights and biases: what `keep_channels` of the others must equal.

    Args:
        feed_forward: the network.
        drop: channels to silence, shape (channels,) or (experts, channels).
    """
    for part in feed_forward.projections():
        index = fused_rows(feed_forward, drop) if part is feed_forward.gate_up else drop
        layer = part.layer
        inputs = part is feed_forward.down
        with torch.no_grad():
            if layer.kind == "experts":
                axis = layer.input_axis if inputs else 3 - layer.input_axis
                for expert, channels in enumerate(index):
                    layer.weight[expert].index_fill_(axis - 1, channels.to(layer.weight.device), 0)
                bias = _expert_bias(part)
                if bias is not None and not inputs:
                    for expert, channels in enumerate(index):
                        bias[expert].index_fill_(0, channels.to(bias.device), 0)
                continue
            axis = layer.input_axis if inputs else 1 - layer.input_axis
            layer.weight.index_fill_(axis, index.to(layer.weight.device), 0)
            bias = getattr(layer.module, "bias", None)
            if bias is not None and not inputs:
                bias.index_fill_(0, index.to(bias.device), 0)


def fused_rows(feed_forward: FeedForward, channels: torch.Tensor) -> torch.Tensor:
    """Return the rows of the fused gate and up projection that belong to `channels`, in the layout's order.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.testing import tiny_model
        >>> network = anatomy(tiny_model("phi3")).feed_forwards()[0]
        >>> fused_rows(network, torch.tensor([0, 5])).tolist()
        [0, 5, 128, 133]
    """
    if feed_forward.layout == "[gate|up]":
        return torch.cat([channels, channels + feed_forward.width], dim=-1)
    if feed_forward.layout == "gate, up interleaved":
        return torch.stack([2 * channels, 2 * channels + 1], dim=-1).flatten(-2)
    raise ValueError(f"the layout of {feed_forward.path} is unknown; it cannot be cut")


def retie(model: PreTrainedModel, groups: tuple[tuple[str, ...], ...]) -> None:
    """Make each group of parameter names one tensor again, the first one's; `groups` as `ties` returned them before.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> before = ties(model)
        >>> model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        >>> retie(model, before)
        >>> ties(model) == before
        True
    """
    for first, *others in groups:
        shared = model.get_parameter(first)
        for name in others:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, shared)


def _cut(module: nn.Module, name: str, keep: torch.Tensor, *, axis: int) -> None:
    old = getattr(module, name)
    new = old.detach().index_select(axis, keep.to(old.device)).contiguous()
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _keep_of_experts(part: Projection, keep: torch.Tensor, *, inputs: bool, width: int) -> None:
    layer = part.layer
    axis = layer.input_axis if inputs else 3 - layer.input_axis
    assert layer.weight.shape[axis] == width
    keep = keep.expand(layer.weight.shape[0], -1)
    _cut_each(layer.module, layer.parameter, keep, axis=axis)
    bias = _expert_bias(part)
    if bias is not None and not inputs:
        _cut_each(layer.module, f"{layer.parameter}_bias", keep, axis=1)


def _cut_each(module: nn.Module, name: str, keep: torch.Tensor, *, axis: int) -> None:
    old = getattr(module, name)
    index = keep.to(old.device)
    rows = [expert.detach().index_select(axis - 1, index[number]) for number, expert in enumerate(old)]
    setattr(module, name, nn.Parameter(torch.stack(rows).contiguous(), requires_grad=old.requires_grad))


def _expert_bias(part: Projection) -> torch.Tensor | None:
    return getattr(part.layer.module, f"{part.layer.parameter}_bias", None)


__all__ = [
    "fused_rows",
    "keep_channels",
    "keep_features",
    "keep_inputs",
    "keep_outputs",
    "keep_rows",
    "replace",
    "retie",
    "ties",
    "zero_channels",
]
