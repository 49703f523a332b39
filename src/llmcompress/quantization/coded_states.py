"""Keys or values of one attention, coded in 2 to 8 bits: affine, packed, appended to, never coded twice.

A number is stored as a code in [0, 2^bits - 1], the numbers of a group share a scale and an offset in 16 bits:
`x ~ offset + code * scale`. A group is a run of tokens of one channel, or a run of channels of one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from .packing import pack, unpack

Along = Literal["channel", "token"]
"""Which numbers share a scale: those of one channel over a run of tokens, or those of one token over its channels."""


class CodedStates:
    """States (batch, heads, tokens, channels) in `bits` bits a number; grows at its end.

    Args:
        bits: 2 to 8.
        along: what shares a scale.
        group_size: tokens a group for `"channel"`; for `"token"` channels a group, or the largest divisor of the
            channels below it.

    Attributes:
        block: tokens that come and go together: 1 for `"token"`.

    Example:
        >>> coded = CodedStates(4, "channel", 32)
        >>> coded.append(torch.randn(1, 2, 64, 16))
        >>> coded.length, coded.nbytes, coded.dequantize().shape
        (64, 1280, torch.Size([1, 2, 64, 16]))
    """

    def __init__(self, bits: int, along: Along, group_size: int) -> None:
        self.bits = bits
        self.along = along
        self.group_size = group_size
        self.block = group_size if along == "channel" else 1
        self._channels = 0
        self._dtype = torch.float32
        self._codes: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._offset: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self._codes is None else int(self._codes.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def append(self, states: torch.Tensor) -> None:
        """Code `states` (batch, heads, tokens, channels), a multiple of `block` tokens, behind those held."""
        self._channels, self._dtype = states.shape[3], states.dtype
        grouped = self._grouped(states.detach().to(torch.float32))
        dim = 3 if self.along == "channel" else 4
        low, high = torch.aminmax(grouped, dim=dim, keepdim=True)
        levels = 2**self.bits - 1
        # 16 bits each, rounded outwards, so that no number is clipped; the codes are chosen for them as stored.
        kind = torch.bfloat16 if states.dtype == torch.bfloat16 else torch.float16
        limits = torch.finfo(kind)
        least = limits.tiny * limits.eps
        offset = (low - low.abs() * limits.eps / 2 - least).clamp(limits.min, limits.max).to(kind)
        step = (high - offset.float()) / levels
        scale = (step * (1 + limits.eps / 2) + least).clamp_max(limits.max).to(kind)
        codes = torch.round((grouped - offset.float()) / scale.float()).clamp_(0, levels).to(torch.uint8)
        new = (pack(codes.flatten(dim - 1, dim), self.bits), scale.squeeze(dim), offset.squeeze(dim))
        held = self._tensors()
        joined = [torch.cat(pair, dim=2) for pair in zip(held, new, strict=True)] if held else new
        self._codes, self._scale, self._offset = joined

    def write(self, out: torch.Tensor) -> None:
        """Write the states that the codes stand for into `out` (batch, heads, `length`, channels)."""
        if self._codes is None or self._scale is None or self._offset is None:
            return
        dim = 3 if self.along == "channel" else 4
        codes = self._grouped(unpack(self._codes, self.bits, self._channels))
        view = self._grouped(out)
        scale, offset = (tensor.unsqueeze(dim).to(out.dtype) for tensor in (self._scale, self._offset))
        # Two passes: addcmul takes five times as long where a scale is spread over the last dimension.
        view.copy_(codes).mul_(scale).add_(offset)

    def dequantize(self) -> torch.Tensor:
        """Return the states that the codes stand for, in the dtype of what was appended."""
        if self._codes is None:
            return torch.empty(0)
        out = torch.empty(*self._codes.shape[:3], self._channels, dtype=self._dtype, device=self._codes.device)
        self.write(out)
        return out

    def drop_first(self, tokens: int) -> None:
        """Forget the oldest `tokens`, a multiple of `block`."""
        if tokens:
            self._keep(slice(tokens, None), slice(tokens // self.block, None))

    def drop_last(self, tokens: int) -> None:
        """Forget the newest `tokens`, a multiple of `block`."""
        if tokens:
            left = self.length - tokens
            self._keep(slice(0, left), slice(0, left // self.block))

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `function(tensor)` in the place of each tensor held; all have the batch first."""
        if self._codes is not None:
            self._codes, self._scale, self._offset = (function(tensor) for tensor in self._tensors())

    def clear(self) -> None:
        """Forget all."""
        self._codes = self._scale = self._offset = None

    def _keep(self, tokens: slice, groups: slice) -> None:
        if self._codes is None or self._scale is None or self._offset is None:
            return
        # Cloned: a view would keep the whole in memory.
        self._codes = self._codes[:, :, tokens].clone()
        self._scale, self._offset = self._scale[:, :, groups].clone(), self._offset[:, :, groups].clone()
        if not self.length:
            self.clear()

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self._codes, self._scale, self._offset) if tensor is not None]

    def _grouped(self, states: torch.Tensor) -> torch.Tensor:
        """View (batch, heads, tokens, channels) with the groups as a dimension of their own."""
        if self.along == "channel":
            return states.unflatten(2, (-1, self.group_size))
        channels = states.shape[3]
        size = next(size for size in range(min(self.group_size, channels), 0, -1) if channels % size == 0)
        return states.unflatten(3, (-1, size))
