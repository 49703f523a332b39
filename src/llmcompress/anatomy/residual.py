"""The residual stream: the features that run through every block, as one group, and what normalises them.

A feature that is zero everywhere still counts in the mean that a norm divides by. RMSNorm divides by the root of the
mean square: over fewer features that mean grows by a known factor, which its weight can take up, so the slice equals
the mask. LayerNorm subtracts a mean as well, which no weight can mend: there the slice is a model of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .coupling import expert_groups, feed_forward_groups, head_groups
from .groups import Group, Member, tensor_of
from .layers import weight_layers
from .parts import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NormKind = Literal["rms", "rms, weight + 1", "layer", "other"]


def residual_group(model: PreTrainedModel, body: Anatomy) -> Group:
    """Return the residual stream as one group: every axis of the hidden size that no other group runs through.

    Args:
        model: the model.
        body: its anatomy.

    Raises:
        UnsupportedModelError: an attention that is not known may hide axes of the hidden size.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> group = residual_group(model, anatomy(model))
        >>> group.count, sum(member.tensor.endswith("norm.weight") for member in group.members)
        (64, 5)
    """
    bare = next((block for block in body.blocks() if block.others or not block.attentions), None)
    if bare is not None:
        unknown = ", ".join(bare.others) or "no attention with known q, k, v and o"
        raise UnsupportedModelError(
            f"hidden of {body.model} cannot be pruned: {bare.path} holds parts that are not known ({unknown}), through "
            f"which hidden features may run; use ffn or DepthPruning."
        )
    if body.towers:
        raise UnsupportedModelError(
            f"hidden of {body.model} cannot be pruned: {', '.join(body.towers)} reads no tokens, and what it hands on "
            f"has the hidden size; use ffn or DepthPruning."
        )
    others = feed_forward_groups(body) + head_groups(model, body)
    if any(block.experts for block in body.blocks()):
        others += expert_groups(model, body)
    # An axis of theirs may have the hidden size by chance.
    claimed = {(member.tensor, member.axis) for group in others for member in group.members}
    inputs = {f"{layer.path}.{layer.parameter}": layer.input_axis for layer in weight_layers(model)}
    tables = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if body.head is not None:
        tables.add(f"{body.head}.weight")
    index = torch.arange(body.hidden)
    members = [
        Member(name, axis, index, consumes=axis == inputs.get(name) and name not in tables)
        for name, tensor in _parameters(model)
        for axis, size in enumerate(tensor.shape)
        if size == body.hidden and (name, axis) not in claimed and not (name in tables and axis == 0)
    ]
    unsaved = next((member.tensor for member in members if _is_unsaved(model, member.tensor)), None)
    if unsaved is not None:
        raise UnsupportedModelError(
            f"hidden of {body.model} cannot be pruned: {unsaved} is not in any folder but computed anew for the whole "
            f"hidden size; use ffn, heads or DepthPruning."
        )
    networks = {part.path for block in body.blocks() for part in block.feed_forwards if part.path != block.path}
    mixtures = {mixture.path.rpartition(".")[0] for block in body.blocks() for mixture in block.experts}
    return Group(
        "hidden", "", body.hidden, tuple(members), scopes=tuple(sorted(networks | mixtures)), lengths=(body.hidden,)
    )


def _is_unsaved(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a folder of the model leaves this parameter out, as it does with fixed positions."""
    patterns = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return not tensor_of(model, name).requires_grad and any(re.search(pattern, name) for pattern in patterns)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter of each module once: tied ones of different modules all, those of a shared module once."""
    for path, module in model.named_modules():
        yield from module.named_parameters(prefix=path, recurse=False, remove_duplicate=False)


def norm_kind(norm: nn.Module) -> NormKind:
    """Tell what a norm computes by trying it: does a shift of all features change its output, what do zero weights do.

    Example:
        >>> norm_kind(nn.LayerNorm(8)), norm_kind(nn.RMSNorm(8)), norm_kind(nn.Linear(8, 8))
        ('layer', 'rms', 'other')
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.device.type == "meta":
        return "other"
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, len(weight), generator=generator).to(weight.device) + 1
    try:
        plain, scaled, shifted = (_normed(norm, x.to(weight.dtype)) for x in (features, 7 * features, features + 3))
        bare = _normed(norm, features.to(weight.dtype), zero_weight=True)
    except (RuntimeError, TypeError):
        return "other"
    tolerance = 2e-2 * plain.abs().max()
    if (scaled - plain).abs().max() > tolerance:
        return "other"
    if (shifted - plain).abs().max() <= tolerance:
        return "layer"
    return "rms" if bare.abs().max() == 0 else "rms, weight + 1"


