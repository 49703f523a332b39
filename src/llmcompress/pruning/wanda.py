"""Wanda: weights go by their size times that of their input, row by row (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field

from ..anatomy.layers import WeightLayer
from ..calibration import InputNorms, Statistic
from ..registry import register
from .calibrated import ALL_ZERO, CalibratedPruning
from .unstructured import Quota, zero_lowest


@register("wanda_pruning")
class WandaPruning(CalibratedPruning):
    """Set the weights of least |w| x ||x|| to zero, compared within each output row (Sun et al., arXiv 2306.11695).

    Needs texts, no gradients and no updates: nothing but the zeros changes. All layers are
    scored in one pass of the whole model. The zeros are exact and stay in the dense tensors: the model is
    neither smaller on disk nor faster by them alone. They are kept by a `KnowledgeDistillation` that follows.

    Args:
        sparsity: share of the chosen weights that become zero, in (0, 1). With a `pattern` it follows from it.
        pattern: `"N:M"`, such as `"2:4"`, keeps the N best of every M consecutive inputs; None is unstructured.
        overrides: another sparsity in [0, 1), or another `"N:M"`, for the layers whose names match a shell pattern
            (`{"*.down_proj": 0.3, "*.q_proj": 0}`). The first match decides; 0 leaves the layer alone.
        targets: shell patterns over layer names; None takes every linear, Conv1D and expert weight of the blocks.
        skip: patterns of layers to leave alone.
        samples: how many texts of the data to calibrate on at most.
        max_length: how many tokens of a text to take at most.
        inputs: `"dense"` scores all on the inputs of the whole model, in one pass; `"pruned"` goes block by block, each
            on what the pruned ones before it put out, as the paper does: twice the time, and no better where measured.
        allocation: `"uniform"` prunes all layers alike; `"owl"` prunes blocks with more outliers less (Yin et al.,
            arXiv 2310.05175), with `sparsity` kept as the mean over all weights.
        owl_m: an outlier scores above this many times the mean of its block.
        owl_lambda: how far from `sparsity` a block may be.

    Raises:
        ConfigError: a field is out of range, or M does not divide the inputs of a layer.
        MissingInputError: no data or tokenizer, or texts too short.
        CompressionError: a weight or an activation is NaN or infinite; the message names the layer.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("llama")
        >>> step = lc.WandaPruning(pattern="2:4")
        >>> result = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        >>> float((result.model.model.layers[0].mlp.down_proj.weight == 0).float().mean())
        0.5
    """

    inputs: Literal["pruned", "dense"] = Field("dense", description="calibrate on what pruned blocks put out, or not")

    def _statistic(self, layer: WeightLayer) -> Statistic:
        return InputNorms.of(layer)

    def _prune(self, matrix: torch.Tensor, statistic: Statistic, quota: Quota) -> str | None:
        norms = cast(InputNorms, statistic).norms()
        if not norms.any():
            zero_lowest(matrix, quota)
            return ALL_ZERO
        zero_lowest(matrix, quota, norms)
        return None
