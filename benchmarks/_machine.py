"""What a timing must be read with: processor, threads, versions. Shared by the benchmarks."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
_PACKAGES = ("llmcompress", "torch", "transformers", "onnxruntime", "bitsandbytes", "torchao", "openvino")


def describe_machine() -> str:
    """Return Markdown lines: CPU and its flags that matter, threads, versions of the libraries at work."""
    flags = [flag for flag in _FLAGS if flag in _cpu("flags", "Features").split()]
    lines = [
        f"- CPU: {_cpu('model name') or platform.machine()}; flags: {' '.join(flags) or 'unknown'}",
        f"- threads: {torch.get_num_threads()}; system: {platform.system()} {platform.machine()}",
        f"- Python {platform.python_version()}; {', '.join(_versions())}",
    ]
    return "\n".join(lines)


def _cpu(*keys: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
