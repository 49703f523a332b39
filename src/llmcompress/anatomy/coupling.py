"""The groups of a model: which axes of which tensors its channels, heads, experts and hidden features run through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UnsupportedModelError
from .groups import Group, Member, tensor_of
from .layers import weight_layers
from .parts import Anatomy, Attention, Block, Experts, FeedForward, Projection
from .probe import call_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def feed_forward_groups(body: Anatomy) -> list[Group]:
    """Return one group a feed-forward network: its channels; of experts, each expert has its own.

    Raises:
        UnsupportedModelError: a fused gate and up projection whose layout no probe could find.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.testing import tiny_model
        >>> [(group.path, group.count) for group in feed_forward_groups(anatomy(tiny_model("gpt2")))]
        [('transformer.h.0.mlp', 256), ('transformer.h.1.mlp', 256)]
    """
    return [_feed_forward_group(network) for network in body.feed_forwards()]


def head_groups(model: PreTrainedModel, body: Anatomy) -> list[Group]:
    """Return one group an attention: its heads; under grouped-query attention, each key head with its query heads.

    Where one block holds a bias for each head that all blocks share (T5), the heads of all of them are one group.

    Raises:
        UnsupportedModelError: no known attention, or a fused projection whose layout no probe could find.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> group = head_groups(model, anatomy(model))[0]
        >>> group.count, group.members[0].tensor, group.members[0].channel.unique(return_counts=True)[1].tolist()
        (2, 'model.layers.0.self_attn.q_proj.weight', [32, 32])
    """
    groups = []
    for blocks in body.stacks:
        found = [_head_group(model, attention) for block in blocks for attention in block.attentions]
        groups += _joined_by_bias(model, blocks, found)
    if not groups:
        raise UnsupportedModelError(
            f"heads of {body.model} cannot be pruned: no attention with known q, k, v and o (or fused qkv) was found "
            f"in its blocks; use ffn or DepthPruning."
        )
    return groups


def query_head_groups(model: PreTrainedModel, body: Anatomy) -> list[Group]:
    """Return one group an attention: its query heads, of which each key head keeps the same number.

    Raises:
        UnsupportedModelError: as `head_groups`; or an attention in which every query head has its own key head.
    """
    groups = []
    for block in body.blocks():
        for attention in block.attentions:
            if attention.heads == attention.kv_heads:
                raise UnsupportedModelError(
                    f"query_heads of {body.model} cannot be pruned by themselves: in {attention.path} every query head "
                    f"has its own key and value head; use heads."
                )
            groups.append(_query_head_group(model, attention))
    if not groups:
        raise UnsupportedModelError(f"query_heads of {body.model} cannot be pruned: no known attention; use ffn.")
    return groups


def expert_groups(model: PreTrainedModel, body: Anatomy) -> list[Group]:
    """Return one group a mixture of experts: the experts, with the rows of the router.

    Raises:
        UnsupportedModelError: no mixture of experts, or one whose router was not found.
    """
    mixtures = [mixture for block in body.blocks() for mixture in block.experts]
    if not mixtures:
        raise UnsupportedModelError(f"experts of {body.model} cannot be pruned: it has no mixture of experts; use ffn.")
    return [_expert_group(model, body, mixture) for mixture in mixtures]


def _feed_forward_group(network: FeedForward) -> Group:
    experts = network.down.layer.weight.shape[0] if network.down.layer.kind == "experts" else None
    members = []
    for part in network.projections():
        if part is network.down:
            members.append(_input(part, torch.arange(network.width)))
        else:
            channel = _gate_up_channels(network) if part is network.gate_up else torch.arange(network.width)
            members += _outputs(part, channel)
    members += [Member(name, 0, torch.arange(network.width)) for name in network.inner]
    return Group(
        "ffn", network.path, network.width, tuple(members), experts, scopes=(network.path,), lengths=(network.width,)
    )


def _gate_up_channels(network: FeedForward) -> torch.Tensor:
    channels = torch.arange(network.width)
    if network.layout == "[gate|up]":
        return channels.repeat(2)
    if network.layout == "gate, up interleaved":
        return channels.repeat_interleave(2)
    if network.down.layer.weight.device.type == "meta":
        return channels.repeat(2)  # a plan without weights counts channels and need not know their order
    raise UnsupportedModelError(
        f"{network.path} cannot be cut: a probe did not find which rows of its fused gate and up projection form a "
        f"channel; use DepthPruning, or an unstructured strategy."
    )


def _query_rows(attention: Attention, query: torch.Tensor) -> torch.Tensor:
    """Return the channels of the rows of q; more than o takes in, where each head has a gate behind it."""
    assert attention.q is not None
    runs = attention.q.outputs // attention.o.inputs
    return query.view(attention.heads, -1).repeat(1, runs).flatten() if runs > 1 else query


def _head_group(model: PreTrainedModel, attention: Attention) -> Group:
    heads, kv, width = attention.heads, attention.kv_heads, attention.head_dim
    if heads % kv:
        raise UnsupportedModelError(
            f"heads of {attention.path} cannot be pruned: its {heads} query heads of {width} do not share its {kv} key "
            f"heads evenly; use ffn or DepthPruning."
        )
    query = torch.arange(heads).repeat_interleave(width) // (heads // kv)
    key = torch.arange(kv).repeat_interleave(width)
    members = [_input(attention.o, query)]
    if attention.q is not None and attention.k is not None and attention.v is not None:
        members = [
            *_outputs(attention.q, _query_rows(attention, query)),
            *_outputs(attention.k, key),
            *_outputs(attention.v, key),
            *members,
        ]
    elif attention.qkv is not None:
        members = [*_outputs(attention.qkv, _fused_heads(attention, query, key)), *members]
    known = {part.layer.path for part in attention.projections()}
    for name, axis in _per_head_axes(model, attention, known):
        size = tensor_of(model, name).shape[axis]
        channel = {heads: torch.arange(heads) // (heads // kv), kv: torch.arange(kv), heads * width: query}
        members.append(Member(name, axis, channel.get(size, key)))
    lengths = {heads, kv, heads * width, kv * width, (heads + 2 * kv) * width}
    return Group("heads", attention.path, kv, tuple(members), scopes=(attention.path,), lengths=tuple(lengths))


def _query_head_group(model: PreTrainedModel, attention: Attention) -> Group:
    heads, kv, width = attention.heads, attention.kv_heads, attention.head_dim
    query = torch.arange(heads).repeat_interleave(width)
    members = [_input(attention.o, query)]
    if attention.q is not None:
        members = [*_outputs(attention.q, _query_rows(attention, query)), *members]
    elif attention.qkv is not None:
        stays = torch.full((kv * width,), -1)
        members = [*_outputs(attention.qkv, _fused_heads(attention, query, stays)), *members]
    known = {part.layer.path for part in attention.projections()}
    for name, axis in _per_head_axes(model, attention, known):
        size = tensor_of(model, name).shape[axis]
        if size in (heads, heads * width):
            members.append(Member(name, axis, torch.arange(heads) if size == heads else query))
    lengths = (heads, heads * width, heads // kv)
    return Group(
        "query_heads", attention.path, heads, tuple(members), balance=kv, scopes=(attention.path,), lengths=lengths
    )


def _fused_heads(attention: Attention, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the channel of each row of a fused projection, given those of its query rows and of its key rows."""
    if attention.layout == "[q|k|v]" or attention.o.layer.weight.device.type == "meta":
        return torch.cat([query, key, key])
    if attention.layout in ("per head [q|k|v]", "per group [q..|k|v]"):
        runs = [rows.view(attention.kv_heads, -1) for rows in (query, key, key)]
        return torch.cat(runs, dim=1).flatten()
    raise UnsupportedModelError(
        f"heads of {attention.path} cannot be pruned: a probe did not find how its fused projection orders queries, "
        f"keys and values; use ffn or DepthPruning."
    )


