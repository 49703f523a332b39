"""What a model answers, as distributions, and how far the answers of two models are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answers_of(model: PreTrainedModel, outputs: Any) -> torch.Tensor:
    """Return the logits of each distribution that the head of `model` puts out, shape (answers, classes), float32.

    An answer is the next token of a language model, the token at a place of a masked one, the class of a text or a
    token, each label of a multi-label classifier (two classes), the start and the end of a span. Real numbers (a
    regression; the hidden states of a model without a head) come one an answer, shape (numbers, 1).

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("gpt2")
        >>> answers_of(model, model(**tiny_inputs(model))).shape[1] == model.config.vocab_size
        True
    """
    logits = getattr(outputs, "logits", None)
    if logits is not None:
        flat = logits.float().flatten(0, -2)
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            return torch.stack([torch.zeros_like(flat), flat], -1).flatten(0, 1)
        return flat
    start = getattr(outputs, "start_logits", None)
    if start is not None:
        return torch.cat([start, outputs.end_logits]).float()
    return outputs[0].float().reshape(-1, 1)


def log_distributions(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities (answers, classes); real numbers (answers, 1) stay as they are."""
    return logits if logits.shape[-1] == 1 else functional.log_softmax(logits, -1)


def divergence(base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return KL(base || candidate) of each answer in nats, shape (answers,), at least 0.

    Args:
        base: log-probabilities (answers, classes). Real numbers (answers, 1) count as normal distributions of variance
            1, so half their squared difference is returned.
        candidate: of the same shape.

    Example:
        >>> base = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
        >>> divergence(base, torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()).exp().tolist()
        [1.0, 2.0]
    """
    if base.shape[-1] == 1:
        return (base - candidate).square().sum(-1) / 2
    # A class that the base rules out adds nothing: 0 x infinity. Rounding can leave a KL of equals below zero.
    return (base.exp() * (base - candidate)).nansum(-1).clamp(min=0)
