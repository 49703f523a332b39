"""What a float linear layer tells the layer of codes that takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class LinearOptions(TypedDict):
    """How an empty layer is built."""

    bias: bool
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class LinearForm:
    """The form of an `nn.Linear`, or of transformers' `Conv1D`, whose weight is stored transposed.

    Attributes:
        inputs: columns of the upright weight.
        outputs: its rows.
        weight: the weight, outputs first.
        bias: the bias, or None.

    Example:
        >>> form = LinearForm.of(Conv1D(3, 2))
        >>> form.inputs, form.outputs, form.weight.shape
        (2, 3, torch.Size([3, 2]))
    """

    inputs: int
    outputs: int
    weight: torch.Tensor
    bias: nn.Parameter | None

    @classmethod
    def of(cls, module: nn.Module) -> LinearForm:
        """Return the form of `module`."""
        weight = cast(torch.Tensor, module.weight)
        upright = weight.T if isinstance(module, Conv1D) else weight
        return cls(upright.shape[1], upright.shape[0], upright, cast("nn.Parameter | None", module.bias))

    @property
    def options(self) -> LinearOptions:
        """How a layer of this form is built."""
        return {"bias": self.bias is not None, "device": self.weight.device, "dtype": self.weight.dtype}
