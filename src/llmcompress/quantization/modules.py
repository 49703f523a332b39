"""The layers of a quantized model: plain int8 tensors in the state dict, packed copies made on demand.

The int8 weight is a frozen parameter, not a buffer, since transformers ties only parameters: a head then shares it with
its embedding by the very mechanism that tied the float weight, through saving and loading. The scale is a buffer, since
transformers takes a model's dtype from its first float parameter; a tied layer has none and reads its partner's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CompressionError
from . import kernels
from .affine import dequantize_rows, quantize_rows
from .kernels import Activations, Stored
from .linear_form import LinearForm

Spec = Mapping[str, Any]


class QuantizedModule(nn.Module, ABC):
    """A layer whose weight is stored in another form than float.

    A subclass names its `scheme`, and can be built without weights from the float layer it replaces and the `spec`
    found in a folder's config: that is all a new scheme needs in order to be saved and loaded.

    Args:
        weight: the codes, filled or not.
        shared: the buffers that say what the codes are worth, by name. A layer whose weight is tied has none of its
            own and reads its partner's. They keep their dtype when the model is cast.

    Attributes:
        scheme: the name under which `config.json` knows the class.
        weight: the codes.
        scale: what a step of the codes is worth.
        frozen: names of the weights that were frozen before they were coded, which `dequantize` gives back; not saved.
    """

    scheme: ClassVar[str]
    frozen: frozenset[str] = frozenset()
    weight: nn.Parameter
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, shared: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._shared = tuple(shared)
        for name, tensor in shared.items():
            self.register_buffer(name, tensor)
        self._partner: tuple[QuantizedModule] | None = None

    @classmethod
    @abstractmethod
    def from_spec(cls, module: nn.Module, spec: Spec) -> QuantizedModule:
        """Build the layer that replaces `module`, on its device, with uninitialised weights."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs beside the float layer; JSON values, `scheme` included."""

    @abstractmethod
    def float_weights(self) -> dict[str, torch.Tensor]:
        """Return what the codes stand for, float32, by name and in the shape of a plain linear or expert layer."""

    def tie(self, partner: QuantizedModule) -> None:
        """Share the weight and the scale of `partner`; the state dict then holds the scale once, under the partner."""
        self.weight = partner.weight
        for name in self._shared:
            self._buffers.pop(name, None)
        # In a tuple, the partner does not become a submodule of this layer.
        self._partner = (partner,)

    @property
    def is_tied(self) -> bool:
        """Whether the weight is another module's."""
        return self._partner is not None

    @abstractmethod
    def coded_weights(self) -> list[tuple[torch.Tensor, int]]:
        """Return each stored tensor with the number of weights it stands for."""

    @abstractmethod
    def zero_counts(self) -> list[int]:
        """Return for each of `coded_weights()` how many of its weights stand for exactly 0."""

    def derived_bytes(self) -> int:
        """Return the bytes of copies made for a kernel, which are never saved."""
        return 0

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        exact = {name: self._buffers[name] for name in self._shared if name in self._buffers}
        super()._apply(fn, recurse)
        # `model.to(torch.bfloat16)` casts every float tensor; a scale of 8 bits would double the error of the codes.
        for name, tensor in exact.items():
            now = self._buffers[name]
            if tensor is not None and now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        return self

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__
        if state.get("_partner") is not None and name in state["_shared"]:
            return getattr(state["_partner"][0], name)
        return super().__getattr__(name)


