"""Steps that follow one another over the same rows, in one call of the native kernels.

A product of a few rows takes 20 microseconds. As long takes Python for each call of its own: its checks, the memory of
its result, the way to C.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .between import GATES, Gate
from .expected import expect
from .library import Native

# Of `chain.hpp`.
_INT8, _PACKED, _ACTIVATE, _ADD, _MULTIPLY, _RMS_NORM, _LAYER_NORM, _ROTATE = range(8)
_IN_PLACE = (_ACTIVATE, _ADD, _MULTIPLY)
# Rows that all steps run on before the next, lest what lies between them goes out to memory and back.
_PART = 512


class _Step(ctypes.Structure):
    """`Step` of chain.hpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("op", "source", "other", "target", "third")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("option", "levels", "zero")),
        *((name, ctypes.c_float) for name in ("unit", "offset")),
    )


@dataclass(frozen=True)
class ProductStep:
    """A product as a step of a chain: pointers into what computes it, which has to live as long as the chain runs.

    Attributes:
        inputs, outputs: sizes.
        weight: the address of what it multiplies by: an `Int8Weight`, or a packed matrix.
        packed: whether it is the latter.
        option: what shares a scale of activations (see `int8_native.py`), or whether activations stay floats.
        levels, zero, unit: how activations are coded for int8.
        bias: the address of that of a packed product.
        by_row: whether a row's result depends on no other row.
    """

    inputs: int
    outputs: int
    weight: int
    packed: bool
    option: int
    levels: int = 0
    zero: int = 0
    unit: float = 0.0
    bias: int | None = None
    by_row: bool = True


