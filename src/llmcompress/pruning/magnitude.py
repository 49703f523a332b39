"""Magnitude pruning: the smallest weights become zero (Han et al., arXiv 1506.02626; N:M, arXiv 2104.08378)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from ..anatomy.layers import WeightLayer, select
from ..compressor import Action, Compressor, Context
from ..errors import CompressionError, ConfigError
from ..registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("magnitude_pruning")
class MagnitudePruning(Compressor):
    """Set the smallest weights to zero (Han et al., arXiv 1506.02626), or all but N of every M (arXiv 2104.08378).

    The zeros are exact and stay in the dense tensors: the model is neither smaller on disk nor faster by them alone.
    They are kept by a `KnowledgeDistillation` that follows.

    Args:
        sparsity: share of the chosen weights that become zero, in (0, 1). With a `pattern` it follows from it.
        scope: `"layer"` prunes each layer to `sparsity`; `"global"` compares the weights of all layers, so that some
            lose more than others.
        pattern: `"2:4"` or `"4:8"` keeps the 2 (4) largest of every 4 (8) consecutive inputs; None is unstructured.
        targets: shell patterns over layer names; None takes every linear, Conv1D and expert weight of the blocks.
        skip: patterns of layers to leave alone.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> model = lc.compress(tiny_model("llama"), lc.MagnitudePruning(pattern="2:4"), progress=False).model
        >>> float((model.model.layers[0].mlp.down_proj.weight == 0).float().mean())
        0.5
    """

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the chosen weights that become zero")
    scope: Literal["layer", "global"] = Field("layer", description="compare weights within each layer, or across all")
    pattern: Literal["2:4", "4:8"] | None = Field(None, description="keep N of every M consecutive inputs")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layer names to prune; None: all in blocks")
    skip: tuple[str, ...] = Field((), description="patterns of layer names to leave alone")

    @model_validator(mode="after")
    def _agree(self) -> MagnitudePruning:
        if self.pattern and self.scope == "global":
            raise ConfigError("MagnitudePruning.scope must be 'layer' with a pattern: N:M fixes the share of each row.")
        if self.pattern and self.sparsity != _pattern_sparsity(self.pattern):
            raise ConfigError(
                f"MagnitudePruning.sparsity must be {_pattern_sparsity(self.pattern)} (or left out) with "
                f"pattern={self.pattern!r}, got {self.sparsity}."
            )
        return self

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name the layers that get zeros, and those that do not."""
        layers, left = self._select(model)
        does = f"{self.pattern} zeros" if self.pattern else f"{self.sparsity:.0%} zeros ({self.scope})"
        remark = Action(path="", reason="zeros in dense tensors: no smaller on disk and no faster by this step alone")
        return [Action(path=layer.name, does=does) for layer in layers] + left + [remark]

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Write the zeros in place."""
        layers, _ = self._select(model)
        for layer in layers:
            if not bool(torch.isfinite(layer.weight).all()):
                raise CompressionError(
                    f"the weights of {layer.name} hold NaN or infinity; repair the checkpoint first."
                )
        if self.pattern:
            n, m = map(int, self.pattern.split(":"))
            for layer in layers:
                keep_n_of_m(layer.weight, n, m, axis=layer.input_axis)
        elif self.scope == "global":
            zero_smallest([layer.weight for layer in layers], self.sparsity)
        else:
            for layer in layers:
                zero_smallest([layer.weight], self.sparsity)
        return model

    def _select(self, model: PreTrainedModel) -> tuple[list[WeightLayer], list[Action]]:
        layers, left = select(model, who="MagnitudePruning", targets=self.targets, skip=self.skip)
        if self.pattern:
            m = int(self.pattern.split(":")[1])
            for layer in layers:
                inputs = layer.weight.shape[layer.input_axis]
                if inputs % m:
                    raise ConfigError(
                        f"MagnitudePruning.pattern={self.pattern!r} must divide the inputs of every layer, and "
                        f"{layer.name} has {inputs}; leave it out with skip=({layer.name!r},)."
                    )
        return layers, left


@torch.no_grad()
def keep_n_of_m(weight: torch.Tensor, n: int, m: int, *, axis: int) -> None:
    """Zero all but the `n` largest of every `m` consecutive entries along `axis`, in place.

    Example:
        >>> weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
        >>> keep_n_of_m(weight, 2, 4, axis=1)
        >>> weight.tolist()
        [[0.0, -4.0, 3.0, 0.0]]
    """
    groups = weight.movedim(axis, -1)
    shape = groups.shape
    magnitude = groups.abs().reshape(*shape[:-1], shape[-1] // m, m)
    smallest = magnitude.topk(m - n, dim=-1, largest=False).indices
    drop = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, smallest, True)
    weight.masked_fill_(drop.reshape(shape).movedim(-1, axis), 0)


@torch.no_grad()
def zero_smallest(weights: list[torch.Tensor], sparsity: float) -> None:
    """Zero the `sparsity` share of smallest magnitude over all `weights` together, in place and to the exact count.

    The threshold is found by counting, in two passes over one layer at a time, so no second copy of the weights is
    made. Of weights that equal the threshold the first ones go.

    Example:
        >>> a, b = torch.tensor([1.0, -5.0]), torch.tensor([0.5, 3.0])
        >>> zero_smallest([a, b], 0.5)
        >>> a.tolist(), b.tolist()
        ([0.0, -5.0], [0.0, 3.0])
    """
    count = round(sparsity * sum(weight.numel() for weight in weights))
    threshold, ties = _smallest(lambda: (_ordered_bits(weight) for weight in weights), count)
    for weight in weights:
        bits = _ordered_bits(weight)
        drop = bits < threshold
        if ties:
            equal = (bits == threshold).flatten().nonzero().flatten()[:ties]
            drop.view(-1)[equal] = True
            ties -= len(equal)
        weight.masked_fill_(drop, 0)


def _ordered_bits(weight: torch.Tensor) -> torch.Tensor:
    # The bits of non-negative IEEE floats, read as integers, have the order of the floats.
    return weight.detach().abs().float().contiguous().view(torch.int32)


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


def _pattern_sparsity(pattern: str) -> float:
    n, m = map(int, pattern.split(":"))
    return 1 - n / m
