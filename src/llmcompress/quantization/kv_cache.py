"""A key-value cache in 2 to 8 bits for `model.generate(past_key_values=...)`, built on transformers' own classes.

transformers' `QuantizedCache` needs packages for its arithmetic, codes the whole cache anew whenever its window of
recent tokens is full, errors upon errors, and takes no model with sliding windows. Here every token is coded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..compressor import Action
from ..errors import CompressionError, ConfigError, NothingToCompressError, UnsupportedModelError
from .coded_states import Along, CodedStates

# While an assistant drafts tokens, which may be taken back, so many more stay in float than otherwise.
_DRAFT = 64


class QuantizedCache(DynamicCache):
    """Keys and values of past tokens in few bits; the newest tokens stay as they are.

    Keys share a scale by channel, over `group_size` tokens, since a few channels of them are large throughout; values
    by token, over its channels (KIVI, arXiv 2402.02750). A token is coded once, when `residual_length` tokens and a
    whole group have come after the last coded one. Until then, and within the prompt's own pass, nothing is rounded:
    answers of up to `residual_length` tokens, prompt included, equal those of the float cache bit by bit.

    Layers with a sliding window forget what left it, in whole groups. Windows no longer than `residual_length`, and
    states that are no keys and values (convolutions, linear attention), stay in float; `plan` tells them.

    Beams, left padding, assisted generation (tokens taken back), and reuse over several calls work as with
    `DynamicCache`. Where a layer attends, its own keys and values are expanded for the time of that layer.

    Args:
        config: of the model. Encoder-decoders need two caches: see `for_encoder_decoder`.
        bits: 2 to 8 bits a number; a pair names keys and values apart, `(4, 2)`.
        group_size: numbers that share a scale and an offset of 16 bits each; at most the head's size for values.
        residual_length: how many of the newest tokens stay in float at least.
        keys: what shares a scale in keys, `"channel"` or `"token"`.
        values: what shares a scale in values.

    Raises:
        ConfigError: an argument is out of range, or `config` is none.
        UnsupportedModelError: `config` is of an encoder-decoder.
        NothingToCompressError: the model keeps no keys and values that could be coded.

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llama")
        >>> cache = QuantizedCache(model.config, bits=4, group_size=8, residual_length=8)
        >>> inputs = tiny_inputs(model)
        >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20)
        >>> cache.get_seq_length() == out.shape[1] - 1, cache.nbytes > 0
        (True, True)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        bits: int | tuple[int, int] = 4,
        group_size: int = 64,
        residual_length: int = 128,
        keys: Along = "channel",
        values: Along = "token",
    ) -> None:
        _refuse_other(config)
        if config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"QuantizedCache holds one attention a layer, and {config.model_type} has two: its own and one to the "
                f"encoder; use QuantizedCache.for_encoder_decoder(config)."
            )
        self._make(config, bits, group_size, residual_length, keys, values)

    @classmethod
    def for_encoder_decoder(
        cls,
        config: PreTrainedConfig,
        *,
        bits: int | tuple[int, int] = 4,
        group_size: int = 64,
        residual_length: int = 128,
        keys: Along = "channel",
        values: Along = "token",
    ) -> EncoderDecoderCache:
        """Return a cache for a model such as T5: quantized for the decoder's own tokens, and for the encoder's.

        The arguments are those of the class.

        Example:
            >>> from llmcompress.testing import tiny_model
            >>> len(QuantizedCache.for_encoder_decoder(tiny_model("t5").config))
            2
        """
        _refuse_other(config)
        own, encoders = cls.__new__(cls), cls.__new__(cls)
        for cache in (own, encoders):
            cache._make(config, bits, group_size, residual_length, keys, values)
        return EncoderDecoderCache(own, encoders)

    def plan(self) -> list[Action]:
        """Tell layer by layer how keys and values are held, and why some stay in float."""
        return list(self._plan)

    @property
    def nbytes(self) -> int:
        """Bytes held now: codes, scales, offsets, the newest tokens, and all of the layers that stay in float."""
        return sum(layer.nbytes if isinstance(layer, _Coded) else _float_bytes(layer) for layer in self.layers)

    def _make(
        self,
        config: PreTrainedConfig,
        bits: int | tuple[int, int],
        group_size: int,
        residual_length: int,
        keys: Along,
        values: Along,
    ) -> None:
        key_bits, value_bits = bits if isinstance(bits, tuple) and len(bits) == 2 else (bits, bits)
        for given in (key_bits, value_bits):
            if type(given) is not int or given not in range(2, 9):
                raise ConfigError(f"QuantizedCache.bits must be in [2, 8], or a pair of such, got {bits!r}.")
        for name, number, least in (("group_size", group_size, 2), ("residual_length", residual_length, 0)):
            if not isinstance(number, int) or number < least:
                raise ConfigError(f"QuantizedCache.{name} must be a whole number of at least {least}, got {number!r}.")
        for name, along in (("keys", keys), ("values", values)):
            if along not in ("channel", "token"):
                raise ConfigError(f"QuantizedCache.{name} must be 'channel' or 'token', got {along!r}.")
        # transformers knows which layer of which model keeps what; ours take the place of the plain ones.
        super().__init__(config=config)
        self._plan: list[Action] = []
        for index, layer in enumerate(self.layers):
            reason = _why_float(layer, residual_length, group_size)
            if reason is None:
                states = (CodedStates(key_bits, keys, group_size), CodedStates(value_bits, values, group_size))
                self.layers[index] = _coded_layer(layer, states, residual_length)
            does = f"keys int{key_bits} by {keys}, values int{value_bits} by {values}" if reason is None else None
            self._plan.append(Action(path=f"layers.{index}", does=does, reason=reason))
        if not any(action.touched for action in self._plan):
            why = "; ".join(f"{action.path}: {action.reason}" for action in self._plan[:3])
            raise NothingToCompressError(f"QuantizedCache can code no layer of {config.model_type}. {why}")


