"""Small inputs for any text or image model, and what comes out of them: the basis of every self-test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import CompressionError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Side of an image where the model takes any: enough for five halvings, the most that is usual.
_IMAGE = 64


def probe_inputs(model: PreTrainedModel, *, rows: int = 2, tokens: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random token ids of shape (rows, tokens) that `model` accepts, with the decoder's for an encoder-decoder.

    Special tokens, where the config names them, are left out (a padding id in the middle would hide positions), but
    for the end-of-sequence token in the last place, where some classifiers look for it. A model that reads images gets
    random pixels, shape (rows, channels, height, width), of the size that its config names, or 64 x 64.

    Raises:
        UnsupportedModelError: the model reads neither token ids nor pixels.
    """
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _pixels(model, rows, seed)}
    config = model.config.get_text_config()
    if model.main_input_name != "input_ids" or not hasattr(config, "vocab_size"):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {model.main_input_name}; only models of text or images can be probed."
        )
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


def _pixels(model: PreTrainedModel, rows: int, seed: int) -> torch.Tensor:
    size = getattr(model.config, "image_size", None) or _IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(model.config, "num_channels", None) or 3
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, channels, height, width, generator=generator)
    return pixels.to(device=model.device, dtype=model.dtype)


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


def refuse_nonfinite_outputs(model: PreTrainedModel, outputs: torch.Tensor) -> None:
    """Refuse outputs of a whole model with which those of a cut one cannot be compared.

    Raises:
        CompressionError: they hold NaN or infinity.
    """
    if not torch.isfinite(outputs).all():
        raise CompressionError(
            f"the outputs of {type(model).__name__} hold NaN or infinity; repair the checkpoint first, or load it in "
            f"float32 if it is in {str(model.dtype).removeprefix('torch.')}, which may overflow."
        )


def call_order(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Return those of the modules at `paths` that run in a forward pass, in the order of their first call.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> call_order(tiny_model("bert"), ["classifier", "bert.pooler"])
        ['bert.pooler', 'classifier']
    """
    called: list[str] = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, inputs, path=path: called.append(path))
        for path in paths
    ]
    try:
        probe_outputs(model, probe_inputs(model, rows=1, tokens=2))
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `reference` (its spread, so that a constant does not hide it).

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    spread = (reference - reference.mean()).norm().clamp(min=1e-12)
    return float((candidate - reference).norm() / spread)
