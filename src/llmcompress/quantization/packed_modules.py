"""Layers whose weights are codes of 2 to 8 bits on a grid of groups, packed without a wasted bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn

from . import kernels
from .grid import Coded, Grid, decode
from .linear_form import LinearForm
from .modules import CodedEmbedding, NoBackward, QuantizedModule, Spec, no_float_input
from .packed_matrix import PackedMatrix
from .packing import pack, packed_width, unpack

Compute = Literal["auto", "int8", "float"]
"""How a packed weight is multiplied; see `WeightOnlyQuantization`."""


def grid_to_spec(grid: Grid) -> dict[str, Any]:
    """Return `grid` as JSON values, which `grid_from_spec` reads."""
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "codebook": grid.codebook,
        "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        "zero_bits": grid.zero_bits,
    }


def grid_from_spec(spec: Spec) -> Grid:
    """Return the grid that a folder's config describes."""
    dtype = getattr(torch, spec["scale_dtype"])
    return Grid(spec["bits"], spec["group_size"], spec["symmetric"], spec["codebook"], dtype, spec["zero_bits"])


class PackedModule(QuantizedModule):
    """A layer with packed codes.

    Args:
        rows: outputs, or entries of a table.
        columns: inputs, or the width of an entry.
        grid: what the codes mean.
        device: where the tensors are made.

    Attributes:
        weight: (rows, bytes): the codes of a row as a bit stream, see `packing`. Bytes of dtype int8, not uint8, since
            models that cast an input to the dtype of a weight (T5) know int8 as one not to cast to.
        scale: (rows, groups), in the grid's scale dtype.
        zero: uint8 (rows, bytes): the zero points, packed like the codes; only on grids that have some.
    """

    def __init__(self, rows: int, columns: int, grid: Grid, device: torch.device | str) -> None:
        groups = grid.groups(columns)
        shared = {"scale": torch.empty(rows, groups, dtype=grid.scale_dtype, device=device)}
        if grid.has_zero:
            shared["zero"] = torch.empty(rows, packed_width(groups, grid.zero_width), dtype=torch.uint8, device=device)
        codes = torch.empty(rows, packed_width(columns, grid.bits), dtype=torch.int8, device=device)
        super().__init__(codes, shared)
        self.grid = grid
        self.rows = rows
        self.columns = columns

    def fill(self, coded: Coded) -> None:
        """Take over the codes of a matrix (rows, columns)."""
        self.weight = nn.Parameter(pack(coded.codes, self.grid.bits).view(torch.int8), requires_grad=False)
        self.scale = coded.scale
        if coded.zero is not None:
            self.zero = pack(coded.zero, self.grid.zero_width)

    def matrix(self) -> PackedMatrix:
        """Return the tensors as kernels take them."""
        zero = self.zero if self.grid.has_zero else None
        return PackedMatrix(self.weight, self.scale, zero, self.grid, self.columns)

    def coded(self) -> Coded:
        """Return the codes, unpacked."""
        return self.matrix().coded()

    def dequantized(self) -> torch.Tensor:
        """Return the float32 weight (rows, columns)."""
        return decode(self.coded(), self.grid)

    def float_weights(self) -> dict[str, torch.Tensor]:
        """Return the weight."""
        return {"weight": self.dequantized()}

    def coded_weights(self) -> list[tuple[torch.Tensor, int]]:
        """Return the packed codes with the number of weights."""
        return [(self.weight, self.rows * self.columns)]

    def zero_counts(self) -> list[int]:
        """Return how many codes stand for 0."""
        return [self.matrix().zeros()]

    def spec(self) -> dict[str, Any]:
        """Return the scheme and the grid."""
        return {"scheme": self.scheme, **grid_to_spec(self.grid)}

    def _grid_repr(self) -> str:
        grid = self.grid
        kind = grid.codebook or ("symmetric" if grid.symmetric else "affine")
        return f"bits={grid.bits}, group_size={grid.group_size}, {kind}"


