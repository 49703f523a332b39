"""What the numbers were measured on: a latency without its machine is no number."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, Field

# Instructions that decide which kernels run: vector width, dot products of int8 and bf16, matrix tiles.
_FLAGS_THAT_MATTER = frozenset(
    {
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimddp",
        "i8mm",
        "bf16",
    }
)


class Machine(BaseModel, frozen=True, extra="forbid"):
    """The hardware and the software under a measurement.

    Example:
        >>> machine().logical_cores >= 1
        True
    """

    cpu: str = Field(description="the processor's own name")
    cpu_flags: tuple[str, ...] = Field(description="instruction sets that decide which kernels run")
    physical_cores: int | None = Field(description="cores, or None where the system does not tell")
    logical_cores: int = Field(description="hardware threads that this process may use")
    memory_bytes: int = Field(description="installed memory")
    gpu: str | None = Field(description="name of the first CUDA device, or None")
    system: str = Field(description="operating system")
    python: str
    torch: str
    transformers: str

    def __str__(self) -> str:
        flags = f" ({', '.join(self.cpu_flags)})" if self.cpu_flags else ""
        gpu = f"; {self.gpu}" if self.gpu else ""
        return (
            f"{self.cpu}{flags}, {self.logical_cores} logical cores{gpu}; {self.system}; "
            f"Python {self.python}, torch {self.torch}, transformers {self.transformers}"
        )


@cache
def machine() -> Machine:
    """Describe the machine this process runs on."""
    import transformers

    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine() or "unknown",
        cpu_flags=tuple(sorted(_FLAGS_THAT_MATTER.intersection(flags))),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=_usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _cpuinfo() -> dict[str, str]:
    """Read the first processor's entry of /proc/cpuinfo; empty on systems that have none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _usable_cores() -> int:
    process = psutil.Process()
    # Containers pin processes; macOS has no affinity to ask for.
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
