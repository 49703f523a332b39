"""The int8 product in C++: codes activations on the way, and multiplies them by a weight that was packed for it."""

from __future__ import annotations

import weakref
from typing import cast

import torch

from .int8 import Activations, Stored, activation_bits
from .native import Native, ProductStep, expect

_GRAINS = {"tensor": 0, "token": 1}
_STORED = 2
# 255 * 127 times as many are whole numbers of 32 bits.
_MOST_INPUTS = 65536


def multiplies(weight: torch.Tensor) -> bool:
    """Tell whether the product serves for codes like `weight` (out, in): on the CPU, not empty, sums in 32 bits."""
    outputs, inputs = weight.shape
    return weight.is_cpu and 0 < inputs <= _MOST_INPUTS and outputs > 0


class Int8Weight:
    """An int8 weight as the product reads it.

    Args:
        codes: int8 (out, in), which `multiplies`.
        scale: float32 (out,).
        bias: (out,) or None.
        kernels: what computes.

    Attributes:
        nbytes: of memory.

    Raises:
        RuntimeError: a tensor has another shape, or is not on the CPU.
        MemoryError: there is too little of it.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, kernels: Native) -> None:
        codes, scale = codes.detach().contiguous(), scale.detach().float().contiguous()
        added = None if bias is None else bias.detach().float().contiguous()
        expect("the codes of an int8 layer", codes, tuple(codes.shape), torch.int8)
        expect("the scales of an int8 layer", scale, (len(codes),), torch.float32)
        if added is not None:
            expect("the bias of an int8 layer", added, (len(codes),), torch.float32)
        pointers = codes.data_ptr(), scale.data_ptr(), None if added is None else added.data_ptr()
        library, self._table = kernels.functions, kernels.table
        self._outputs, self._inputs = codes.shape
        self._handle = library.llmc_int8_pack(
            self._table, *pointers, self._outputs, self._inputs, torch.get_num_threads()
        )
        if not self._handle:
            raise MemoryError(f"no memory for the packed copy of an int8 weight of {self._outputs} x {self._inputs}")
        freed = weakref.finalize(self, library.llmc_int8_free, self._handle)
        # A thread may still multiply by it when the interpreter ends; then the system takes the memory back.
        freed.atexit = False
        self.nbytes: int = library.llmc_int8_bytes(self._handle)
        self._multiply = library.llmc_int8_linear
        self._coding: tuple[Activations | Stored, tuple[int, int, int, float]] | None = None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, activations: Activations | Stored) -> torch.Tensor:
        """Multiply float32 `x` (..., in), at least 2-D; returns float32 (..., out). `bias` is the one packed."""
        *shape, inputs = x.shape
        if inputs != self._inputs or not x.is_cpu:
            raise RuntimeError(
                f"an int8 layer of {self._inputs} inputs on the CPU was given {tuple(x.shape)} on {x.device}"
            )
        x = x.contiguous()
        y = x.new_empty((*shape, self._outputs))
        known = self._coding
        if known is None or known[0] is not activations:
            known = self._coding = activations, _coding(activations)
        failed = self._multiply(
            self._table,
            self._handle,
            x.data_ptr(),
            x.numel() // inputs,
            y.data_ptr(),
            *known[1],
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the codes of activations {tuple(x.shape)}")
        return y

    def step(self, how: object) -> ProductStep:
        """Return the product as a step of a chain; `how` tells how activations are coded, as for a call."""
        option, levels, zero, unit = _coding(cast("Activations | Stored", how))
        sizes = self._inputs, self._outputs
        by_row = option != _GRAINS["tensor"]
        return ProductStep(*sizes, self._handle, False, option, levels, zero, unit, by_row=by_row)


def _coding(activations: Activations | Stored) -> tuple[int, int, int, float]:
    """Return what the product is told of codes: what shares a scale, the largest, that of 0.0, and the scale."""
    if isinstance(activations, Stored):
        return _STORED, activations.levels, activations.zero_point, activations.scale
    return _GRAINS[activations], 2 ** activation_bits() - 1, 0, 0.0
