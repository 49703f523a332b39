"""The losses by the names that recipes know: a new one is one function and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .divergences import forward_kl, jsd, mse, reverse_kl, skew_kl, skew_reverse_kl, tvd
from .maps import attention_kl, attention_mse, relation_kl
from .ordered import uld
from .states import cosine_distance, mean_squared_error, relative_error

Reads = Literal["embeddings", "states", "attention", "relations"]


@dataclass(frozen=True)
class FeatureLoss:
    """A loss on what is inside of the models.

    Attributes:
        reads: what it compares: the states that enter the first block, those that leave each block, attention maps, or
            queries, keys and values.
        function: from `(student, teacher, *, mask, count)`; `relations` take `heads` as well.
    """

    reads: Reads
    function: Callable[..., torch.Tensor]


SOFT_LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "mse": mse,
    "uld": uld,
}
"""On logits, from `(student, teacher, *, temperature, mask, count)` and settings of their own."""

FEATURE_LOSSES: Mapping[str, FeatureLoss] = {
    "hidden": FeatureLoss("states", relative_error),
    "hidden_mse": FeatureLoss("states", mean_squared_error),
    "hidden_cosine": FeatureLoss("states", cosine_distance),
    "embeddings": FeatureLoss("embeddings", relative_error),
    "attention": FeatureLoss("attention", attention_kl),
    "attention_mse": FeatureLoss("attention", attention_mse),
    "relations": FeatureLoss("relations", relation_kl),
}
"""On what is inside of the models."""