class CodedEmbedding(QuantizedModule):
    """An embedding table in codes: the sizes that models ask a table for, and the dtype that it answers in.

    Attributes:
        num_embeddings: rows.
        embedding_dim: columns.
        padding_idx: as in `nn.Embedding`; kept for the code of models that asks for it.
        output_dtype: of the vectors that are looked up; follows the model when that is cast.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    output_dtype: torch.dtype

    def _describe(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.output_dtype = padding_idx, dtype

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        # No stored tensor has the model's dtype, so a cast is noticed on an empty one that has.
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)


class Int8Module(QuantizedModule):
    """A layer with int8 weights and one scale a row.

    Args:
        rows: outputs, or entries of a table.
        columns: inputs, or the width of an entry.
        device: where the tensors are made.

    Attributes:
        weight: int8 codes (rows, columns).
        scale: float32 (rows,).
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str) -> None:
        codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
        super().__init__(codes, {"scale": torch.empty(rows, dtype=torch.float32, device=device)})

    def fill(self, weight: torch.Tensor) -> None:
        """Quantize a float `weight` (rows, columns) into this layer."""
        codes, self.scale = quantize_rows(weight)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def dequantized(self) -> torch.Tensor:
        """Return the float32 weight (rows, columns)."""
        return dequantize_rows(self.weight, self.scale)

    def float_weights(self) -> dict[str, torch.Tensor]:
        """Return the weight."""
        return {"weight": self.dequantized()}

    def coded_weights(self) -> list[tuple[torch.Tensor, int]]:
        """Return the codes with their number."""
        return [(self.weight, self.weight.numel())]

    def zero_counts(self) -> list[int]:
        """Return how many codes are 0."""
        return [self.weight.numel() - int(torch.count_nonzero(self.weight))]


def no_float_input(layer: nn.Module, given: torch.dtype) -> CompressionError:
    """Return the error of a layer that was given numbers of another kind than floats."""
    return CompressionError(
        f"{type(layer).__name__} needs a float input, got {given}: the model casts to the dtype of the weight; leave "
        f"the layer in float with skip=(...)."
    )


class Int8Linear(Int8Module):
    """A linear layer with int8 weights, one scale an output, and activations coded in 8 bits as they come.

    Takes the place of `nn.Linear` and of transformers' `Conv1D`, whose weight is stored transposed here. The input may
    have any float dtype; the product is computed in int8 and float32, and returned in the input's dtype. There is no
    backward pass.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: whether there is one.
        activations: what shares one scale: the whole input, or each row of it.
        device: where the tensors are made; `"meta"` for loading.
        dtype: of the bias.
    """

    scheme = "int8_linear"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activations: Activations = "token",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(out_features, in_features, device)
        self.in_features = in_features
        self.out_features = out_features
        self.activations: Activations | Stored = activations
        added = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", added)
        self._packed: tuple[Any, kernels.PackedCopy] | None = None

    @classmethod
    def from_spec(cls, module: nn.Module, spec: Spec) -> Int8Linear:
        """Build an empty layer of the size of `module`, an `nn.Linear` or a `Conv1D`."""
        form = LinearForm.of(module)
        return cls(form.inputs, form.outputs, activations=spec["activations"], **form.options)

    @classmethod
    def from_float(cls, module: nn.Module, activations: Activations = "token") -> Int8Linear:
        """Quantize an `nn.Linear` or a `Conv1D`; its bias is shared, its weight is not kept.

        Example:
            >>> layer = Int8Linear.from_float(nn.Linear(4, 2))
            >>> layer.weight.dtype, layer(torch.zeros(3, 4)).shape
            (torch.int8, torch.Size([3, 2]))
        """
        layer, form = cls.from_spec(module, {"activations": activations}), LinearForm.of(module)
        layer.fill(form.weight)
        layer.bias = form.bias
        return layer.train(module.training)

    def spec(self) -> dict[str, Any]:
        """Return the scheme and the grain of the activations."""
        return {"scheme": self.scheme, "activations": self.activations}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., in_features) to (..., out_features), in the dtype of `x`."""
        if torch.compiler.is_compiling():
            return kernels.int8_linear(x, self.weight, self.scale, self.bias, self.activations)
        if x.requires_grad and torch.is_grad_enabled():
            return NoBackward.apply(x, self._product, type(self).__name__)
        return self._product(x)

    def derived_bytes(self) -> int:
        """Return the bytes of the kernel's packed copy, 0 before the first call."""
        return kernels.packed_bytes(self.weight)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, activations={self.activations!r}"

    def computed_by(self) -> tuple[kernels.PackedCopy | None, Activations | Stored]:
        """Return the packed copy that computes the product, None where none does, and how it codes activations."""
        weight, scale, bias = self._tensors()
        known = self._packed
        # Made anew whenever a tensor was replaced or written to.
        if known is None or known[0] != kernels.copy_state(weight, scale, bias, self.activations):
            known = None
            if kernels.takes_copy(weight):
                # One assignment: another thread sees the old copy or the new one, whole.
                known = self._packed = kernels.packed_copy(weight, scale, bias, self.activations)
        return None if known is None else known[1], self.activations

    def _tensors(self) -> tuple[nn.Parameter, torch.Tensor, nn.Parameter | None]:
        # Past `nn.Module.__getattr__`, and in few steps: Python takes as long as the smallest products.
        weight, bias = cast(nn.Parameter, self._parameters["weight"]), self._parameters["bias"]
        return weight, self.scale if self._partner is not None else cast(torch.Tensor, self._buffers["scale"]), bias

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2:
            return self._product(x.unsqueeze(0)).squeeze(0)
        given = x.dtype
        if given is not torch.float32:
            if not given.is_floating_point:
                raise no_float_input(self, given)
            x = x.float()
        copy, activations = self.computed_by()
        if copy is not None:
            y = copy(x, self._parameters["bias"], activations)
        else:
            weight, scale, bias = self._tensors()
            y = kernels.unpacked_linear(x, weight, scale, bias, activations)
        return y if given is torch.float32 else y.to(given)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        kernels.forget_copy(self.weight)
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


