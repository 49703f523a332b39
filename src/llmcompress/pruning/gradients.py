"""The gradients of a model's own loss, one batch at a time, with the model left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..anatomy.groups import tensor_of
from ..calibration.differentiation import differentiable
from ..errors import CompressionError, UnsupportedModelError
from .importance import Evidence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loss_gradients(
    model: PreTrainedModel, names: Sequence[str], evidence: Evidence
) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Yield the gradients of the loss for each batch, and how many targets that loss is a mean over.

    The loss is that of the model's own head, in nats: the next token of language models (of the decoder, where there
    is one); the labels of a classifier's batches, if they hold any; for all else the model's own prediction (its
    likeliest class; for a real number half its square).

    The model runs in eval mode, so without dropout. No `.grad` is written; modes and `requires_grad` are put back, also
    where the caller stops early.

    Args:
        model: the model.
        names: parameters to differentiate by; those that the loss does not depend on are left out of what is yielded,
            as are buffers.
        evidence: the batches.

    Raises:
        UnsupportedModelError: the model has no head.
        CompressionError: there is nothing to predict.

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("gpt2")
        >>> name = "transformer.h.0.mlp.c_fc.weight"
        >>> [(gradients, targets)] = loss_gradients(model, [name], Evidence([tiny_inputs(model)]))
        >>> gradients[name].shape, targets == tiny_inputs(model)["input_ids"][:, 1:].numel()
        (torch.Size([64, 256]), True)
    """
    parameters = {name: tensor_of(model, name) for name in names}
    parameters = {
        name: tensor
        for name, tensor in parameters.items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    }
    predicted = 0
    with differentiable(model, list(parameters.values())):
        for batch in tqdm(evidence.batches, desc=evidence.who, disable=not evidence.progress):
            with torch.enable_grad():
                loss, targets = _loss(model, batch, evidence.who)
                if not targets:
                    continue
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            predicted += targets
            yield {name: slope for name, slope in zip(parameters, found, strict=True) if slope is not None}, targets
    if not predicted:
        raise CompressionError(f"{evidence.who}: texts of one token have nothing to predict; pass longer ones.")


def _loss(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], who: str) -> tuple[torch.Tensor, int]:
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    takes = inspect.signature(model.forward).parameters
    outputs = model(**inputs, **({"use_cache": False} if "use_cache" in takes else {}))
    if model.can_generate() and model.get_output_embeddings() is not None:
        targets = batch["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"][:, 1:]
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        return functional.cross_entropy(logits, targets.flatten()), targets.numel()
    logits = _logits(model, outputs, who)
    if "labels" in batch:
        labels = batch["labels"]
        if labels.is_floating_point():
            return functional.mse_loss(logits[:, 0], labels.to(logits.dtype)) / 2, len(labels)
        return functional.cross_entropy(logits, labels), len(labels)
    if logits.shape[-1] == 1:
        return logits.square().mean() / 2, logits.numel()
    return functional.cross_entropy(logits, logits.argmax(-1)), len(logits)


def _logits(model: PreTrainedModel, outputs: Any, who: str) -> torch.Tensor:
    """Return what the head puts out, shape (predictions, classes)."""
    if (logits := getattr(outputs, "logits", None)) is not None:
        return logits.flatten(0, -2).float()
    if (start := getattr(outputs, "start_logits", None)) is not None:
        return torch.cat([start, outputs.end_logits]).float()
    raise UnsupportedModelError(
        f"{who}: {type(model).__name__} has no head whose loss has gradients; load it with a head "
        f"(AutoModelForCausalLM, AutoModelForSequenceClassification), or use importance='wanda' or 'activation'."
    )
