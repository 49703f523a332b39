"""Products of ggml, the library under llama.cpp, in its own 4 bits, by the C functions of llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

_F32, _Q4_0 = 0, 2
_ROOM = 1 << 20


class _Parameters(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Library:
    """The functions of ggml by name; all but a few give back a pointer."""

    _OTHER: ClassVar = {
        "ggml_quantize_chunk": ctypes.c_size_t,
        "ggml_nbytes": ctypes.c_size_t,
        "ggml_backend_dev_supports_op": ctypes.c_bool,
        "ggml_backend_graph_compute": ctypes.c_int,
    }

    def __init__(self) -> None:
        # Loads the shared objects in the order in which they need each other.
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self._parts = [ctypes.CDLL(str(folder / f"libggml{part}.so")) for part in ("-base", "-cpu", "")]

    def __getattr__(self, name: str) -> Callable[..., int]:
        for part in self._parts:
            if hasattr(part, name):
                function = getattr(part, name)
                function.restype = self._OTHER.get(name, ctypes.c_void_p)
                return lambda *given: function(
                    *(ctypes.c_void_p(one) if isinstance(one, int) else one for one in given)
                )
        raise AttributeError(name)


def q4_0_stack(weights: list[torch.Tensor], threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what multiplies rows with each weight in turn, coded in Q4_0, placed as llama.cpp's loader places it.

    Args:
        weights: of shape `(outputs, inputs)`, all alike and square.
        threads: of a product.

    Raises:
        ImportError: without llama-cpp-python.
    """
    ggml = _Library()
    number, whole = ctypes.c_int64, ctypes.c_int
    width = weights[0].shape[0]
    device = ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), ctypes.c_size_t(0))
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, whole(threads))
    coded = _placed(ggml, device, len(weights), width)
    for tensor, weight in zip(coded, weights, strict=True):
        source = weight.detach().contiguous()
        data = ctypes.create_string_buffer(int(ggml.ggml_nbytes(tensor)))
        ggml.ggml_quantize_chunk(
            whole(_Q4_0), source.data_ptr(), data, number(0), number(width), number(width), ctypes.c_void_p(None)
        )
        ggml.ggml_backend_tensor_set(tensor, data, ctypes.c_size_t(0), ctypes.c_size_t(len(data)))
    graphs: dict[int, tuple[int, int, int]] = {}

    def graph(rows: int) -> tuple[int, int, int]:
        context = ggml.ggml_init(_Parameters(_ROOM, None, True))
        first = last = ggml.ggml_new_tensor_2d(context, whole(_F32), number(width), number(rows))
        for tensor in coded:
            last = ggml.ggml_mul_mat(context, tensor, last)
        made = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(made, last)
        ggml.ggml_backend_alloc_ctx_tensors(context, backend)
        return made, first, last

    def engine(x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if rows not in graphs:
            graphs[rows] = graph(rows)
        made, first, last = graphs[rows]
        size = ctypes.c_size_t(4 * x.numel())
        ggml.ggml_backend_tensor_set(first, x.data_ptr(), ctypes.c_size_t(0), size)
        ggml.ggml_backend_graph_compute(backend, made)
        y = torch.empty_like(x)
        ggml.ggml_backend_tensor_get(last, y.data_ptr(), ctypes.c_size_t(0), size)
        return y

    return engine


def _placed(ggml: _Library, device: int, count: int, width: int) -> list[int]:
    """Return tensors in the first kind of memory that the product is supported in: AMX, repacked, plain."""
    name = ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(
        ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_cpu_reg(), name)
    )
    places, found = [], extra(device)
    while found and found[len(places)]:
        places.append(found[len(places)])
    for place in [*places, ggml.ggml_backend_dev_buffer_type(device)]:
        context, probes = (ggml.ggml_init(_Parameters(_ROOM, None, True)) for _ in range(2))
        coded = [
            ggml.ggml_new_tensor_2d(context, ctypes.c_int(_Q4_0), ctypes.c_int64(width), ctypes.c_int64(width))
            for _ in range(count)
        ]
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
        row = ggml.ggml_new_tensor_2d(probes, ctypes.c_int(_F32), ctypes.c_int64(width), ctypes.c_int64(1))
        if ggml.ggml_backend_dev_supports_op(device, ggml.ggml_mul_mat(probes, coded[0], row)):
            return coded
    raise RuntimeError("ggml has no memory to multiply Q4_0 in")