class PackedLinear(PackedModule):
    """A linear layer with packed weights. Takes the place of `nn.Linear` and of transformers' `Conv1D`.

    The input may have any float dtype; the result has the input's. There is no backward pass.

    Args:
        in_features: inputs.
        out_features: outputs.
        grid: what the codes mean.
        bias: whether there is one.
        compute: how the product is computed; see `WeightOnlyQuantization`.
        device: where the tensors are made; `"meta"` for loading.
        dtype: of the bias.
    """

    scheme = "packed_linear"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: Grid,
        *,
        bias: bool = True,
        compute: Compute = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(out_features, in_features, grid, device)
        self.in_features = in_features
        self.out_features = out_features
        self.compute: Compute = compute
        added = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", added)
        self._derived: tuple[Any, kernels.Product, PackedMatrix] | None = None

    @classmethod
    def from_spec(cls, module: nn.Module, spec: Spec) -> PackedLinear:
        """Build an empty layer of the size of `module`, an `nn.Linear` or a `Conv1D`."""
        form = LinearForm.of(module)
        return cls(form.inputs, form.outputs, grid_from_spec(spec), compute=spec["compute"], **form.options)

    @classmethod
    def from_coded(cls, module: nn.Module, coded: Coded, grid: Grid, compute: Compute = "auto") -> PackedLinear:
        """Replace an `nn.Linear` or a `Conv1D` whose weight, outputs first, is `coded`; its bias is shared.

        Example:
            >>> from llmcompress.quantization.grid import encode, min_max
            >>> linear, grid = nn.Linear(64, 2), Grid(4, 32)
            >>> scale, zero = min_max(linear.weight.detach(), grid)
            >>> coded = Coded(encode(linear.weight.detach(), scale, zero, grid), scale, zero)
            >>> layer = PackedLinear.from_coded(linear, coded, grid)
            >>> layer.weight.shape, layer(torch.zeros(3, 64)).shape
            (torch.Size([2, 32]), torch.Size([3, 2]))
        """
        layer = cls.from_spec(module, {**grid_to_spec(grid), "compute": compute})
        layer.fill(coded)
        layer.bias = cast("nn.Parameter | None", module.bias)
        return layer.train(module.training)

    def spec(self) -> dict[str, Any]:
        """Return the scheme, the grid, and how to compute."""
        return {**super().spec(), "compute": self.compute}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in_features) to (..., out_features), in the dtype of `x`."""
        if torch.compiler.is_compiling():
            return self._operator(x)
        if x.requires_grad and torch.is_grad_enabled():
            return cast(torch.Tensor, NoBackward.apply(x, self._product, type(self).__name__))
        return self._product(x)

    def derived_bytes(self) -> int:
        """Return the bytes of the copy made for a kernel, 0 before the first call."""
        return self._derived[1].nbytes if self._derived is not None else 0

    def drop_derived(self) -> None:
        """Give the memory of that copy back; the next call makes a new one."""
        self._derived = None
        kernels.forget_product(self.weight)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._grid_repr()}, compute={self.compute!r}"

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise no_float_input(self, x.dtype)
        if x.dim() < 2:
            return self._product(x.unsqueeze(0)).squeeze(0)
        product, bias, matrix = self.computed_by()
        return product(x, bias, matrix)

    def computed_by(self) -> tuple[kernels.Product, nn.Parameter | None, PackedMatrix]:
        """Return what computes the product, the bias, and the matrix."""
        # Past `nn.Module.__getattr__`, and in few steps: Python takes as long as the smallest products.
        weight, buffers = cast(nn.Parameter, self._parameters["weight"]), cast("dict[str, torch.Tensor]", self._buffers)
        if self._partner is None:
            scale, zero = buffers["scale"], buffers.get("zero")
        else:
            scale, zero = self.scale, self.zero if self.grid.has_zero else None
        known = self._derived
        # Made anew when a tensor was replaced or written to.
        if known is None or known[0] != kernels.product_state(weight, scale, zero, self.compute):
            matrix = self.matrix()
            # One assignment: another thread sees the old product or the new one, whole.
            known = self._derived = (*kernels.product_of(matrix, self.compute), matrix)
        return known[1], self._parameters["bias"], known[2]

    def _operator(self, x: torch.Tensor) -> torch.Tensor:
        grid, zero = self.grid, self.zero if self.grid.has_zero else None
        return kernels.packed_linear(
            x,
            self.weight,
            self.scale,
            zero,
            self.bias,
            self.columns,
            grid.bits,
            grid.group_size,
            grid.symmetric,
            grid.codebook,
            grid.zero_bits,
            self.compute,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        self.drop_derived()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": None}


class PackedEmbedding(CodedEmbedding, PackedModule):
    """An embedding table with packed rows, returned in `output_dtype`.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        grid: what the codes mean.
        padding_idx: as in `nn.Embedding`; kept for the code of models that asks for it.
        device: where the tensors are made; `"meta"` for loading.
        dtype: of the vectors that are looked up; follows the model when that is cast.
    """

    scheme = "packed_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        grid: Grid,
        *,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, grid, device)
        self._describe(num_embeddings, embedding_dim, padding_idx, dtype)

    @classmethod
    def from_spec(cls, module: nn.Module, spec: Spec) -> PackedEmbedding:
        """Build an empty table of the size of `module`, an `nn.Embedding`."""
        weight = cast(torch.Tensor, module.weight)
        rows, columns = weight.shape
        padding = cast("int | None", module.padding_idx)
        return cls(rows, columns, grid_from_spec(spec), padding_idx=padding, device=weight.device, dtype=weight.dtype)

    @classmethod
    def from_coded(cls, module: nn.Embedding, coded: Coded, grid: Grid) -> PackedEmbedding:
        """Replace an `nn.Embedding` whose weight is `coded`."""
        table = cls.from_spec(module, grid_to_spec(grid))
        table.fill(coded)
        return cast(PackedEmbedding, table.train(module.training))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map `ids` (...) to vectors (..., embedding_dim)."""
        flat = ids.reshape(-1)
        codes = unpack(self.weight.index_select(0, flat).view(torch.uint8), self.grid.bits, self.columns)
        scale = self.scale.index_select(0, flat)
        zero = None
        if self.grid.has_zero:
            zero = unpack(self.zero.index_select(0, flat), self.grid.zero_width, scale.shape[1])
        rows = decode(Coded(codes, scale, zero), self.grid)
        return rows.to(self.output_dtype).view(*ids.shape, self.columns)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"{super().extra_repr()}, {self._grid_repr()}"
