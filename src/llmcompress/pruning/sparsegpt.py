"""SparseGPT: what is left of a row makes up for what went of it (Frantar & Alistarh, arXiv 2301.00774)."""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field

from ..anatomy.layers import WeightLayer
from ..calibration import InputProducts, Statistic
from ..calibration.hessian import inverse_root, remark_on
from ..registry import register
from .calibrated import ALL_ZERO, CalibratedPruning
from .unstructured import Quota, lowest_of_groups, zero_lowest


@register("sparsegpt_pruning")
class SparseGPTPruning(CalibratedPruning):
    """Zero weights and let the others of their row make up for it, by SparseGPT (Frantar & Alistarh, arXiv 2301.00774).

    Each layer's outputs on the calibration texts stay as close as possible to what they were on the same inputs: what
    goes, and what the rest of the row becomes, follows from the sums of x x^T (optimal brain surgeon, column after
    column). Goes block by block, on what the pruned blocks before put out. The zeros are exact and stay in the dense
    tensors: the model is neither smaller on disk nor faster by them alone. They are kept by a `KnowledgeDistillation`
    that follows.

    Args:
        sparsity: share of the chosen weights that become zero, in (0, 1). With a `pattern` it follows from it.
        pattern: `"N:M"`, such as `"2:4"`, keeps the N best of every M consecutive inputs; None is unstructured.
        overrides: another sparsity in [0, 1), or another `"N:M"`, for the layers whose names match a shell pattern
            (`{"*.down_proj": 0.3, "*.q_proj": 0}`). The first match decides; 0 leaves the layer alone.
        targets: shell patterns over layer names; None takes every linear, Conv1D and expert weight of the blocks.
        skip: patterns of layers to leave alone.
        samples: how many texts of the data to calibrate on at most.
        max_length: how many tokens of a text to take at most.
        inputs: `"pruned"` goes block by block, each on what the pruned ones before it put out, as the paper does;
            `"dense"` scores all on the inputs of the whole model, in one pass, with the sums of all layers in memory.
        allocation: `"uniform"` prunes all layers alike; `"owl"` prunes blocks with more outliers less (Yin et al.,
            arXiv 2310.05175), with `sparsity` kept as the mean over all weights.
        owl_m: an outlier scores above this many times the mean of its block.
        owl_lambda: how far from `sparsity` a block may be.
        dampening: share of the mean diagonal that is added to the diagonal of x x^T. Grows tenfold, and says so, as
            often as the matrix has no Cholesky factor.
        mask_block_size: columns whose zeros are chosen together, from what their weights have become by then. The
            paper takes 128.
        block_size: columns after which the rest of a matrix is updated at once: changes the time, not the result.

    Raises:
        ConfigError: a field is out of range, or M does not divide the inputs of a layer.
        MissingInputError: no data or tokenizer, or texts too short.
        CompressionError: a weight or an activation is NaN or infinite; the message names the layer.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("llama")
        >>> step = lc.SparseGPTPruning(sparsity=0.75)
        >>> result = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        >>> float((result.model.model.layers[0].mlp.down_proj.weight == 0).float().mean())
        0.75
    """

    dampening: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the diagonal of x x^T")
    mask_block_size: int = Field(8, ge=1, description="columns whose zeros are chosen together")
    block_size: int = Field(128, ge=1, description="columns after which the rest of a matrix is updated at once")

    def _statistic(self, layer: WeightLayer) -> Statistic:
        return InputProducts.of(layer)

    def _prune(self, matrix: torch.Tensor, statistic: Statistic, quota: Quota) -> str | None:
        products = cast(InputProducts, statistic).products
        if not products.any():
            zero_lowest(matrix, quota)
            return ALL_ZERO
        root, dampening = inverse_root(products, self.dampening, who=type(self).__name__)
        reconstruct(matrix, root, quota, mask_block_size=self.mask_block_size, block_size=self.block_size)
        return remark_on(self.dampening, dampening)


@torch.no_grad()
def reconstruct(
    matrix: torch.Tensor, root: torch.Tensor, quota: Quota, *, mask_block_size: int = 8, block_size: int = 128
) -> None:
    """Zero a share of `matrix` column after column, each error made up for by the columns behind it. In place.

    The zeros of a few columns are chosen when the first of them is reached, from what the weights have become by then:
    N of every M in each row, or the share of all rows together, to the exact count over the whole matrix. In float32.

    Args:
        matrix: of shape (outputs, inputs), any float dtype.
        root: from `calibration.hessian.inverse_root`.
        quota: how many zeros.
        mask_block_size: columns whose zeros are chosen together; with N:M it is M.
        block_size: columns after which the rest of the matrix is updated at once.
    """
    together = mask_block_size if quota.pattern is None else quota.pattern[1]
    step = max(block_size // together, 1) * together
    weight = matrix.float() if matrix.dtype != torch.float32 else matrix.clone()
    # Zeros of an earlier step count first, and stay: what makes up for errors would fill them.
    zeros = matrix == 0
    for start in range(0, weight.shape[1], step):
        end = min(start + step, weight.shape[1])
        block, factor = weight[:, start:end], root[start:end, start:end]
        held = zeros[:, start:end]
        drop = torch.zeros_like(block, dtype=torch.bool)
        errors = torch.empty_like(block)
        for column in range(end - start):
            if column % together == 0:
                chosen = slice(column, column + together)
                cost = (block[:, chosen] / factor.diagonal()[chosen]).square().masked_fill_(held[:, chosen], -1)
                new = lowest_of_groups(cost, quota.pattern) if quota.pattern else _cheapest(cost, quota, start + column)
                drop[:, chosen] = new | held[:, chosen]
            errors[:, column] = torch.where(drop[:, column], block[:, column], 0) / factor[column, column]
            block[:, column:] -= errors[:, column, None] * factor[column, column:]
        block.masked_fill_(drop, 0)
        weight[:, end:] -= errors @ root[start:end, end:]
    matrix.copy_(weight)


def _cheapest(cost: torch.Tensor, quota: Quota, before: int) -> torch.Tensor:
    """Mark the quota's share of `cost` (rows, columns), whatever the row; `before` columns have had theirs."""
    rows, columns = cost.shape
    count = round(quota.sparsity * rows * (before + columns)) - round(quota.sparsity * rows * before)
    drop = torch.zeros(rows * columns, dtype=torch.bool, device=cost.device)
    drop[cost.flatten().topk(count, largest=False, sorted=False).indices] = True
    return drop.view(rows, columns)
