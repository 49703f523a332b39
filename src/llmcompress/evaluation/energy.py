"""Joules a pass, read off the hardware's own counters: RAPL for processors, NVML for NVIDIA GPUs; never estimated."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the energy counters of Intel and AMD processors (RAPL)."""


class Energy(BaseModel, frozen=True, extra="forbid"):
    """Energy of one pass, by counters of the whole chip: what else ran on it meanwhile is in the number."""

    joules: float = Field(description="joules a pass")
    passes: int = Field(description="passes it is the mean of")
    seconds: float = Field(description="how long they took")
    counters: tuple[str, ...] = Field(description="the counters that were read and added up")


class Counter(ABC):
    """A counter of joules that only goes up."""

    name: str

    @abstractmethod
    def read(self) -> float:
        """Return its state in joules.

        Raises:
            OSError: it cannot be read.
        """

    def since(self, before: float) -> float:
        """Return the joules since it read `before`."""
        return self.read() - before


@dataclass
class RaplZone(Counter):
    """A power zone of Linux's powercap tree: a processor package, or its memory.

    Source: https://docs.kernel.org/power/powercap/powercap.html
    """

    name: str
    folder: Path

    def read(self) -> float:
        """Return the zone's counter."""
        return int((self.folder / "energy_uj").read_text()) / 1e6

    def since(self, before: float) -> float:
        """Return the joules since `before`, also where the counter has begun again at 0 in between."""
        spent = self.read() - before
        return spent if spent >= 0 else spent + int((self.folder / "max_energy_range_uj").read_text()) / 1e6


@dataclass
class NvmlDevice(Counter):
    """The energy counter of an NVIDIA GPU (Volta and later)."""

    name: str
    nvml: Any
    handle: Any

    def read(self) -> float:
        """Return the GPU's counter, which counts from when the driver was loaded."""
        try:
            return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except self.nvml.NVMLError as error:
            raise OSError(f"{self.name}: {error}") from error


def find_counters(device: torch.device) -> list[Counter]:
    """Return the counters of what computes on `device` that this process may read; none where one is missing.

    On a GPU its own counter is needed, and the processor's are added to it.
    """
    zones = _rapl_zones()
    if device.type == "cpu":
        return zones
    gpu = _nvml_device(device) if device.type == "cuda" else None
    return [gpu, *zones] if gpu is not None else []


def measure_energy(
    passes: Mapping[str, Callable[[], object]], counters: Mapping[str, Sequence[Counter]], *, seconds: float
) -> dict[str, Energy]:
    """Run each model's pass over and over, there and back again (ABBA), and read its counters around each stretch.

    The counters move in steps of milliseconds (RAPL) to tens of them (NVML), so single passes cannot be told apart.

    Args:
        passes: runs one pass, and waits for the device, by model.
        counters: of each model's device; a model without any gets no result.
        seconds: for each model, in two stretches.
    """
    names = [name for name in passes if counters[name]]
    joules, seconds_spent, counts = (dict.fromkeys(names, 0.0) for _ in range(3))
    for name in (*names, *reversed(names)):
        before = [counter.read() for counter in counters[name]]
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < seconds / 2:
            passes[name]()
            count += 1
        joules[name] += sum(counter.since(state) for counter, state in zip(counters[name], before, strict=True))
        seconds_spent[name] += time.perf_counter() - begin
        counts[name] += count
    return {
        name: Energy(
            joules=joules[name] / counts[name],
            passes=int(counts[name]),
            seconds=seconds_spent[name],
            counters=tuple(counter.name for counter in counters[name]),
        )
        for name in names
    }


def _rapl_zones() -> list[Counter]:
    # intel-rapl-mmio shows the packages a second time, and psys holds the packages' energy once more.
    folders = sorted(path for path in POWERCAP.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl(:\d+)+", path.name))
    zones: list[Counter] = []
    for folder in folders:
        try:
            kind = (folder / "name").read_text().strip()
            zone = RaplZone(f"RAPL {folder.name.removeprefix('intel-rapl:')} {kind}", folder)
            # Cores and graphics are parts of their package; memory is not.
            if kind.startswith("package") or kind == "dram":
                zone.read()
                zones.append(zone)
        except (OSError, ValueError):
            return []  # usually only root may read them; some of the packages would not be the whole
    return zones


def _nvml_device(device: torch.device) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        return None
    # Not by index: CUDA_VISIBLE_DEVICES renumbers torch's devices, and NVML does not know of it.
    properties = torch.cuda.get_device_properties(device)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        counter = NvmlDevice(f"NVML {properties.name}", pynvml, handle)
        counter.read()
    except (pynvml.NVMLError, OSError):
        return None  # no driver, a slice of a GPU, or a GPU without the counter
    return counter
