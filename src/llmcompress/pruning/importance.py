"""How much each channel matters: scores that a structural pruner ranks by, higher is dearer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..anatomy.groups import Group, tensor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def group_scores(model: PreTrainedModel, group: Group, importance: str) -> torch.Tensor:
    """Return the L2 norm of each channel: of all its rows and columns together (Fang et al., arXiv 2301.12900).

    Each matrix is scaled by its own norm first, so that the one with the larger weights does not decide alone.

    Returns:
        Shape (count,), or (experts, count).

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.anatomy.coupling import feed_forward_groups
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("mixtral")
        >>> group_scores(model, feed_forward_groups(anatomy(model))[0], "magnitude").shape
        torch.Size([4, 128])
    """
    total = torch.zeros(*((group.experts,) if group.experts else ()), group.count)
    for member in group.members:
        weight = tensor_of(model, member.tensor).detach().float()
        if weight.dim() < 2:
            continue
        reduced = [
            axis for axis in range(weight.dim()) if axis != member.axis and not (member.per_expert and axis == 0)
        ]
        energy = weight.square().sum(reduced) / weight.square().mean()
        owned = (member.channel >= 0).nonzero().flatten()
        total.index_add_(-1, member.channel[owned], energy.cpu()[..., owned])
    return total.sqrt()
