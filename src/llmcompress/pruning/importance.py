"""How much each structure matters: scores that a structural pruner ranks by, higher is dearer."""

from __future__ import annotations

import torch

from ..anatomy.parts import FeedForward
from ..anatomy.surgery import fused_rows


@torch.no_grad()
def channel_magnitude(feed_forward: FeedForward) -> torch.Tensor:
    """Return the L2 norm of each channel's group: its rows of up and gate, with biases, and its column of down.

    The group is what goes and stays together (Fang et al., DepGraph, arXiv 2301.12900); each matrix is scaled by its
    own norm first, so that the one with the larger weights does not decide alone.

    Returns:
        Shape (width,), or (experts, width).

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.testing import tiny_model
        >>> channel_magnitude(anatomy(tiny_model("mixtral")).feed_forwards()[0]).shape
        torch.Size([4, 128])
    """
    total: torch.Tensor | None = None
    for part in feed_forward.projections():
        layer = part.layer
        weight = layer.weight.detach().float()
        axis = (
            layer.input_axis if part is feed_forward.down else (1 if layer.kind != "experts" else 3) - layer.input_axis
        )
        reduced = [other for other in range(weight.dim()) if other != axis and (layer.kind != "experts" or other != 0)]
        energy = weight.square().sum(reduced) / weight.square().mean()
        if part is feed_forward.gate_up:
            rows = fused_rows(feed_forward, torch.arange(feed_forward.width)[:, None])
            energy = energy[..., rows.to(energy.device)].sum(-1)
        total = energy if total is None else total + energy
    assert total is not None
    return total.sqrt()
