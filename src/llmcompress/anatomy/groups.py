"""Channels that live and die together: which positions of which tensors they are, how to silence and how to cut them.

A feed-forward channel is a row of up, a row of gate and a column of down; a head is rows of q, k and v and columns of
o; a channel of the residual stream runs through every block. All are one thing, a `Group`: axes of tensors whose
positions belong to numbered channels (the dependency groups of Fang et al., DepGraph, arXiv 2301.12900). What prunes
works on groups and needs to know no architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .empty import carry_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["ffn", "heads", "query_heads", "hidden", "experts", "channels"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Member:
    """One axis of one tensor that runs over the channels of a group.

    Attributes:
        tensor: the parameter's or buffer's name in the model.
        axis: which of its axes.
        channel: the channel that each position of the axis belongs to, shape (size of the axis,); -1 where a position
            belongs to none and always stays.
        consumes: whether the axis is the input axis of a matrix product.
        per_expert: whether axis 0 runs over experts of which each has channels of its own.
    """

    tensor: str
    axis: int
    channel: torch.Tensor
    consumes: bool = False
    per_expert: bool = False


@dataclass(frozen=True)
class Group:
    """Channels of which each goes or stays as a whole.

    Attributes:
        kind: what a channel is.
        path: the module that they belong to; `""` is the whole model.
        count: number of channels (of one expert, where each expert has its own).
        members: the axes that run over them.
        experts: number of experts that choose channels of their own, or None.
        balance: so many runs of `count / balance` neighbouring channels must keep equal numbers (query heads of the
            groups that share a key and value head).
        scopes: modules that may remember the sizes as plain integers.
        lengths: those integers: all sizes that shrink in proportion to the channels kept.
    """

    kind: Kind
    path: str
    count: int
    members: tuple[Member, ...]
    experts: int | None = None
    balance: int = 1
    scopes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    def shapes(self, model: PreTrainedModel, kept: int) -> Iterator[tuple[str, int, int]]:
        """Yield (tensor, axis, new size) of every member once `kept` channels are left."""
        for member in self.members:
            owned = int((member.channel >= 0).sum())
            yield member.tensor, member.axis, len(member.channel) - owned + owned * kept // self.count


def new_shapes(model: PreTrainedModel, plan: Sequence[tuple[Group, int]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that tensors will have, by name, once each group keeps so many channels. Reads no weight.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.anatomy.coupling import feed_forward_groups
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> group = feed_forward_groups(anatomy(model))[0]
        >>> new_shapes(model, [(group, 32)])["bert.encoder.layer.0.output.dense.weight"]
        (64, 32)
    """
    shapes: dict[str, list[int]] = {}
    for group, kept in plan:
        for name, axis, size in group.shapes(model, kept):
            shapes.setdefault(name, list(tensor_of(model, name).shape))[axis] = size
    return {name: tuple(shape) for name, shape in shapes.items()}


@torch.no_grad()
def silence(model: PreTrainedModel, group: Group, keep: torch.Tensor) -> None:
    """Zero all channels of `group` but `keep`, in place: what cutting them must equal.

    Args:
        model: the model.
        group: the channels.
        keep: channels that stay, shape (kept,) or (experts, kept).
    """
    for member in group.members:
        tensor = tensor_of(model, member.tensor)
        if not tensor.is_floating_point():
            continue
        if member.per_expert:
            for expert, channels in enumerate(keep):
                tensor[expert].index_fill_(member.axis - 1, _positions(member, channels, ~0).to(tensor.device), 0)
        else:
            tensor.index_fill_(member.axis, _positions(member, keep, ~0).to(tensor.device), 0)


