"""Codes of activations, one scale a row: what the products of the native kernels begin with."""

from __future__ import annotations

import torch

from .library import Native


def code_rows(x: torch.Tensor, limit: int, kernels: Native) -> tuple[torch.Tensor, torch.Tensor]:
    """Code each row of `x` by its largest magnitude.

    Args:
        x: float32 (rows, columns), contiguous, on the CPU.
        limit: the code of the largest magnitude, at most 127.
        kernels: what computes.

    Returns:
        int8 codes (rows, columns), and what one step is worth, float32 (rows,): NaN for a row that holds an infinity
        or NaN.
    """
    rows, columns = x.shape
    codes, unit = x.new_empty((rows, columns), dtype=torch.int8), x.new_empty(rows)
    arguments = (x.data_ptr(), rows, columns, limit, codes.data_ptr(), unit.data_ptr(), torch.get_num_threads())
    kernels.functions.llmc_code_rows(kernels.table, *arguments)
    return codes, unit
