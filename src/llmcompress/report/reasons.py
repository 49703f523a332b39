"""Why a compressed model is not faster, where that is known of the way it was compressed and of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry

# Below this share of zeros a model was not pruned: some weights of every model are zero.
_FEW_ZEROS = 0.05
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


def why_no_faster(comparison: Comparison, entry: Entry) -> list[str]:
    """Return the known reasons, each a clause; empty where none is known.

    They are read off what was recorded: the steps of the run, the share of zeros, the dtype, the device and the CPU's
    instruction sets. Nothing is guessed of a model whose making is not known.
    """
    if not entry.evaluation.latency:
        return []
    device = entry.evaluation.latency[0].device
    steps = {str(one.step.get("name")): one.step for one in entry.report.steps} if entry.report else {}
    return [
        *_zeros(entry, steps),
        *_formats(comparison, entry, steps, device),
        *_dtypes(comparison, entry, device),
    ]


def _zeros(entry: Entry, steps: dict[str, dict[str, Any]]) -> Iterator[str]:
    size = entry.evaluation.size
    zeros = 1 - size.nonzero / size.parameters if size.parameters else 0.0
    if zeros < _FEW_ZEROS:
        return
    pattern = next((step["pattern"] for step in steps.values() if step.get("pattern")), None)
    kind = f"{pattern} zeros" if pattern else "unstructured zeros"
    yield f"{kind} ({zeros:.0%} of its weights) save no time: the dense kernels multiply them like any other number"


def _formats(comparison: Comparison, entry: Entry, steps: dict[str, dict[str, Any]], device: str) -> Iterator[str]:
    x86 = "x86" in comparison.machine.system.lower() or "amd64" in comparison.machine.system.lower()
    method = entry.evaluation.quantization or ""
    if ("bitsandbytes_quantization" in steps or method.startswith("bitsandbytes")) and device == "cpu":
        yield "bitsandbytes is made for GPUs: on a CPU it usually turns the weights back into floats at every pass"
    if "dynamic_quantization" in steps:
        if device != "cpu" or not x86:
            yield "int8 layers have a kernel of their own only on x86 CPUs: here their codes are multiplied as floats"
        else:
            yield "an int8 layer codes its input at every pass, which narrow layers do not earn back"


def _dtypes(comparison: Comparison, entry: Entry, device: str) -> Iterator[str]:
    ours, theirs = (one.evaluation.latency[0].dtype for one in (comparison.base, entry))
    if theirs == ours or device != "cpu":
        return
    flags = set(comparison.machine.cpu_flags)
    if theirs == "bfloat16" and not flags.intersection(_BF16_FLAGS):
        yield (
            f"this CPU has no bfloat16 instructions ({', '.join(_BF16_FLAGS)}): each product is converted to float32 "
            "and back"
        )
    elif theirs == "bfloat16" and "avx512_bf16" in flags and "amx_bf16" not in flags:
        yield "this CPU has no matrix tiles (amx_bf16): bfloat16 products alone hardly pay for the casts around them"
