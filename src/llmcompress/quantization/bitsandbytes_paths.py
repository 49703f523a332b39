"""Which way bitsandbytes multiplies on a device, as read in the source of its release 0.50: fast kernel or detour."""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["nf4", "fp4", "int8"]

# Tensor cores that multiply int8, and bfloat16.
_INT8_CORES, _BF16_CORES = (7, 5), (8, 0)


def product_path(kind: Kind, device: torch.device, compute_dtype: torch.dtype) -> tuple[bool, str]:
    """Say whether bitsandbytes has a kernel of its own for `kind` on `device`, and how it multiplies there.

    Args:
        kind: the format of the weights.
        device: where the model is.
        compute_dtype: what 4-bit weights are expanded to.

    Example:
        >>> fast, how = product_path("nf4", torch.device("meta"), torch.float32)
        >>> fast, how
        (False, 'bitsandbytes is not known to have a kernel for nf4 on meta: measure with lc.compare')
    """
    if device.type == "cpu":
        return _on_cpu(kind)
    if device.type == "cuda" and torch.version.hip is None:
        return _on_cuda(kind, torch.cuda.get_device_capability(device), compute_dtype)
    return False, f"bitsandbytes is not known to have a kernel for {kind} on {device.type}: measure with lc.compare"


def _on_cpu(kind: Kind) -> tuple[bool, str]:
    slow = "bitsandbytes is made for GPUs: expect a smaller but slower model on this CPU"
    if kind == "int8":
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            return False, f"{slow}; int8 products run in torch._int_mm, what is around them in plain torch"
        return False, f"{slow}; without AVX-512 it has no int8 product, and multiplies the codes in float32"
    from bitsandbytes.functional import has_avx512bf16

    if has_avx512bf16():
        return False, f"{slow}; its AVX-512 BF16 kernel multiplies in bfloat16, whatever compute_dtype says"
    return False, f"{slow}; without AVX-512 BF16 each call expands the whole weight first"


def _on_cuda(kind: Kind, capability: tuple[int, int], compute_dtype: torch.dtype) -> tuple[bool, str]:
    name = f"compute capability {capability[0]}.{capability[1]}"
    if kind == "int8":
        if capability < _INT8_CORES:
            return False, f"{name} has no int8 tensor cores: expect int8 products slower than float16 ones"
        return True, "int8 tensor cores; outlier columns are multiplied apart, in float16"
    if compute_dtype == torch.float32:
        better = "bfloat16" if capability >= _BF16_CORES else "float16"
        return False, f"products in float32, without tensor cores: take compute_dtype={better!r}"
    if compute_dtype == torch.bfloat16 and capability < _BF16_CORES:
        return False, f"{name} has no bfloat16 tensor cores: take compute_dtype='float16'"
    return True, "4-bit kernel for few tokens at a time; for many, each call expands the whole weight first"
