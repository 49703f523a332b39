"""The importances: plain functions that score the channels of groups, each of a few lines.

Those of the weights alone need no data. Those of gradients ask what the loss of the model's own head says; those of
activations ask what comes through a channel, at the input of the matrix that consumes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from ..anatomy.groups import Group, Member, tensor_of
from ..anatomy.layers import WeightLayer, weight_layers
from ..calibration import InputNorms, observe
from .gradients import loss_gradients
from .importance import Evidence, per_channel, register_importance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_importance("magnitude")
def magnitude(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return the L2 norm of all weights of a channel (Fang et al., arXiv 2301.12900).

    Each matrix is scaled by its own norm first, so that the one with the larger weights does not decide alone. Biases
    and norms have no say.
    """

    def energy(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        squares = weight.square()
        return squares / squares.mean().clamp(min=_TINY) if _is_matrix(name, weight) else None

    return [per_channel(model, group, energy).sqrt() for group in groups]


@register_importance("magnitude_l1")
def magnitude_l1(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return the sum of absolute weights of a channel (Li et al., arXiv 1608.08710), each matrix scaled by its mean."""

    def size(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        sizes = weight.abs()
        return sizes / sizes.mean().clamp(min=_TINY) if _is_matrix(name, weight) else None

    return [per_channel(model, group, size) for group in groups]


@register_importance("random")
def random(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return scores drawn with the seed: what any other importance must beat."""
    generator = torch.Generator().manual_seed(evidence.seed)
    shapes = [(group.experts, group.count) if group.experts else (group.count,) for group in groups]
    return [torch.rand(shape, generator=generator, dtype=torch.float32) for shape in shapes]


@register_importance("taylor", data=True)
def taylor(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return by how much the loss moves, to first order, when a channel goes: |sum of weight x gradient|.

    Molchanov et al., arXiv 1906.10771; on language models LLM-Pruner, arXiv 2305.11627. Taken for each text by itself,
    since the gradients of a trained model add up to about zero over all of them, and averaged over what is predicted.
    """
    apart = replace(evidence, batches=evidence.texts)
    return _by_gradient(model, groups, apart, lambda weight, slope: weight * slope, torch.abs)


@register_importance("fisher", data=True)
def fisher(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return the sum of weight^2 x gradient^2 of a channel: the second order, by the Fisher information's diagonal.

    As in arXiv 1801.05787, with the gradients of a batch; averaged over what is predicted.
    """
    return _by_gradient(model, groups, evidence, lambda weight, slope: (weight * slope).square(), lambda sums: sums)


@register_importance("activation", data=True)
def activation(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return the norm of a channel's activations over all tokens, where a matrix consumes them (arXiv 2407.14679).

    Where several matrices consume a channel (hidden features, T5's shared heads) their norms are added; of an expert as
    a whole, those of all inputs of its matrices.
    """
    return _by_inputs(model, groups, evidence, lambda weight, squares: squares, torch.sqrt)


@register_importance("wanda", data=True)
def wanda(model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence) -> list[torch.Tensor]:
    """Return the sum of |weight| x norm of its input over the columns that consume a channel (arXiv 2306.11695)."""
    return _by_inputs(model, groups, evidence, lambda weight, squares: weight.abs().sum(-2) * squares.sqrt(), None)


# Keeps a matrix of zeros from dividing by its own mean.
_TINY = 1e-30
_Both = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_One = Callable[[torch.Tensor], torch.Tensor]


def _is_matrix(name: str, weight: torch.Tensor) -> bool:
    # The biases of experts have two axes.
    return weight.dim() > 1 and not name.endswith("bias")


def _by_gradient(
    model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence, worth: _Both, of_batch: _One
) -> list[torch.Tensor]:
    names = list(dict.fromkeys(member.tensor for group in groups for member in group.members))
    totals = [torch.zeros((), dtype=torch.float32) for _ in groups]
    count = 0
    for gradients, targets in loss_gradients(model, names, evidence):

        def moved(name: str, weight: torch.Tensor, slopes: dict[str, torch.Tensor] = gradients) -> torch.Tensor | None:
            return worth(weight, slopes[name].float()) if name in slopes else None

        totals = [
            total + targets * of_batch(per_channel(model, group, moved))
            for total, group in zip(totals, groups, strict=True)
        ]
        count += targets
    return [total / count for total in totals]


def _by_inputs(
    model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence, worth: _Both, of_sum: _One | None
) -> list[torch.Tensor]:
    """Score by the inputs of the matrices that consume a channel.

    Args:
        model: the model.
        groups: the groups.
        evidence: the batches.
        worth: from a matrix with its inputs last and their summed squares, what each input is worth.
        of_sum: what is done to the sum over the inputs that belong to one channel, for each matrix.
    """
    layers = {f"{layer.path}.{layer.parameter}": layer for layer in weight_layers(model)}
    asked = [[member for member in group.members if _reads(member, group, layers)] for group in groups]
    wanted = {member.tensor: layers[member.tensor] for members in asked for member in members}
    seen = observe(
        model, evidence.inputs, list(wanted.values()), InputNorms.of, who=evidence.who, progress=evidence.progress
    )
    scores = []
    for group, members in zip(groups, asked, strict=True):
        total = torch.zeros(*((group.experts,) if group.experts else ()), group.count, dtype=torch.float32)
        for member in members:
            layer = wanted[member.tensor]
            squares = torch.stack([cast(InputNorms, part).squares for part in seen[layer.name]])
            weight = tensor_of(model, member.tensor).detach().float().movedim(layer.input_axis, -1)
            values = worth(weight.reshape(len(squares), -1, weight.shape[-1]), squares).cpu()
            if group.kind == "experts":
                summed = values.sum(-1)
            else:
                rows = values if member.per_expert else values.sum(0)
                owned = (member.channel >= 0).nonzero().flatten()
                summed = torch.zeros_like(total).index_add_(-1, member.channel[owned], rows[..., owned])
            total += summed if of_sum is None else of_sum(summed)
        scores.append(total)
    return scores


def _reads(member: Member, group: Group, layers: dict[str, WeightLayer]) -> bool:
    """Tell whether the inputs of this matrix tell what its channels do."""
    layer = layers.get(member.tensor)
    if layer is None or layer.kind == "embedding":
        return False
    return layer.kind == "experts" if group.kind == "experts" else member.consumes
