"""Small inputs for any text model, and what comes out of them: the basis of every self-test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def probe_inputs(model: PreTrainedModel, *, rows: int = 2, tokens: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random token ids of shape (rows, tokens) that `model` accepts, with the decoder's for an encoder-decoder.

    Special tokens, where the config names them, are left out (a padding id in the middle would hide positions), but
    for the end-of-sequence token in the last place, where some classifiers look for it.

    Raises:
        UnsupportedModelError: the model does not read token ids.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "vocab_size"):
        raise UnsupportedModelError(f"{type(model).__name__} reads no token ids; only text models can be probed.")
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")]
    special = {token for entry in named for token in (entry if isinstance(entry, list) else [entry])}
    allowed = torch.tensor([index for index in range(min(config.vocab_size, 1024)) if index not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = allowed[torch.randint(len(allowed), (rows, tokens), generator=generator)].to(model.device)
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < config.vocab_size and tokens > 1:
        ids[:, -1] = eos
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs


@torch.inference_mode()
def probe_outputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits (or the last hidden states of a model without a head) in eval mode, as float32."""
    training = model.training
    model.eval()
    try:
        outputs = model(**inputs)
    finally:
        model.train(training)
    logits = getattr(outputs, "logits", None)
    return (outputs[0] if logits is None else logits).float()


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `reference` (its spread, so that a constant does not hide it).

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    spread = (reference - reference.mean()).norm().clamp(min=1e-12)
    return float((candidate - reference).norm() / spread)