def _refuse_other(config: Any) -> None:
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"QuantizedCache.config must be a model's config, such as model.config, got {config!r:.80}.")


class _Coded:
    """What is the same in both kinds of layers: tokens arrive in float, and the oldest move into the codes.

    Attributes:
        residual_length: least number of tokens that stay in float.
        record_past: whether tokens may yet be taken back by `crop`.
    """

    is_croppable = True
    sliding_window: int | None = None
    is_initialized: bool
    device: torch.device

    def _set_up(self, states: tuple[CodedStates, CodedStates], residual_length: int) -> None:
        self.residual_length = residual_length
        self.record_past = False
        self.cumulative_length = 0
        self._states = states
        self._block = max(coded.block for coded in states)
        self._recent: list[torch.Tensor] | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, expanded; what model code reads that looks past `update`."""
        return self._whole(0)

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._replace(0, states)

    @property
    def values(self) -> torch.Tensor | None:
        """All values, expanded."""
        return self._whole(1)

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._replace(1, states)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the tokens that are still in float."""
        recent = sum(tensor.numel() * tensor.element_size() for tensor in self._recent or ())
        return recent + sum(coded.nbytes for coded in self._states)

    def activate_past_recording(self) -> None:
        """Hold back what may be taken back by `crop`."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        self._recent = [states[:, :, :0].detach().clone() for states in (key_states, value_states)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens, and return all that the layer attends to, the new ones exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        visible = key_states.shape[-2] + self._reach()
        self.cumulative_length += key_states.shape[-2]
        assert self._recent is not None
        answers = []
        for which, new in enumerate((key_states, value_states)):
            coded, recent = self._states[which], self._recent[which]
            answers.append(_joined(coded, recent, new)[:, :, -visible:])
            self._recent[which] = torch.cat((recent, new), dim=2) if recent.shape[2] else new
        self._settle(copied=self._recent[0] is not key_states)
        return answers[0], answers[1]

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens: `-n` takes n back; a positive number is the length to keep."""
        if not self.is_initialized or self._recent is None:
            return
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(self.cumulative_length - tokens_to_remove, 0)
        left = self.cumulative_length - gone
        needed = left if self.sliding_window is None else min(left, self.sliding_window - 1)
        if left < 0 or self._held() - gone < needed:
            raise CompressionError(
                f"QuantizedCache.crop must take back tokens that the window still holds, got {gone} of "
                f"{self.cumulative_length}; call activate_past_recording() before they are generated."
            )
        if gone > self._recent[0].shape[2]:
            # What was coded comes back as its codes stand for.
            self._uncode(gone - self._recent[0].shape[2])
        self._recent = [recent[:, :, : recent.shape[2] - gone] for recent in self._recent]
        self.cumulative_length = left
        self._settle(copied=False, cropped=True)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget all tokens."""
        self._replace(0, None)
        self.is_initialized = False
        self.cumulative_length = 0

    def _settle(self, *, copied: bool, cropped: bool = False) -> None:
        """Forget what left the window, and code the tokens that are no longer among the newest."""
        assert self._recent is not None
        start = 0
        if self.sliding_window is not None and (cropped or not self.record_past):
            surplus = max(self._held() - (self.sliding_window - 1), 0)
            forgotten = min(surplus // self._block * self._block, self._states[0].length)
            for coded in self._states:
                coded.drop_first(forgotten)
            # Tokens in float go one by one, once no coded ones are before them.
            start = 0 if self._states[0].length else surplus - forgotten
        spare = self.residual_length + (_DRAFT if self.record_past and not cropped else 0)
        ready = max(self._recent[0].shape[2] - start - spare, 0) // self._block * self._block
        for which, coded in enumerate(self._states):
            recent = self._recent[which]
            if ready:
                coded.append(recent[:, :, start : start + ready])
            if start or ready or not copied:
                # Cloned: a view would keep the whole in memory.
                self._recent[which] = recent[:, :, start + ready :].clone()

    def _uncode(self, tokens: int) -> None:
        """Turn at least the newest `tokens` of the coded ones back into float."""
        assert self._recent is not None
        tokens = math.ceil(tokens / self._block) * self._block
        for which, coded in enumerate(self._states):
            back = coded.dequantize()[:, :, coded.length - tokens :]
            self._recent[which] = torch.cat((back, self._recent[which]), dim=2)
            coded.drop_last(tokens)

    def _held(self) -> int:
        return self._states[0].length + (0 if self._recent is None else int(self._recent[0].shape[2]))

    def _reach(self) -> int:
        """How many of the tokens held a new one attends to."""
        return self._held() if self.sliding_window is None else min(self._held(), self.sliding_window - 1)

    def _whole(self, which: int) -> torch.Tensor | None:
        if self._recent is None:
            return None
        whole = _joined(self._states[which], self._recent[which])
        return whole[:, :, whole.shape[2] - self._reach() :]

    def _replace(self, which: int, states: torch.Tensor | None) -> None:
        if states is None:
            for coded in self._states:
                coded.clear()
            self._recent = None
        elif self._recent is not None:
            self._states[which].clear()
            self._recent[which] = states
            self.cumulative_length = states.shape[2]

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._recent is not None:
            self._recent = [function(recent) for recent in self._recent]
            for coded in self._states:
                coded.apply(function)


class QuantizedLayer(_Coded, DynamicLayer):
    """A layer that attends to all tokens; see `QuantizedCache`."""

    def __init__(self, states: tuple[CodedStates, CodedStates], residual_length: int) -> None:
        self._set_up(states, residual_length)
        DynamicLayer.__init__(self)


class QuantizedSlidingWindowLayer(_Coded, DynamicSlidingWindowLayer):
    """A layer that attends to the last `sliding_window` tokens; see `QuantizedCache`."""

    def __init__(self, sliding_window: int, states: tuple[CodedStates, CodedStates], residual_length: int) -> None:
        self._set_up(states, residual_length)
        DynamicSlidingWindowLayer.__init__(self, sliding_window)


def _joined(coded: CodedStates, *recent: torch.Tensor) -> torch.Tensor:
    """Return the coded states expanded and the others behind them, in one new tensor."""
    if not coded.length:
        parts = [tensor for tensor in recent if tensor.shape[2]]
        return parts[0] if len(parts) == 1 else torch.cat(recent, dim=2)
    batch, heads, _, channels = recent[-1].shape
    tokens = coded.length + sum(tensor.shape[2] for tensor in recent)
    whole = recent[-1].new_empty(batch, heads, tokens, channels)
    coded.write(whole[:, :, : coded.length])
    at = coded.length
    for tensor in recent:
        whole[:, :, at : at + tensor.shape[2]] = tensor
        at += tensor.shape[2]
    return whole


def _coded_layer(layer: Any, states: tuple[CodedStates, CodedStates], residual_length: int) -> Any:
    if type(layer) is DynamicLayer:
        return QuantizedLayer(states, residual_length)
    return QuantizedSlidingWindowLayer(layer.sliding_window, states, residual_length)


def _why_float(layer: Any, residual_length: int, group_size: int) -> str | None:
    """Say why a layer of transformers' cannot be coded, or None."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is not DynamicSlidingWindowLayer:
        return f"{type(layer).__name__} holds other states than keys and values alone"
    if layer.sliding_window - 1 < residual_length + group_size:
        return (
            f"its window of {layer.sliding_window} tokens is no longer than the newest tokens, which stay in float "
            f"({residual_length}, and a group of {group_size})"
        )
    return None


def _float_bytes(layer: Any) -> int:
    held: list[Any] = []
    for value in vars(layer).values():
        held += value.values() if isinstance(value, dict) else [value]
    states = [tensor for tensor in held if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
    return sum(tensor.numel() * tensor.element_size() for tensor in states)
