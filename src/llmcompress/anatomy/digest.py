"""What a model is, in one number: a hash over its config and all weights; and a tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Where a model was read from is no part of what it is.
_NO_CONTENT = ("_name_or_path", "transformers_version")


def model_digest(model: PreTrainedModel) -> str:
    """Return the SHA-256 of the config and every weight of the model, 64 hexadecimal digits.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model_digest(tiny_model("bert")) == model_digest(tiny_model("bert"))
        True
        >>> model_digest(tiny_model("bert")) == model_digest(tiny_model("bert", seed=1))
        False
    """
    digest = hashlib.sha256(config_content(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_content(config: PreTrainedConfig) -> str:
    """Return all that a config tells of a model, as JSON with sorted keys; not where the model came from."""
    content = json.loads(config.to_json_string(use_diff=False))
    return json.dumps({key: value for key, value in content.items() if key not in _NO_CONTENT}, sort_keys=True)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all that makes tokens of a text, 64 hexadecimal digits; how it was called last is no part.

    Example:
        >>> from llmcompress.testing import tiny_tokenizer
        >>> tokenizer, before = tiny_tokenizer(), tokenizer_digest(tiny_tokenizer())
        >>> _ = tokenizer(["a text", "text"], truncation=True, max_length=2, padding=True)
        >>> tokenizer_digest(tokenizer) == before
        True
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # These two change with every call of the tokenizer.
    told = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    known = [type(tokenizer).__name__, special, tokenizer.model_max_length, told]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
