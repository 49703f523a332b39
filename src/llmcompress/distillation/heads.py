"""What the head of a model answers: as distributions, at which positions, and against which labels.

All heads are read as logits (..., classes): one distribution a text, a token, a class of its own (yes or no), or an end
of a span. So one loss serves them all. Only a regression puts out numbers, (..., 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Literal[
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
]
Batch = Mapping[str, torch.Tensor]

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""

LANGUAGE_MODELS: frozenset[Head] = frozenset({"causal_lm", "seq2seq_lm", "masked_lm"})
"""Heads whose classes are the tokens of the vocabulary."""

# Finite, since infinity times a probability of zero is no number; far from float32's end, since temperatures divide it.
_MASKED = -1e9

_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids"})
_BY_LOSS: dict[str, Head] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "masked_lm",
}


def head_of(model: PreTrainedModel) -> Head:
    """Return which kind of head the model has.

    Raises:
        UnsupportedModelError: none of those that can be distilled.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> head_of(tiny_model("bert")), head_of(tiny_model("llama")), head_of(tiny_model("t5"))
        ('classification', 'causal_lm', 'seq2seq_lm')
    """
    config = model.config
    if model.can_generate() and model.get_output_embeddings() is not None:
        return "seq2seq_lm" if config.is_encoder_decoder else "causal_lm"
    head = _BY_LOSS.get(getattr(model, "loss_type", None) or "")
    if head is None or config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"KnowledgeDistillation works on models with a head for classification, regression, token classification, "
            f"question answering, masked, causal or seq2seq language modelling, got {type(model).__name__}; load it "
            f"with AutoModelForSequenceClassification, AutoModelForCausalLM or their like."
        )
    if head == "classification":
        kind = getattr(config, "problem_type", None)
        if kind == "multi_label_classification":
            return "multi_label"
        if kind == "regression" and config.num_labels != 1:
            raise UnsupportedModelError(
                f"KnowledgeDistillation works on regressions of one score, got num_labels={config.num_labels} with "
                f"problem_type='regression' in {type(model).__name__}; train one model a score, or set problem_type to "
                f"'single_label_classification' or 'multi_label_classification' if its outputs are classes."
            )
        if config.num_labels == 1:
            return "regression"
    return head


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """Return what of a batch goes into the model: neither labels nor what counts."""
    return {name: value for name, value in batch.items() if name in _INPUTS}


def logits_of(head: Head, outputs: Any, batch: Batch) -> torch.Tensor:
    """Return the head's distributions as logits (..., classes), in the positions of `counted` and `targets`.

    Example:
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(logits=torch.tensor([[2.0, -1.0, 0.0]]))
        >>> logits_of("multi_label", outputs, {})[0].tolist()
        [[0.0, 2.0], [0.0, -1.0], [0.0, 0.0]]
    """
    if head == "question_answering":
        return within_context(torch.stack([outputs.start_logits, outputs.end_logits], 1).float(), batch)
    logits: torch.Tensor = outputs.logits
    if head == "multi_label":
        # Each class is a yes or no of its own: a logit x is the pair (0, x).
        return torch.stack([torch.zeros_like(logits), logits], -1)
    return logits[:, :-1] if head == "causal_lm" else logits


def within_context(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return a reader's logits (rows, 2, tokens) with no chance left of what is not `counted`: question and padding."""
    return logits.masked_fill(~batch["counted"].bool()[:, None].to(logits.device), _MASKED)


def counted(head: Head, batch: Batch) -> torch.Tensor:
    """Return which positions of `logits_of` the teacher is asked at: a mask of shape (...)."""
    if head == "causal_lm":
        # Position i is asked for token i + 1, so the first token is no target and the last position asks nothing.
        return batch["labels"][:, 1:] != IGNORED
    if head == "seq2seq_lm":
        return batch["labels"] != IGNORED
    if head in {"token_classification", "masked_lm"}:
        return batch["counted"].bool()
    # One answer a text; two ends of a span; of each class yes or no.
    return torch.ones_like(batch["labels"], dtype=torch.bool)


def targets(head: Head, batch: Batch) -> torch.Tensor:
    """Return the labels in the positions of `logits_of`; `IGNORED` (for a regression NaN) where there is none."""
    return batch["labels"][:, 1:] if head == "causal_lm" else batch["labels"]


def labelled(head: Head, batch: Batch) -> torch.Tensor:
    """Return which positions of `logits_of` have a label: a mask of shape (...); none of rows that are `unlabelled`."""
    labels = targets(head, batch)
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORED
    return known & ~batch["unlabelled"].view(-1, *[1] * (known.dim() - 1)) if "unlabelled" in batch else known
