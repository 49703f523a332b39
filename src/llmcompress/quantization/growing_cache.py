"""A float key-value cache that writes new tokens behind the old ones instead of copying all of them anew.

transformers' `DynamicCache` joins old and new tokens at every step: each token costs a copy of all that are before it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..errors import ConfigError

# Room for so many tokens more, or for this part of those that are there, if that is more.
_FEWEST, _PART = 64, 4


class GrowingCache(DynamicCache):
    """Keys and values of past tokens as they are, with room behind them: `model.generate(past_key_values=...)`.

    Answers are those of `DynamicCache`, and so is the way in which tokens are joined while gradients are enabled, as
    they are not in `generate`. It holds up to a quarter more memory, or room for 64 tokens. Layers
    with a sliding window, and states that are no keys and values, are kept as `DynamicCache` keeps them. Of an
    encoder-decoder it serves the decoder: `EncoderDecoderCache(GrowingCache(config), DynamicCache(config=config))`.

    Args:
        config: of the model.

    Raises:
        ConfigError: `config` is none.

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llama")
        >>> cache = GrowingCache(model.config)
        >>> out = model.generate(**tiny_inputs(model), past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
        >>> cache.get_seq_length() == out.shape[1] - 1
        True
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"GrowingCache.config must be a model's config, such as model.config, got {config!r:.80}."
            )
        super().__init__(config=config)
        self.layers: list[Any]
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = _GrowingLayer()


class _GrowingLayer(DynamicLayer):
    """Keys and values are views of the beginning of memory that is longer than they are."""

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states (batch, heads, tokens, size); return those of all tokens."""
        if torch.is_grad_enabled():
            # What a backward pass will read, of the queries if of nothing else, must not be written over.
            self._rooms = {}
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        self._rooms = {}
        super().reset()

    def _appended(self, name: str, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # Held is empty and of one dimension at first.
        length = held.shape[-2] if held.dim() > 1 else 0
        if length and not _alike(held, new):
            return torch.cat([held, new], dim=-2)  # as `DynamicCache` does: another dtype is joined, a batch refused
        end = length + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or not _begins(room, held) or end > room.shape[-2] or not _writable(room):
            *outer, _, size = new.shape
            room = self._rooms[name] = new.new_empty((*outer, end + max(_FEWEST, end // _PART), size))
            if length:
                room[..., :length, :] = held
        room[..., length:end, :] = new
        return room[..., :end, :]


def _alike(held: torch.Tensor, new: torch.Tensor) -> bool:
    """Tell whether `new` goes behind `held` as it is: assigned, it would be cast and repeated to fit."""
    same = held.dtype == new.dtype and held.device == new.device and held.shape[-1] == new.shape[-1]
    return same and held.shape[:-2] == new.shape[:-2]


def _begins(room: torch.Tensor, held: torch.Tensor) -> bool:
    """Tell whether `held` is the beginning of `room`: not once tokens, beams or the device were changed elsewhere."""
    same = held.data_ptr() == room.data_ptr() and held.stride() == room.stride() and held.dtype == room.dtype
    return same and held.shape[:-2] == room.shape[:-2] and held.device == room.device


def _writable(room: torch.Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not room.is_inference()
