"""Magnitude pruning: the smallest weights become zero (Han et al., arXiv 1506.02626; N:M, arXiv 2104.08378)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from ..anatomy.layers import refuse_nonfinite
from ..anatomy.turns import in_turns
from ..compressor import Context
from ..errors import ConfigError
from ..registry import register
from .unstructured import Quota, UnstructuredPruning, chunks, matrices, zero_lowest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("magnitude_pruning")
class MagnitudePruning(UnstructuredPruning):
    """Set the smallest weights to zero (Han et al., arXiv 1506.02626), or all but N of every M (arXiv 2104.08378).

    The zeros are exact and stay in the dense tensors: the model is neither smaller on disk nor faster by them alone.
    They are kept by a `KnowledgeDistillation` that follows.

    Args:
        sparsity: share of the chosen weights that become zero, in (0, 1). With a `pattern` it follows from it.
        pattern: `"N:M"`, such as `"2:4"`, keeps the N largest of every M consecutive inputs; None is unstructured.
        overrides: another sparsity in [0, 1), or another `"N:M"`, for the layers whose names match a shell pattern
            (`{"*.down_proj": 0.3, "*.q_proj": 0}`). The first match decides; 0 leaves the layer alone.
        targets: shell patterns over layer names; None takes every linear, Conv1D and expert weight of the blocks.
        skip: patterns of layers to leave alone.
        scope: `"layer"` prunes each layer to `sparsity`; `"global"` compares the weights of all layers (but for those
            with an override), so that some lose more than others.

    Raises:
        ConfigError: a field is out of range, or M does not divide the inputs of a layer.
        CompressionError: a weight is NaN or infinite.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> model = lc.compress(tiny_model("llama"), lc.MagnitudePruning(pattern="2:4"), progress=False).model
        >>> float((model.model.layers[0].mlp.down_proj.weight == 0).float().mean())
        0.5
    """

    scope: Literal["layer", "global"] = Field("layer", description="compare weights within each layer, or across all")

    @model_validator(mode="after")
    def _local(self) -> MagnitudePruning:
        if self.pattern and self.scope == "global":
            raise ConfigError("MagnitudePruning.scope must be 'layer' with a pattern: N:M fixes the share of each row.")
        return self

    @property
    def in_turns(self) -> bool:
        """Layer by layer, unless the weights of all are compared."""
        return self.scope == "layer"

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Write the zeros in place."""
        quotas, _ = self._quotas(model)
        refuse_nonfinite(quota.layer for quota in quotas)
        compared = [quota.layer.weight for quota in quotas if self._competes(quota)]
        if compared:
            zero_smallest(compared, self.sparsity)
        by_name = {quota.layer.name: quota for quota in quotas}
        for _, own in in_turns(model, [quota.layer for quota in quotas]):
            for quota in (by_name[layer.name] for layer in own):
                if quota.pattern:
                    for matrix in matrices(quota.layer):
                        zero_lowest(matrix, quota)
                elif not self._competes(quota):
                    zero_smallest([quota.layer.weight], quota.sparsity)
        return model

    def _competes(self, quota: Quota) -> bool:
        return self.scope == "global" and not quota.own

    def _zeros(self, quota: Quota) -> int:
        # Without a pattern all experts of a block are compared with each other.
        return super()._zeros(quota) if quota.pattern else round(quota.sparsity * quota.layer.weight.numel())

    def _adds_to_zeros(self, quota: Quota) -> bool:
        return quota.pattern is None and not self._competes(quota)

    def _does(self, quota: Quota) -> str:
        if self._competes(quota):
            return f"its share of the smallest {self.sparsity:.4g} of all weights zero"
        return str(quota)


@torch.no_grad()
def zero_smallest(weights: list[torch.Tensor], sparsity: float) -> None:
    """Zero the `sparsity` share of smallest magnitude over all `weights` together, in place and to the exact count.

    The threshold is found by counting, in two passes over a million weights at a time, so no second copy of the
    weights is made. Of weights that equal the threshold the first ones go.

    Example:
        >>> a, b = torch.tensor([1.0, -5.0]), torch.tensor([0.5, 3.0])
        >>> zero_smallest([a, b], 0.5)
        >>> a.tolist(), b.tolist()
        ([0.0, -5.0], [0.0, 3.0])
    """
    count = round(sparsity * sum(weight.numel() for weight in weights))
    parts = [part for weight in weights for part in chunks(weight.detach())]
    threshold, ties = _smallest(lambda: map(_ordered_bits, parts), count)
    for part in parts:
        bits = _ordered_bits(part)
        drop = bits < threshold
        if ties:
            equal = (bits == threshold).flatten().nonzero().flatten()[:ties]
            drop.view(-1)[equal] = True
            ties -= len(equal)
        part.masked_fill_(drop, 0)


def _ordered_bits(weight: torch.Tensor) -> torch.Tensor:
    # The bits of non-negative IEEE floats, read as integers, have the order of the floats.
    return weight.abs().float().contiguous().view(torch.int32)


def _smallest(bits: Callable[[], Iterable[torch.Tensor]], count: int) -> tuple[int, int]:
    """Return the threshold such that `count` values are below it, and how many equal ones complete the count.

    A radix select: the upper 16 bits first, then the lower 16 of those in the bin that holds the threshold.
    """
    high = sum(torch.bincount((part >> 16).flatten(), minlength=1 << 15) for part in bits())
    upper, left = _bin(high, count)
    low = sum(torch.bincount((part[(part >> 16) == upper] & 0xFFFF).flatten(), minlength=1 << 16) for part in bits())
    lower, ties = _bin(low, left)
    return (upper << 16) | lower, ties


def _bin(histogram: torch.Tensor | int, count: int) -> tuple[int, int]:
    assert isinstance(histogram, torch.Tensor)
    cumulative = histogram.cumsum(0)
    index = min(int(torch.searchsorted(cumulative, count, right=True)), len(cumulative) - 1)
    return index, count - (int(cumulative[index - 1]) if index else 0)
