"""What the numbers were measured on: a latency without its machine is no number."""

from __future__ import annotations

import os
import platform
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


# Of the environment: they set or bind threads, or narrow the instructions that kernels use.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "OMP_PROC_BIND",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
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
    settings: dict[str, str] = Field(default={}, description="of torch and its environment, where they bear on speed")

    def __str__(self) -> str:
        flags = f" ({', '.join(self.cpu_flags)})" if self.cpu_flags else ""
        gpu = f"; {self.gpu}" if self.gpu else ""
        return (
            f"{self.cpu}{flags}, {self.logical_cores} logical cores{gpu}; {self.system}; "
            f"Python {self.python}, torch {self.torch}, transformers {self.transformers}"
        )


def machine() -> Machine:
    """Describe the machine this process runs on, with the settings now in force."""
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
        settings=_settings(),
    )


def _settings() -> dict[str, str]:
    found = {
        "intra-op threads": str(torch.get_num_threads()),
        "inter-op threads": str(torch.get_num_interop_threads()),
        "kernels built for": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": "on" if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else "off",
        "int8 engine": torch.backends.quantized.engine,
        "float32 products": torch.get_float32_matmul_precision(),
    }
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


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
