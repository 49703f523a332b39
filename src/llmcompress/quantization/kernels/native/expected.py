"""What a tensor must be before its address goes to C, which sees no shapes."""

from __future__ import annotations

import torch


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Refuse a tensor that kernels would read or write beyond, or take for numbers of another kind.

    Args:
        name: what the tensor is, for the message.
        tensor: any.
        shape: the one that kernels walk.
        dtypes: those that they read.

    Raises:
        RuntimeError: it is not of this shape, of none of these dtypes, or not on the CPU.

    Example:
        >>> expect("bias", torch.ones(3), (4,), torch.float32)
        Traceback (most recent call last):
            ...
        RuntimeError: bias must be float32 (4,) on the CPU, got float32 (3,) on cpu
    """
    if tensor.shape == shape and tensor.dtype in dtypes and tensor.is_cpu:
        return
    allowed = " or ".join(_name(dtype) for dtype in dtypes)
    got = f"{_name(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}"
    raise RuntimeError(f"{name} must be {allowed} {shape} on the CPU, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
