"""Structured pruning: whole channels go, real shapes change, and the folder loads in plain transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from ..anatomy import Anatomy, FeedForward, anatomy
from ..anatomy.probe import probe_inputs, probe_outputs, relative_error
from ..anatomy.sizes import matches_config, set_sizes, solve_config
from ..anatomy.surgery import keep_channels, retie, ties, zero_channels
from ..compressor import Action, Compressor, Context, Cut
from ..errors import CompressionError, NothingToCompressError, UnsupportedModelError, VerificationError
from ..registry import register
from .importance import channel_magnitude

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sliced and zeroed networks add the same numbers in another order; more than this is a wrong slice.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@register("structured_pruning")
class StructuredPruning(Compressor):
    """Remove the feed-forward channels of smallest group magnitude (Fang et al., DepGraph, arXiv 2301.12900).

    All blocks keep the same width, which is written to the plain config, so that the saved folder loads in plain
    transformers. Before it returns, the step proves itself: the sliced model must give the outputs of the model with
    the same channels zeroed, and have the shapes that its config tells. Which channels stayed is left in
    `context.history`.

    Args:
        ffn: share of the feed-forward channels to remove, in (0, 1); experts each choose their own.
        round_to: the new width is the nearest multiple of this, at least one; kernels like multiples of 8 and more.
            Experts need a multiple of 8 as well.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> pruned = lc.compress(tiny_model("bert"), lc.StructuredPruning(ffn=0.5), progress=False).model
        >>> pruned.config.intermediate_size, pruned.bert.encoder.layer[0].intermediate.dense.out_features
        (64, 64)
    """

    ffn: float = Field(0.5, gt=0, lt=1, description="share of the feed-forward channels to remove")
    round_to: int = Field(8, ge=1, le=1024, description="the new width is a multiple of this")

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each network with its old and new width; refuses here what the config cannot tell."""
        body, sizes = self._sizes(model)
        self._solve(model, body, sizes)
        actions = []
        for network in body.feed_forwards():
            new = sizes[network.width]
            if new == network.width:
                reason = f"width {new} is the nearest multiple of {self._multiple(network)}"
                actions.append(Action(path=network.path, reason=reason))
            else:
                actions.append(Action(path=network.path, does=f"FFN {network.width} -> {new} channels"))
        for block in body.blocks():
            actions += [Action(path=other, reason="no part of a known feed-forward network") for other in block.others]
        return actions

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Cut, write the config, and prove the cut."""
        body, sizes = self._sizes(model)
        chosen = self._solve(model, body, sizes)
        tied = ties(model)
        cuts = []
        for network in body.feed_forwards():
            keep = self._keep(network, sizes[network.width])
            cuts.append((network, keep))
            zero_channels(network, _others(keep, network.width))
        inputs = probe_inputs(model, seed=context.seed)
        masked = probe_outputs(model, inputs)
        for network, keep in cuts:
            keep_channels(network, keep)
            context.history.extend(_cuts(network, keep))
        retie(model, tied)
        set_sizes(model, chosen, sizes, [network.path for network, _ in cuts])
        self._prove(model, masked, probe_outputs(model, inputs))
        return model

    def _sizes(self, model: PreTrainedModel) -> tuple[Anatomy, dict[int, int]]:
        body = anatomy(model)
        networks = body.feed_forwards()
        if not networks:
            raise NothingToCompressError(
                f"StructuredPruning finds no feed-forward network in {type(model).__name__}; its blocks hold: "
                f"{', '.join(body.blocks()[0].others) or 'attentions only'}."
            )
        unknown = next((network for network in networks if network.layout == "unknown"), None)
        if unknown is not None and model.device.type != "meta":
            raise UnsupportedModelError(
                f"StructuredPruning cannot cut {unknown.path} of {type(model).__name__}: a probe did not find which "
                f"rows of its fused gate and up projection form a channel."
            )
        return body, {network.width: self._new_width(network) for network in networks}

    def _multiple(self, network: FeedForward) -> int:
        # torch's grouped product over experts takes rows of whole 16 bytes only: 8 elements in half precision.
        return math.lcm(self.round_to, 8) if network.down.layer.kind == "experts" else self.round_to

    def _new_width(self, network: FeedForward) -> int:
        multiple = self._multiple(network)
        return min(max(round(network.width * (1 - self.ffn) / multiple), 1) * multiple, network.width)

    def _solve(self, model: PreTrainedModel, body: Anatomy, sizes: dict[int, int]) -> dict[str, int]:
        if all(old == new for old, new in sizes.items()):
            raise NothingToCompressError(
                f"StructuredPruning(ffn={self.ffn}, round_to={self.round_to}) leaves every width of "
                f"{type(model).__name__} as it is ({', '.join(map(str, sizes))}); lower round_to or raise ffn."
            )
        wanted = {}
        for network in body.feed_forwards():
            wanted.update(_new_shapes(network, sizes[network.width]))
        return solve_config(model, wanted, sizes, what="FFN width")

    def _keep(self, network: FeedForward, width: int) -> torch.Tensor:
        scores = channel_magnitude(network)
        if not bool(torch.isfinite(scores).all()):
            raise CompressionError(f"the weights of {network.path} hold NaN or infinity; repair the checkpoint first.")
        return scores.topk(width, dim=-1).indices.sort(dim=-1).values.cpu()

    def _prove(self, model: PreTrainedModel, masked: torch.Tensor, sliced: torch.Tensor) -> None:
        error = relative_error(sliced, masked)
        if not error <= _TOLERANCE.get(model.dtype, 1e-4):
            raise VerificationError(
                f"StructuredPruning: the sliced {type(model).__name__} differs from the masked one by {error:.1e} "
                f"(relative); the result is withheld. Please report this model."
            )
        if not matches_config(model):
            raise VerificationError(
                f"StructuredPruning: the pruned {type(model).__name__} has other shapes than its config tells; the "
                f"result is withheld. Please report this model."
            )


def _others(keep: torch.Tensor, width: int) -> torch.Tensor:
    """Return the indices below `width` that are not in `keep`, for each expert where there are several."""
    stay = torch.zeros(*keep.shape[:-1], width, dtype=torch.bool).scatter_(-1, keep, True)
    return (~stay).nonzero()[:, -1].reshape(*keep.shape[:-1], -1)


def _cuts(network: FeedForward, keep: torch.Tensor) -> list[Cut]:
    if keep.dim() == 1:
        return [Cut(network.path, "ffn", tuple(keep.tolist()), network.width)]
    return [Cut(f"{network.path}.{i}", "ffn", tuple(row.tolist()), network.width) for i, row in enumerate(keep)]


def _new_shapes(network: FeedForward, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of `network` will have, by state-dict name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in network.projections():
        layer = part.layer
        experts = layer.kind == "experts"
        outputs = 2 * width if part is network.gate_up else width
        axis = layer.input_axis if part is network.down else (3 if experts else 1) - layer.input_axis
        shape = list(layer.weight.shape)
        shape[axis] = width if part is network.down else outputs
        shapes[layer.name if experts else f"{layer.path}.weight"] = tuple(shape)
        bias = f"{layer.parameter}_bias" if experts else "bias"
        tensor = getattr(layer.module, bias, None)
        if tensor is not None and part is not network.down:
            shapes[f"{layer.path}.{bias}"] = (*tensor.shape[:-1], outputs)
    return shapes