def _per_head_axes(model: PreTrainedModel, attention: Attention, known: set[str]) -> list[tuple[str, int]]:
    """Return the axes of other tensors in the attention that run over heads: sinks, gates, relative biases, wide norms.

    Of a matrix product only the outputs can; its inputs are hidden features, however many there are.
    """
    sizes = {attention.heads, attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim}
    if attention.kv_heads > 1:
        sizes.add(attention.kv_heads)
    sizes.discard(attention.head_dim)
    outputs = {layer.path: 1 - layer.input_axis for layer in weight_layers(model) if layer.kind in ("linear", "conv1d")}
    found = []
    scope = model.get_submodule(attention.path)
    for name, tensor in scope.named_parameters(prefix=attention.path):
        path = name.rpartition(".")[0]
        if path in known or not _inside(path, attention) or tensor.dim() > 2:
            continue
        allowed = range(tensor.dim())
        if path in outputs:
            allowed = range(outputs[path], outputs[path] + 1) if tensor.dim() == 2 else range(1)
        elif tensor.shape == (attention.o.outputs,) and not _is_inner_norm(model, attention, path):
            continue
        # Of a table (buckets, heads) the last axis runs over the heads, of a norm for each head the first.
        axes = [axis for axis in allowed if tensor.shape[axis] in sizes]
        if axes:
            found.append((name, axes[0] if "norm" in name else axes[-1]))
    return found