@torch.no_grad()
def cut(model: PreTrainedModel, group: Group, keep: torch.Tensor) -> None:
    """Keep only the channels `keep` of `group`, in place, in their old order; modules learn their new sizes.

    Ties are lost; `surgery.retie` restores them.

    Args:
        model: the model.
        group: the channels.
        keep: channels that stay, shape (kept,) or (experts, kept).

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.anatomy.coupling import head_groups
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> cut(model, head_groups(model, anatomy(model))[0], torch.tensor([0, 3]))
        >>> attention = model.bert.encoder.layer[0].attention
        >>> tuple(attention.self.query.weight.shape), attention.self.num_attention_heads
        ((32, 64), 2)
    """
    for member in group.members:
        path, _, name = member.tensor.rpartition(".")
        module, old = model.get_submodule(path), tensor_of(model, member.tensor)
        if member.per_expert:
            rows = [
                old[expert].index_select(member.axis - 1, _positions(member, channels).to(old.device))
                for expert, channels in enumerate(keep)
            ]
            new = torch.stack(rows)
        else:
            new = old.detach().index_select(member.axis, _positions(member, keep).to(old.device))
        replacement = new.contiguous()
        if isinstance(old, nn.Parameter):
            parameter = nn.Parameter(replacement, requires_grad=old.requires_grad)
            carry_zeros(old, parameter)
            setattr(module, name, parameter)
        else:
            module._buffers[name] = replacement
        _note_size(module, name, member.axis, replacement.shape[member.axis])
    for module in _rememberers(model, group):
        _note_lengths(module, group, keep.shape[-1])


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return the parameter or buffer called `name`."""
    path, _, attribute = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), attribute)
    return tensor


def _positions(member: Member, channels: torch.Tensor, invert: int = 0) -> torch.Tensor:
    stays = torch.isin(member.channel, channels.cpu()) | (member.channel < 0)
    return (~stays if invert else stays).nonzero().flatten()


def _is_layer(module: nn.Module) -> bool:
    """Tell whether a module is a matrix, a table or a norm, whose sizes are its own; a router is none."""
    own = dict(module.named_parameters(recurse=False))
    if not own or not set(own) <= {"weight", "bias"}:
        return False
    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or all(tensor.dim() == 1 for tensor in own.values())


def _note_size(module: nn.Module, name: str, axis: int, size: int) -> None:
    """Write the new size of an axis to the attribute in which modules of torch remember it."""
    if isinstance(module, nn.Linear) and name == "weight":
        setattr(module, ("out_features", "in_features")[axis], size)
    elif isinstance(module, Conv1D) and name == "weight":
        setattr(module, ("nx", "nf")[axis], size)
    elif isinstance(module, nn.Embedding):
        setattr(module, ("num_embeddings", "embedding_dim")[axis], size)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        module.normalized_shape = (size,)
    elif isinstance(module, _CONVOLUTIONS) and name == "weight":
        # A depthwise convolution has one group for each channel.
        depthwise = ("out_channels", "in_channels", "groups")
        for attribute in depthwise if module.groups > 1 else (depthwise[axis],):
            setattr(module, attribute, size)
    elif isinstance(module, _BATCH_NORMS):
        module.num_features = size


def _rememberers(model: nn.Module, group: Group) -> Iterator[nn.Module]:
    """Yield the modules that may remember sizes of the group.

    Of a feed-forward network only those around its matrices: its scope may be a whole block, with an attention in it.
    """
    owners = {member.tensor.rpartition(".")[0] for member in group.members}
    for scope in group.scopes:
        for path, module in model.get_submodule(scope).named_modules(prefix=scope):
            around = any(owner == path or owner.startswith(f"{path}.") for owner in owners) or not path
            if not _is_layer(module) and (around or group.kind != "ffn"):
                yield module


# What a size is called; other integers (the index of a layer, a window) may equal one by chance.
_SIZE_WORDS = ("head", "size", "dim", "width", "inner", "intermediate", "features", "channels", "expert", "embed")
_NO_SIZE = ("idx", "index", "window", "chunk", "block", "kernel", "vocab", "top_k", "per_tok")
# Sizes of one head, and the number of query heads to a key head, do not shrink with the number of heads.
_HEAD_SIZE = ("head_dim", "head_size", "proj_dim", "d_kv", "d_head")


# Sizes of a feed-forward network that may equal the hidden size by chance.
_OTHER_WIDTH = ("intermediate", "ffn", "inner", "expert", "head")


def _note_lengths(module: nn.Module, group: Group, kept: int) -> None:
    for name, value in list(vars(module).items()):
        if type(value) is not int or value not in group.lengths or name.startswith("_"):
            continue
        grouped = "groups" in name or "n_rep" in name
        shared = "kv_heads" in name or "key_value_heads" in name
        if not any(word in name for word in _SIZE_WORDS) or any(word in name for word in _NO_SIZE):
            continue
        of_one_head = any(word in name for word in _HEAD_SIZE) and "all_head" not in name
        if of_one_head or (group.kind == "heads" and grouped):
            continue
        if group.kind == "query_heads" and shared:
            continue
        if group.kind == "hidden" and any(word in name for word in _OTHER_WIDTH):
            continue
        # A network may stand in the block itself, beside an attention of the same width.
        if group.kind == "ffn" and "embed_dim" in name:
            continue
        setattr(module, name, value * kept // group.count)
