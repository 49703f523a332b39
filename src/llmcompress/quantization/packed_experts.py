"""The experts of a mixture with weights of 2 to 8 bits on grids of groups, computed by the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from . import kernels
from .expert_modules import QuantizedExperts
from .grid import Coded, Grid
from .modules import QuantizedModule, Spec
from .packed_matrix import PackedMatrix
from .packed_modules import Compute, grid_from_spec, grid_to_spec
from .packing import pack, packed_width


class PackedExperts(QuantizedExperts):
    """Experts with packed weights.

    Each 3-D weight `W` is stored as `W_codes`, bytes of dtype int8 (experts, outputs, bytes), `W_scale` (experts,
    outputs, groups) and, on a grid with zero points, `W_zero`, uint8 (experts, outputs, bytes): each row as in
    `PackedLinear`.
    """

    scheme = "packed_experts"
    grids: dict[str, Grid]
    compute: Compute
    _products: dict[tuple[str, int], tuple[Any, Any]]
    """What kernels made of the experts called so far, each with what tells whether it still holds."""

    @classmethod
    def from_coded(
        cls,
        module: nn.Module,
        coded: Mapping[str, tuple[Coded, Grid]],
        *,
        transposed: bool,
        compute: Compute = "auto",
    ) -> PackedExperts:
        """Replace float experts; all else that `module` has is shared.

        Args:
            module: the float experts.
            coded: for each weight that is packed its codes, one expert's outputs after the other's, and their grid.
            transposed: whether the float weights are (experts, inputs, outputs).
            compute: how products are computed.

        Example:
            >>> from llmcompress.quantization.fitting import quantize
            >>> from llmcompress.testing import tiny_model
            >>> experts, grid = tiny_model("mixtral").model.layers[0].mlp.experts, Grid(4, 32)
            >>> codes = quantize(experts.down_proj.flatten(0, 1), grid)
            >>> packed = PackedExperts.from_coded(experts, {"down_proj": (codes, grid)}, transposed=False)
            >>> packed.down_proj_codes.shape, packed.down_proj_scale.shape
            (torch.Size([4, 64, 64]), torch.Size([4, 64, 4]))
        """
        grids = {name: grid_to_spec(grid) for name, (_, grid) in coded.items()}
        spec = {"parameters": list(coded), "transposed": transposed, "grids": grids, "compute": compute}
        experts = cls.from_spec(module, spec)
        for name, (codes, grid) in coded.items():
            number = experts.sizes(name)[0]
            packed = pack(codes.codes, grid.bits).view(torch.int8).unflatten(0, (number, -1))
            experts._parameters[f"{name}_codes"] = nn.Parameter(packed, requires_grad=False)
            experts._buffers[f"{name}_scale"] = codes.scale.unflatten(0, (number, -1))
            if codes.zero is not None:
                experts._buffers[f"{name}_zero"] = pack(codes.zero, grid.zero_width).unflatten(0, (number, -1))
        return experts

    def _prepare(self, spec: Spec, device: torch.device) -> None:
        self.compute = spec["compute"]
        self.grids = {name: grid_from_spec(spec["grids"][name]) for name in self._layouts}
        self._products = {}
        shared = []
        for name, grid in self.grids.items():
            experts, outputs, inputs = self.sizes(name)
            groups = grid.groups(inputs)
            codes = torch.empty(experts, outputs, packed_width(inputs, grid.bits), dtype=torch.int8, device=device)
            self.register_parameter(f"{name}_codes", nn.Parameter(codes, requires_grad=False))
            scale = torch.empty(experts, outputs, groups, dtype=grid.scale_dtype, device=device)
            self.register_buffer(f"{name}_scale", scale)
            shared.append(f"{name}_scale")
            if grid.has_zero:
                width = packed_width(groups, grid.zero_width)
                zero = torch.empty(experts, outputs, width, dtype=torch.uint8, device=device)
                self.register_buffer(f"{name}_zero", zero)
                shared.append(f"{name}_zero")
        self._shared = tuple(shared)

    def spec(self) -> dict[str, Any]:
        """Return the scheme, the parameters with their layout, the grid of each, and how to compute."""
        grids = {name: grid_to_spec(grid) for name, grid in self.grids.items()}
        return {**super().spec(), "grids": grids, "compute": self.compute}

    def coded_weights(self) -> list[tuple[torch.Tensor, int]]:
        """Return the packed codes of each weight with the number of weights."""
        numbers = {name: shape.numel() for name, (shape, _) in self._layouts.items()}
        return [(cast(torch.Tensor, self._parameters[f"{name}_codes"]), number) for name, number in numbers.items()]

    def zero_counts(self) -> list[int]:
        """Return for each weight how many codes of all experts stand for 0."""
        return [sum(self._part(name, expert).zeros() for expert in range(self.sizes(name)[0])) for name in self.grids]

    def derived_bytes(self) -> int:
        """Return the bytes of the copies made for kernels, of the experts called so far."""
        return sum(product.nbytes for _, product in self._products.values())

    def drop_derived(self) -> None:
        """Give the memory of those copies back; the next calls make new ones."""
        self._products = {}

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        """Return the float32 weight (outputs, inputs) of one expert."""
        return self._part(name, expert).dequantized()

    def product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., inputs), at least 2-D, to (..., outputs), in the dtype of `x`."""
        codes, scale = self._parameters[f"{name}_codes"], self._buffers[f"{name}_scale"]
        zero = self._buffers.get(f"{name}_zero")
        state = kernels.product_state(cast(torch.Tensor, codes), cast(torch.Tensor, scale), zero, self.compute)
        known = self._products.get((name, expert))
        if known is None or known[0] != state:
            made = kernels.packed_product(self._part(name, expert), self.compute)
            known = self._products[name, expert] = (state, made)
        return cast(torch.Tensor, known[1](x, None, self._part(name, expert)))

    def _part(self, name: str, expert: int) -> PackedMatrix:
        codes, scale = cast(torch.Tensor, self._parameters[f"{name}_codes"]), self._buffers[f"{name}_scale"]
        zero = self._buffers.get(f"{name}_zero")
        return PackedMatrix(
            codes.detach()[expert],
            cast(torch.Tensor, scale)[expert],
            None if zero is None else zero[expert],
            self.grids[name],
            self.sizes(name)[2],
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        self._products = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_products": {}}
