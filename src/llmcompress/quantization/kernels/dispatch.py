"""Which kernel computes which scheme on which device: one table, asked by `lc.kernels()`.

Of the entries of one scheme, device and batch, the first that runs on this machine is used.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from . import int4pack
from .int8 import activation_bits, has_int_mm
from .native import native, why_absent
from .packing import has_fbgemm


@dataclass(frozen=True)
class Kernel:
    """One way to compute the product of a scheme.

    Attributes:
        scheme: name of the scheme, as in `config.json`.
        device: `"cpu"` or `"cuda"`.
        batch: rows of the input that it serves: `"any"`, or a range such as `"1"` or `"over 16"`.
        name: what computes.
        runs: tells whether it can run on a device of this machine.
        needs: what it needs, in words.
    """

    scheme: str
    device: str
    batch: str
    name: str
    runs: Callable[[torch.device], bool]
    needs: str


@dataclass(frozen=True)
class Choice:
    """A row of the table as it is on this machine.

    Attributes:
        kernel: the entry.
        present: whether it can run here.
        used: whether it is the one that runs.
        lacks: what it would need, where it cannot run.
    """

    kernel: Kernel
    present: bool
    used: bool
    lacks: str


@dataclass(frozen=True)
class Kernels:
    """What computes the products of quantized layers on this machine; prints as a table.

    Attributes:
        choices: every known kernel, of each group the preferred one first.
        machine: what decides: instructions, threads, engine, devices, by name.
    """

    choices: tuple[Choice, ...]
    machine: dict[str, str]

    def used(self, scheme: str, device: str = "cpu") -> list[str]:
        """Return the names of the kernels that run for a scheme on a device, one for each range of batches.

        None for a scheme or a device that the table does not have: a coded embedding is looked up, not multiplied by.
        """
        own = [choice for choice in self.choices if choice.used and choice.kernel.scheme == scheme]
        return [choice.kernel.name for choice in own if choice.kernel.device == device]

    def __str__(self) -> str:
        rows = [_HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*(f"{name}: {value}" for name, value in self.machine.items()), "", *lines])

    def _repr_html_(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self.machine.items())
        rows = "".join(_row(cells, "td") for cells in self._rows())
        return f"<p>{html.escape(facts)}</p><table>{_row(_HEAD, 'th')}{rows}</table>"

    def _rows(self) -> Iterable[tuple[str, ...]]:
        for choice in self.choices:
            kernel = choice.kernel
            state = "used" if choice.used else "present" if choice.present else f"absent: needs {choice.lacks}"
            yield kernel.scheme, kernel.device, kernel.batch, kernel.name, state


_HEAD = ("scheme", "device", "rows", "kernel", "here")


def _always(device: torch.device) -> bool:
    return True


_INT4 = "compute capability 8.0, groups of 32 to 256, inputs in multiples of 128, outputs of 8"
_FBGEMM = "a torch built with fbgemm, and torch.backends.quantized.engine 'x86' or 'fbgemm'"


def _native(device: torch.device) -> bool:
    return device.type == "cpu" and native() is not None


def _int8(scheme: str, fbgemm: str, calls: str = "") -> list[Kernel]:
    return [
        Kernel(scheme, "cpu", "any", f"native int8{calls}", _native, "the native kernels: see above"),
        Kernel(scheme, "cpu", "any", f"fbgemm {fbgemm}{calls}", has_fbgemm, _FBGEMM),
        Kernel(scheme, "cpu", "any", "torch._int_mm (oneDNN)", has_int_mm, "a CPU with VNNI and oneDNN"),
        Kernel(scheme, "cpu", "any", "codes multiplied as float32", _always, "nothing"),
        Kernel(scheme, "cuda", "any", "torch._int_mm (cuBLAS)", has_int_mm, "compute capability 7.5"),
        Kernel(scheme, "cuda", "any", "codes multiplied as float32", _always, "nothing"),
    ]


def _packed(scheme: str) -> list[Kernel]:
    return [
        Kernel(scheme, "cpu", "any", "native, on the packed codes", _native, "the native kernels: see above"),
        Kernel(scheme, "cpu", "any", "fbgemm int8, codes made anew in 8 bits", has_fbgemm, _FBGEMM),
        Kernel(scheme, "cpu", "any", "codes unpacked to float at each call", _always, "nothing"),
        Kernel(scheme, "cuda", "any", "torch _weight_int4pack_mm, for 4 bits", int4pack.runs, _INT4),
        Kernel(scheme, "cuda", "any", "codes unpacked to float at each call", _always, "nothing"),
    ]


TABLE: list[Kernel] = [
    *_int8("int8_linear", "linear_dynamic"),
    *_int8("int8_experts", "linear_dynamic", ", one call an expert"),
    *_packed("packed_linear"),
    *_packed("packed_experts"),
    *_int8("int8_static_linear", "linear_with_input_q_dq"),
]
"""Every kernel there is. A new one is an entry here and a file beside this one."""


def kernels() -> Kernels:
    """Return which kernels this machine has for each scheme, device and batch, and which of them are used.

    Example:
        >>> import llmcompress as lc
        >>> len(lc.kernels().used("int8_linear"))
        1
    """
    devices = {"cpu": torch.device("cpu")}
    if torch.cuda.is_available():
        devices["cuda"] = torch.device("cuda", torch.cuda.current_device())
    taken: set[tuple[str, str, str]] = set()
    choices = []
    for kernel in TABLE:
        group = (kernel.scheme, kernel.device, kernel.batch)
        device = devices.get(kernel.device)
        present = device is not None and kernel.runs(device)
        lacks = "" if present else kernel.needs if device is not None else "a CUDA device"
        choices.append(Choice(kernel, present, present and group not in taken, lacks))
        if present:
            taken.add(group)
    return Kernels(tuple(choices), _machine())


def _machine() -> dict[str, str]:
    vnni = "yes" if torch.cpu._is_vnni_supported() else "no"
    return {
        "torch": torch.__version__,
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "VNNI": f"{vnni} (activations in {activation_bits()} bits)",
        "threads": str(torch.get_num_threads()),
        "int8 engine": torch.backends.quantized.engine,
        "native kernels": _native_set(),
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no",
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "no",
    }


def _native_set() -> str:
    found = native()
    if found is None:
        return f"no: needs {why_absent()}"
    return found.name if found.parallel else f"{found.name}, on one thread: torch's OpenMP runtime was not found"


def _row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