class Int8Embedding(CodedEmbedding, Int8Module):
    """An embedding table in int8 with one scale a row, returned in `output_dtype`.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        padding_idx: as in `nn.Embedding`; kept for the code of models that asks for it.
        device: where the tensors are made; `"meta"` for loading.
        dtype: of the vectors that are looked up; follows the model when that is cast.
    """

    scheme = "int8_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device)
        self._describe(num_embeddings, embedding_dim, padding_idx, dtype)

    @classmethod
    def from_spec(cls, module: nn.Module, spec: Spec) -> Int8Embedding:
        """Build an empty table of the size of `module`, an `nn.Embedding`."""
        weight = cast(torch.Tensor, module.weight)
        padding = cast("int | None", module.padding_idx)
        return cls(*weight.shape, padding_idx=padding, device=weight.device, dtype=weight.dtype)

    @classmethod
    def from_float(cls, module: nn.Embedding) -> Int8Embedding:
        """Quantize an `nn.Embedding`.

        Example:
            >>> table = Int8Embedding.from_float(nn.Embedding(10, 4))
            >>> table(torch.tensor([[1, 2, 3]])).shape
            torch.Size([1, 3, 4])
        """
        table = cls.from_spec(module, {})
        table.fill(module.weight)
        return cast(Int8Embedding, table.train(module.training))

    def spec(self) -> dict[str, Any]:
        """Return the scheme; the sizes are those of the float layer."""
        return {"scheme": self.scheme}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map `ids` (...) to vectors (..., embedding_dim)."""
        codes = F.embedding(ids, self.weight)
        return (codes.to(torch.float32) * self.scale[ids].unsqueeze(-1)).to(self.output_dtype)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value of `replacements` in every place where its key stands in `model`."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]


class NoBackward(torch.autograd.Function):
    """Runs `product(x)`; says clearly what is missing where torch would return a silent zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor], who: str) -> torch.Tensor:
        """Compute the product, and keep the name of the layer for the message."""
        ctx.who = who
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Refuse."""
        raise CompressionError(
            f"{ctx.who} has no backward pass: a quantized model cannot be trained; train first and quantize last."
        )
