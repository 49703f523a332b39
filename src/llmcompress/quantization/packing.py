"""Codes of 2 to 8 bits in bytes: a little-endian bit stream for each row, so that no bit is wasted at any width.

Code j of a row takes the bits from j x bits on, lowest bit first. At 4 bits that is two codes a byte, the even one in
the low nibble; at 2 bits four; at 3 bits eight codes fill three bytes.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

_BYTE = 8


def packed_width(columns: int, bits: int) -> int:
    """Return how many bytes a row of `columns` codes takes.

    Example:
        >>> packed_width(64, 4), packed_width(64, 3), packed_width(3, 3)
        (32, 24, 2)
    """
    return (columns * bits + _BYTE - 1) // _BYTE


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row of `codes` (..., columns), uint8 below 2^bits, into bytes (..., packed_width).

    Example:
        >>> pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 4).tolist()  # 0x21, 0x43
        [[33, 67]]
    """
    columns = codes.shape[-1]
    width = packed_width(columns, bits)
    if bits == _BYTE:
        return codes.contiguous()
    if bits in (2, 4):
        share = _BYTE // bits
        filled = F.pad(codes, (0, width * share - columns)).unflatten(-1, (width, share))
        packed = filled[..., 0].clone()
        for position in range(1, share):
            packed |= filled[..., position] << (position * bits)
        return packed
    # Eight codes fill `bits` bytes; a code may lie across the border of two.
    turns = (columns + _BYTE - 1) // _BYTE
    eights = F.pad(codes, (0, turns * _BYTE - columns)).unflatten(-1, (turns, _BYTE))
    packed = codes.new_zeros(*eights.shape[:-1], bits)
    for position in range(_BYTE):
        byte, offset = divmod(position * bits, _BYTE)
        packed[..., byte] |= eights[..., position] << offset
        if offset + bits > _BYTE:
            packed[..., byte + 1] |= eights[..., position] >> (_BYTE - offset)
    return packed.flatten(-2)[..., :width].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the codes (..., columns), uint8, that `pack` made `packed` of.

    Example:
        >>> unpack(torch.tensor([[33, 67]], dtype=torch.uint8), 4, 3).tolist()
        [[1, 2, 3]]
    """
    if bits == _BYTE:
        return packed[..., :columns]
    limit = 2**bits - 1
    if bits in (2, 4) and sys.byteorder == "little":
        # Within a wider whole number each code moves to a byte of its own: a third of the time of stacking them.
        wide = packed.contiguous().to(torch.int16 if bits == 4 else torch.int32)
        if bits == 2:
            wide = (wide << 12).bitwise_or_(wide)
        spread = (wide << (4 if bits == 4 else 6)).bitwise_or_(wide)
        return spread.bitwise_and_(0x0F0F if bits == 4 else 0x03030303).view(torch.uint8)[..., :columns]
    if bits in (2, 4):
        share = _BYTE // bits
        codes = torch.stack([(packed >> (position * bits)) & limit for position in range(share)], dim=-1)
        return codes.flatten(-2)[..., :columns]
    turns = (columns + _BYTE - 1) // _BYTE
    bytes_ = F.pad(packed, (0, turns * bits - packed.shape[-1])).unflatten(-1, (turns, bits))
    codes = packed.new_empty(*bytes_.shape[:-1], _BYTE)
    for position in range(_BYTE):
        byte, offset = divmod(position * bits, _BYTE)
        code = bytes_[..., byte] >> offset
        if offset + bits > _BYTE:
            code = code | (bytes_[..., byte + 1] << (_BYTE - offset))
        codes[..., position] = code & limit
    return codes.flatten(-2)[..., :columns]
