"""How much each block is pruned: OWL, fewer zeros where there are more outliers (Yin et al., arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from ..anatomy.stacks import find_stacks
from ..anatomy.turns import let_go
from ..calibration import InputNorms, Statistic, observe
from .unstructured import Quota, chunks, matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def owl_quotas(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    quotas: Sequence[Quota],
    sparsity: float,
    m: float,
    spread: float,
    *,
    who: str,
) -> list[Quota]:
    """Return `quotas` with the sparsity of each block moved by its share of outliers, seen in one dense pass.

    Layers with an override keep what it says, and layers in no block keep `sparsity`.

    Args:
        model: the model before any pruning.
        batches: from `calibration_batches`.
        quotas: what the layers are to get so far.
        sparsity: the mean over all weights that are moved, kept exactly.
        m: an outlier's |w| x ||x|| is above this many times the mean of its block.
        spread: how far from `sparsity` a block may be.
        who: the strategy's name, for messages.
    """
    blocks: dict[str, list[Quota]] = {}
    for stack in find_stacks(model):
        for index in range(len(stack)):
            path = stack.block_path(index)
            inside = [q for q in quotas if not q.own and q.layer.path.startswith(f"{path}.")]
            if inside:
                blocks[path] = inside
    layers = [quota.layer for inside in blocks.values() for quota in inside]
    norms = observe(model, batches, layers, InputNorms.of, who=who)
    ratios = [_outlier_ratio(inside, norms, m) for inside in blocks.values()]
    sizes = [sum(quota.layer.weight.numel() for quota in inside) for inside in blocks.values()]
    moved: dict[str, float] = {}
    for inside, share in zip(blocks.values(), shares(ratios, sizes, sparsity, spread), strict=True):
        moved.update({quota.layer.name: share for quota in inside})
    return [replace(quota, sparsity=moved.get(quota.layer.name, quota.sparsity)) for quota in quotas]


def shares(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Return a sparsity for each block: lower where `ratios` is higher, within `sparsity` +- `spread`.

    The mean weighted by `sizes` is exactly `sparsity`, and the block that is furthest from it is `spread` away.

    Example:
        >>> shares([0.00, 0.02, 0.04], [100, 100, 100], sparsity=0.6, spread=0.08)
        [0.68, 0.6, 0.52]
    """
    mean = sum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    furthest = max(abs(ratio - mean) for ratio in ratios)
    if furthest == 0:
        return [sparsity] * len(ratios)
    return [round(sparsity - spread * (ratio - mean) / furthest, 12) for ratio in ratios]


def _outlier_ratio(block: Sequence[Quota], norms: Mapping[str, Sequence[Statistic]], m: float) -> float:
    """Return the share of weights in a block whose |w| x ||x|| is above `m` times the mean of all of them."""

    def scores() -> Iterator[torch.Tensor]:
        for quota in block:
            for matrix, seen in zip(matrices(quota.layer), norms[quota.layer.name], strict=True):
                for rows in chunks(matrix):
                    yield rows.abs().float() * cast(InputNorms, seen).norms()
            let_go(quota.layer.weight)

    size = sum(quota.layer.weight.numel() for quota in block)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in scores()) / size
    return sum(int((part > m * mean).sum()) for part in scores()) / size