def _is_inner_norm(model: PreTrainedModel, attention: Attention, path: str) -> bool:
    """Tell whether a norm as wide as the hidden size normalises heads: it runs behind the queries and before o."""
    first = attention.q or attention.qkv
    if path in attention.norms:
        return True
    if first is None or attention.o.layer.weight.device.type == "meta":
        return False
    order = call_order(model, [first.layer.path, path, attention.o.layer.path])
    return order == [first.layer.path, path, attention.o.layer.path]


def _inside(path: str, attention: Attention) -> bool:
    """Tell whether a tensor of the module at `path` belongs to the heads, not to what follows the output."""
    after = attention.o.layer.path.rpartition(".")[0]
    return after == attention.path or not path.startswith(f"{after}.")


def _joined_by_bias(model: PreTrainedModel, blocks: tuple[Block, ...], groups: list[Group]) -> list[Group]:
    """Join the groups of a stack if one of its attentions holds a table over the heads that the others lack."""
    own = [
        any(tensor_of(model, member.tensor).dim() == 2 and "bias" in member.tensor for member in group.members)
        for group in groups
    ]
    crossed = [attention.cross for block in blocks for attention in block.attentions]
    if sum(own) != 1:
        return groups
    shared = [group for group, cross in zip(groups, crossed, strict=True) if not cross]
    path = blocks[0].path.rpartition(".")[0]
    joined = Group(
        "heads",
        path,
        shared[0].count,
        tuple(member for group in shared for member in group.members),
        scopes=tuple(scope for group in shared for scope in group.scopes),
        lengths=shared[0].lengths,
    )
    return [joined, *(group for group, cross in zip(groups, crossed, strict=True) if cross)]


def _expert_group(model: PreTrainedModel, body: Anatomy, mixture: Experts) -> Group:
    if mixture.router is None:
        raise UnsupportedModelError(
            f"experts of {body.model} cannot be pruned: no router with a row for each of the {mixture.count} experts "
            f"stands beside {mixture.path}; use ffn."
        )
    index = torch.arange(mixture.count)
    parent = mixture.path.rpartition(".")[0]
    members = []
    for name, tensor in [
        *model.get_submodule(parent).named_parameters(prefix=parent),
        *model.get_submodule(parent).named_buffers(prefix=parent),
    ]:
        inside = name.startswith(f"{mixture.path}.")
        routes = name == mixture.router or (tensor.dim() == 1 and tensor.shape[0] == mixture.count)
        if (inside and tensor.dim() >= 2 and tensor.shape[0] == mixture.count) or routes:
            members.append(Member(name, 0, index))
    return Group("experts", parent, mixture.count, tuple(members), scopes=(parent,), lengths=(mixture.count,))


def _outputs(part: Projection, channel: torch.Tensor) -> list[Member]:
    layer = part.layer
    experts = layer.kind == "experts"
    axis = (3 if experts else 1) - layer.input_axis
    members = [Member(f"{layer.path}.{layer.parameter}", axis, channel, per_expert=experts)]
    bias = f"{layer.parameter}_bias" if experts else "bias"
    if getattr(layer.module, bias, None) is not None:
        members.append(Member(f"{layer.path}.{bias}", 1 if experts else 0, channel, per_expert=experts))
    return members


def _input(part: Projection, channel: torch.Tensor) -> Member:
    layer = part.layer
    name = f"{layer.path}.{layer.parameter}"
    return Member(name, layer.input_axis, channel, consumes=True, per_expert=layer.kind == "experts")