@dataclass
class Chain:
    """A chain that is being written down. Buffers are numbers; each has a width and as many rows as all others.

    Args:
        kernels: what computes.

    Example:
        >>> from llmcompress.quantization.kernels.native import native
        >>> if native():
        ...     chain = Chain(native())
        ...     x, y = chain.given(4), chain.given(4)
        ...     run = chain.finish(chain.add(x, chain.activate("silu", y)))
        ...     print(run(torch.ones(2, 4), torch.zeros(2, 4))[0].shape)
        torch.Size([2, 4])
    """

    kernels: Native
    _widths: list[int] = field(default_factory=list)
    _steps: list[_Step] = field(default_factory=list)
    _given: list[int] = field(default_factory=list)
    _tensors: list[torch.Tensor] = field(default_factory=list)
    _by_row: bool = True

    def given(self, width: int) -> int:
        """Return a new buffer that a call of the chain is given."""
        self._given.append(self._new(width))
        return self._given[-1]

    def product(self, x: int, step: ProductStep) -> int:
        """Multiply.

        Raises:
            RuntimeError: the buffer has another width than the product has inputs.
        """
        if self._widths[x] != step.inputs:
            raise RuntimeError(f"a product of {step.inputs} inputs was given a buffer of the width {self._widths[x]}")
        y = self._new(step.outputs)
        how = (step.weight, step.bias, step.option, step.levels, step.zero, step.unit)
        self._steps.append(_Step(_PACKED if step.packed else _INT8, x, 0, y, 0, *how))
        self._by_row = self._by_row and step.by_row
        return y

    def activate(self, gate: Gate, x: int) -> int:
        """Apply an activation function."""
        return self._elementwise(_ACTIVATE, x, 0, GATES[gate])

    def add(self, a: int, b: int) -> int:
        """Return a sum."""
        return self._elementwise(_ADD, a, b)

    def multiply(self, a: int, b: int) -> int:
        """Return a product, number by number."""
        return self._elementwise(_MULTIPLY, a, b)

    def rms_norm(self, x: int, weight: torch.Tensor, epsilon: float, offset: float = 0.0) -> int:
        """Normalize as `rms_norm` does: rows, or their heads where the weight is narrower."""
        return self._norm(_RMS_NORM, x, weight, None, epsilon, offset)

    def layer_norm(self, x: int, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> int:
        """Normalize as `layer_norm` does."""
        return self._norm(_LAYER_NORM, x, weight, bias, epsilon)

    def rotate(self, x: int, cosines: int, sines: int) -> int:
        """Turn the halves of each head against one another by its position; the width of `cosines` is that of a head.

        Raises:
            RuntimeError: widths that do not fit.
        """
        head = self._widths[cosines]
        if head % 2 or self._widths[x] % head or self._widths[sines] != head:
            raise RuntimeError(f"heads of {head} in rows of {self._widths[x]} cannot be rotated by halves")
        y = self._new(self._widths[x])
        self._steps.append(_Step(_ROTATE, x, cosines, y, sines, None, None, head))
        return y

    def finish(self, *results: int) -> RunningChain:
        """Return the chain, which maps what is `given` to `results`, in their order."""
        places = {buffer: place for place, buffer in enumerate((*self._given, *results))}
        widths = [self._widths[buffer] for buffer in places]
        outside, last = frozenset(places), {}
        for number, step in enumerate(self._steps):
            last.update({step.source: number, step.other: number, step.third: number})
        free: dict[int, list[int]] = {}
        for number, step in enumerate(self._steps):
            target = step.target
            reads = step.source, step.other, step.third
            read = {buffer for buffer in reads if last[buffer] == number} - outside
            step.source, step.other, step.third = (places[buffer] for buffer in reads)
            # What works number by number may write where it reads, a product may not.
            ended = [(self._widths[buffer], places[buffer]) for buffer in read]
            for width, place in ended if step.op in _IN_PLACE else ():
                free.setdefault(width, []).append(place)
            if target not in places:
                width = self._widths[target]
                if free.get(width):
                    places[target] = free[width].pop()
                else:
                    places[target] = len(widths)
                    widths.append(width)
            step.target = places[target]
            for width, place in ended if step.op not in _IN_PLACE else ():
                free.setdefault(width, []).append(place)
        return RunningChain(self.kernels, self._steps, widths, len(self._given), len(results), self._by_row)

    def _new(self, width: int) -> int:
        self._widths.append(width)
        return len(self._widths) - 1

    def _elementwise(self, op: int, a: int, b: int, option: int = 0) -> int:
        if op != _ACTIVATE and self._widths[a] != self._widths[b]:
            raise RuntimeError(f"buffers of the widths {self._widths[a]} and {self._widths[b]} cannot be combined")
        y = self._new(self._widths[a])
        self._steps.append(_Step(op, a, b, y, 0, None, None, option))
        return y

    def _norm(
        self, op: int, x: int, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float, offset: float = 0.0
    ) -> int:
        width, head = self._widths[x], len(weight)
        if not head or width % head:
            raise RuntimeError(f"rows of {width} cannot be normalized by a weight of {head}")
        expect("the weight of a norm", weight, (head,), torch.float32)
        if bias is not None:
            expect("the bias of a norm", bias, (head,), torch.float32)
        y = self._new(width)
        addresses = weight.data_ptr(), None if bias is None else bias.data_ptr()
        self._steps.append(_Step(op, x, 0, y, 0, *addresses, head, 0, 0, epsilon, offset))
        return y


class RunningChain:
    """A chain that can be run.

    Args:
        kernels: what computes.
        steps: in their order, buffers by number.
        widths: of the buffers: those given, the results, and those between.
        given: how many are given.
        results: how many are results.
        by_row: whether no row depends on another.
    """

    def __init__(
        self, kernels: Native, steps: Sequence[_Step], widths: Sequence[int], given: int, results: int, by_row: bool
    ) -> None:
        self._steps = (_Step * len(steps))(*steps)
        self._widths = (ctypes.c_int64 * len(widths))(*widths)
        self._inputs, self._results = tuple(widths[:given]), tuple(widths[given : given + results])
        self._outside = given + results
        self._pointers = ctypes.c_void_p * self._outside
        self._part = _PART if by_row else None
        self._run, self._table = kernels.functions.llmc_run_chain, kernels.table
        self._addresses = ctypes.addressof(self._steps), len(steps)
        self._sizes = ctypes.addressof(self._widths)

    def __call__(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """Map float32 tensors (..., width) with the same rows to new ones.

        Raises:
            RuntimeError: a tensor has another width or type, or is not on the CPU.
            MemoryError: there is too little.
        """
        x = given[0]
        outer = x.shape[:-1]
        rows = outer.numel()
        for tensor, width in zip(given, self._inputs, strict=True):
            fits = tensor.shape[-1] == width and tensor.numel() == rows * width and tensor.dtype is torch.float32
            if not fits or not tensor.is_contiguous() or not tensor.is_cpu:
                raise RuntimeError(
                    f"a chain was given {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, not {rows} contiguous "
                    f"rows of {width} float32 on the CPU"
                )
        results = [x.new_empty((*outer, width)) for width in self._results]
        part = rows if self._part is None or rows < self._part else self._part
        pointers = self._pointers(*[tensor.data_ptr() for tensor in (*given, *results)])
        failed = self._run(
            self._table,
            *self._addresses,
            pointers,
            self._outside,
            self._sizes,
            len(self._widths),
            part,
            rows,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the codes of activations {tuple(x.shape)}")
        return results