@torch.no_grad()
def rescale(norm: nn.Module, factor: float) -> None:
    """Multiply the output of a norm by `factor`, through its weight and bias."""
    weight: torch.Tensor = norm.weight
    if norm_kind(norm) == "rms, weight + 1":
        weight.add_(1).mul_(factor).sub_(1)
        return
    weight.mul_(factor)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, torch.Tensor):
        bias.mul_(factor)


def rescale_norms(model: nn.Module, group: Group, kept: int) -> None:
    """Have each RMSNorm over the channels of `group`, cut to `kept` of them, put out what it did with zeros in it."""
    for norm in norms_of(model, group).values():
        if norm_kind(norm).startswith("rms"):
            rescale(norm, (group.count / kept) ** 0.5)


def norms_of(model: nn.Module, group: Group) -> dict[str, nn.Module]:
    """Return the norms that normalise over the channels of `group`, by path."""
    found = {}
    for member in group.members:
        path, _, name = member.tensor.rpartition(".")
        module = model.get_submodule(path)
        own = dict(module.named_parameters(recurse=False))
        if name == "weight" and tensor_of(model, member.tensor).dim() == 1 and set(own) <= {"weight", "bias"}:
            found[path] = module
    return found


@contextmanager
def normalising_over(model: nn.Module, group: Group, keep: torch.Tensor) -> Iterator[None]:
    """Make each norm over the channels of `group` compute on the masked model what its slice will.

    A LayerNorm takes mean and variance over the channels `keep` only. An RMSNorm that is rescaled afterwards differs by
    its epsilon, which then stands beside a mean square over fewer channels.
    """
    hooks = []
    for norm in norms_of(model, group).values():
        kind = norm_kind(norm)
        if kind == "layer":
            hooks.append(norm.register_forward_hook(_narrow(norm, keep)))
        elif kind != "other":
            hooks.append(norm.register_forward_hook(_with_epsilon(_epsilon(norm), len(keep) / group.count)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrow(norm: nn.Module, keep: torch.Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        index = keep.to(output.device)
        bias = getattr(module, "bias", None)
        part = nn.functional.layer_norm(
            inputs[0].index_select(-1, index),
            (len(index),),
            module.weight.index_select(0, index),
            None if bias is None else bias.index_select(0, index),
            _epsilon(module),
        )
        return torch.zeros_like(output).index_copy_(-1, index, part.to(output.dtype))

    return hook


def _with_epsilon(epsilon: float, share: float) -> Any:
    """Return a hook that has an RMSNorm add `share` of its epsilon."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        energy = inputs[0].float().square().mean(-1, keepdim=True)
        return output * ((energy + epsilon) / (energy + share * epsilon)).sqrt().to(output.dtype)

    return hook


def _epsilon(norm: nn.Module) -> float:
    for name in ("eps", "variance_epsilon", "epsilon"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    return 1e-5


@torch.inference_mode()
def _normed(norm: nn.Module, features: torch.Tensor, *, zero_weight: bool = False) -> torch.Tensor:
    swap = {"weight": torch.zeros_like(norm.weight)} if zero_weight else {}
    out = torch.func.functional_call(norm, swap, (features,))
    bias = getattr(norm, "bias", None)
    return (out - bias if isinstance(bias, torch.Tensor) else out).float()
