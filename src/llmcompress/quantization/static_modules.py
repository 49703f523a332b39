"""The int8 linear layer whose activations are coded with a scale that was calibrated and is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from . import kernels
from .kernels import Activations, Stored
from .linear_form import LinearForm
from .modules import Int8Linear, QuantizedModule, Spec


class Int8StaticLinear(Int8Linear):
    """A linear layer with int8 weights and a stored scale and zero point of its activations.

    Inputs outside of the calibrated range become its nearest end. A row's result depends on no other row. Otherwise as
    `Int8Linear`.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: whether there is one.
        device: where the tensors are made; `"meta"` for loading.
        dtype: of the bias.

    Attributes:
        input_scale: float32 scalar; what one of the 255 steps of an input is worth. Keeps its dtype in a cast.
        input_zero_point: int32 scalar; the code of 0.0, in [0, 255].
    """

    scheme = "int8_static_linear"
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("input_scale", torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("input_zero_point", torch.empty((), dtype=torch.int32, device=device))
        self._stored: tuple[tuple[tuple[int, int], ...], Stored] | None = None

    @classmethod
    def from_spec(cls, module: nn.Module, spec: Spec) -> Int8StaticLinear:
        """Build an empty layer of the size of `module`, an `nn.Linear` or a `Conv1D`."""
        form = LinearForm.of(module)
        return cls(form.inputs, form.outputs, **form.options)

    @classmethod
    def calibrated(cls, module: nn.Module, scale: float, zero_point: int) -> Int8StaticLinear:
        """Quantize an `nn.Linear` or a `Conv1D`; its bias is shared, its weight is not kept.

        Args:
            module: the float layer.
            scale: what one of 255 steps of an input is worth, positive.
            zero_point: the code of 0.0, in [0, 255].

        Example:
            >>> layer = Int8StaticLinear.calibrated(nn.Linear(4, 2), scale=0.01, zero_point=128)
            >>> layer(torch.zeros(3, 4)).shape, float(layer.input_scale) < 0.011
            (torch.Size([3, 2]), True)
        """
        layer, form = cls.from_spec(module, {}), LinearForm.of(module)
        layer.fill(form.weight)
        layer.bias = form.bias
        layer.input_scale.fill_(scale)
        layer.input_zero_point.fill_(zero_point)
        return cast(Int8StaticLinear, layer.train(module.training))

    def spec(self) -> dict[str, Any]:
        """Return the scheme; the sizes are those of the float layer, the scale is a tensor in the file."""
        return {"scheme": self.scheme}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in_features) to (..., out_features), in the dtype of `x`."""
        if torch.compiler.is_compiling():
            given = self.input_scale, self.input_zero_point
            return kernels.int8_static_linear(x, self.weight, self.scale, self.bias, *given)
        return super().forward(x)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        coding = "not loaded yet"
        if not self.input_scale.is_meta:
            coding = f"(x / {float(self.input_scale):.4g} + {int(self.input_zero_point)})"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, inputs={coding}"

    def computed_by(self) -> tuple[kernels.PackedCopy | None, Activations | Stored]:
        """Return the packed copy that computes the product, None where none does, and how it codes activations."""
        buffers = cast("dict[str, torch.Tensor]", self._buffers)
        scale, zero = buffers["input_scale"], buffers["input_zero_point"]
        known = self._stored
        # Read once, not at each call: reading a number out of a tensor waits for the device.
        state = kernels.identity(scale), kernels.identity(zero)
        if known is None or known[0] != state:
            known = self._stored = (state, Stored.of(float(scale), int(zero)))
        # `nn.Module.__setattr__` takes as long as the smallest products.
        if self.activations is not known[1]:
            self.activations = known[1]
        return super().computed_by()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        exact = self.input_scale
        self._stored = None
        super()._apply(fn, recurse)
        if self.input_scale.dtype != exact.dtype:
            self.input_scale = exact.to(self.input_scale.device)
        return self
