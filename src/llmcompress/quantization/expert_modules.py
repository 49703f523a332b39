"""The experts of a mixture in another form than float, computed by the model's own code.

transformers keeps the experts of a block as 3-D parameters of one module, whose forward routes tokens and multiplies by
`self.gate_up_proj[expert]`. Here that module stays of its class, with all its attributes and its forward; only what
`self.gate_up_proj` gives is no tensor but an `ExpertWeight`, which stands for one: a product with it is computed from
the codes, and whatever else is done with it gets the float weight. So gates, biases, limits and clamps of any
architecture stay as they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from types import new_class
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn
from transformers.integrations import moe

from ..errors import CheckpointError
from . import kernels
from .affine import dequantize_rows, quantize_rows
from .expert_weight import ExpertWeight
from .kernels import Activations
from .modules import QuantizedModule, Spec

Self = TypeVar("Self", bound="QuantizedExperts")


class QuantizedExperts(QuantizedModule):
    """The experts of one block, with some or all of their 3-D weights stored in another form than float.

    Made only by `from_spec` and `from_float`: an object is of a class of its own, made of this one and the class of the
    float experts, and has the attributes of those. A subclass says what it stores for a weight and how it multiplies.

    Attributes:
        float_class: the class of the float experts.
    """

    float_class: ClassVar[type[nn.Module]]
    scheme_class: ClassVar[type[QuantizedExperts]]
    _layouts: dict[str, tuple[torch.Size, bool]]
    """Parameter -> shape of the float weight, and whether it is (experts, inputs, outputs)."""
    _dtype: torch.dtype
    _shared: tuple[str, ...]
    """Names of the buffers that say what the codes are worth; they keep their dtype when the model is cast."""

    @classmethod
    def from_spec(cls: type[Self], module: nn.Module, spec: Spec) -> Self:
        """Build the experts that replace `module`, on its device, with uninitialised codes.

        Raises:
            CheckpointError: a parameter that `spec` names is no 3-D weight of `module`.
        """
        experts = cast(Self, _blank(cls, cast(Hashable, type(module))))
        # What holds tensors, modules and hooks is copied one level deep; the tensors and modules themselves are shared.
        for name, value in vars(module).items():
            experts.__dict__[name] = value.copy() if isinstance(value, (dict, set)) and name[0] == "_" else value
        layouts: dict[str, tuple[torch.Size, bool]] = {}
        for name in spec["parameters"]:
            weight = experts._parameters.pop(name, None)
            if weight is None or weight.dim() != 3:
                raise CheckpointError(
                    f"config.json: quantization_config names {name!r} of {type(module).__name__}, which is no 3-D "
                    "weight there; the file is damaged: save the model again."
                )
            layouts[name] = (weight.shape, bool(spec["transposed"]))
        experts.__dict__.update(_layouts=layouts, _dtype=weight.dtype, _partner=None)
        experts._prepare(spec, weight.device)
        return experts

    @abstractmethod
    def _prepare(self, spec: Spec, device: torch.device) -> None:
        """Read what else is in `spec`, and register empty tensors for each of `_layouts`."""

    @abstractmethod
    def matrix(self, name: str, expert: int) -> torch.Tensor:
        """Return the float32 weight (outputs, inputs) of one expert."""

    @abstractmethod
    def product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., inputs), at least 2-D, to (..., outputs), in the dtype of `x`."""

    def float_weights(self) -> dict[str, torch.Tensor]:
        """Return each weight in the shape that it has in the float experts."""
        weights = {}
        for name, (shape, transposed) in self._layouts.items():
            whole = torch.stack([self.matrix(name, expert) for expert in range(shape[0])])
            weights[name] = whole.mT.contiguous() if transposed else whole
        return weights

    def spec(self) -> dict[str, Any]:
        """Return the scheme, the parameters that are stored so, and whether the float ones are (., inputs, outputs)."""
        transposed = any(transposed for _, transposed in self._layouts.values())
        return {"scheme": self.scheme, "parameters": list(self._layouts), "transposed": transposed}

    def float_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each float weight that is stored in another form."""
        return {name: tuple(shape) for name, (shape, _) in self._layouts.items()}

    def sizes(self, name: str) -> tuple[int, int, int]:
        """Return the number of experts, their outputs, and their inputs."""
        (experts, first, second), transposed = self._layouts[name]
        return (experts, second, first) if transposed else (experts, first, second)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        # No stored tensor has the model's dtype, so a cast is noticed on an empty one that has.
        device = next(self.parameters(recurse=False)).device
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=device)).dtype
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        layout = self.__dict__.get("_layouts", {}).get(name)
        if layout is not None:
            return ExpertWeight(self, name, layout[0], self._dtype, layout[1])
        return super().__getattr__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the two classes, since the one made of them can be found by no name."""
        return _blank, (self.scheme_class, self.float_class), self.__getstate__()


class Int8Experts(QuantizedExperts):
    """Experts with int8 weights, one scale an output, and activations coded in 8 bits as they come.

    Each 3-D weight `W` is stored as `W_codes`, int8 (experts, outputs, inputs), and `W_scale`, float32 (experts,
    outputs). The tokens of one expert are a call of their own: with `activations="tensor"` they share one scale.
    """

    scheme = "int8_experts"
    activations: Activations
    _parts: dict[str, tuple[tuple[torch.Tensor, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]]
    """Parameter -> codes and scales, and the views of each expert's, for which kernels keep their copies."""

    @classmethod
    def from_float(
        cls, module: nn.Module, parameters: Sequence[str], *, transposed: bool, activations: Activations = "token"
    ) -> Int8Experts:
        """Quantize some of the 3-D weights of `module`; all else that it has is shared.

        Args:
            module: the float experts.
            parameters: names of the weights.
            transposed: whether they are stored (experts, inputs, outputs).
            activations: what shares one scale: all tokens of an expert, or each one of them.

        Example:
            >>> from llmcompress.testing import tiny_model
            >>> experts = tiny_model("mixtral").model.layers[0].mlp.experts
            >>> coded = Int8Experts.from_float(experts, ["gate_up_proj", "down_proj"], transposed=False)
            >>> type(coded).__name__, coded.down_proj_codes.shape, isinstance(coded, type(experts))
            ('Int8MixtralExperts', torch.Size([4, 64, 128]), True)
        """
        spec = {"parameters": parameters, "transposed": transposed, "activations": activations}
        experts = cls.from_spec(module, spec)
        for name in parameters:
            weight = cast(torch.Tensor, module._parameters[name]).detach()
            experts.store(name, weight.mT if transposed else weight)
        return experts

    def _prepare(self, spec: Spec, device: torch.device) -> None:
        self.activations = spec["activations"]
        self._shared = tuple(f"{name}_scale" for name in self._layouts)
        self._parts = {}
        for name in self._layouts:
            experts, outputs, inputs = self.sizes(name)
            codes = torch.empty(experts, outputs, inputs, dtype=torch.int8, device=device)
            self.register_parameter(f"{name}_codes", nn.Parameter(codes, requires_grad=False))
            self.register_buffer(f"{name}_scale", torch.empty(experts, outputs, dtype=torch.float32, device=device))

    def spec(self) -> dict[str, Any]:
        """Return the scheme, the parameters with their layout, and the grain of the activations."""
        return {**super().spec(), "activations": self.activations}

    def coded_weights(self) -> list[tuple[torch.Tensor, int]]:
        """Return the codes of each weight with their number."""
        return [(codes, codes.numel()) for codes in map(self._codes, self._layouts)]

    def zero_counts(self) -> list[int]:
        """Return for each weight how many codes are 0."""
        return [codes.numel() - int(torch.count_nonzero(codes)) for codes in map(self._codes, self._layouts)]

    def derived_bytes(self) -> int:
        """Return the bytes of the copies made for kernels, of the experts called so far."""
        return sum(kernels.packed_bytes(codes) for _, parts in self._parts.values() for codes, _ in parts)

    def store(self, name: str, weight: torch.Tensor) -> None:
        """Quantize the float weight (experts, outputs, inputs) of the parameter `name`, one expert after the other."""
        codes, scale = self._codes(name), self._scale(name)
        with torch.no_grad():
            for expert, matrix in enumerate(weight):
                codes[expert], scale[expert] = quantize_rows(matrix)

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        """Return the float32 weight (outputs, inputs) of one expert."""
        return dequantize_rows(self._codes(name)[expert], self._scale(name)[expert])

    def product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (..., inputs), at least 2-D, to (..., outputs), in the dtype of `x`."""
        exact = x if x.dtype == torch.float32 else x.float()
        codes, scale = self._part(name, expert)
        if kernels.takes_copy(codes):
            y = kernels.packed_copy(codes, scale, None, self.activations)[1](exact, None, self.activations)
        else:
            y = kernels.unpacked_linear(exact, codes, scale, None, self.activations)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def _part(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scale of one expert: always the same views, as long as the whole is the same tensor."""
        whole = (self._codes(name), self._scale(name))
        known = self._parts.get(name)
        if known is None or known[0][0] is not whole[0] or known[0][1] is not whole[1]:
            views = list(zip(whole[0].detach().unbind(), whole[1].unbind(), strict=True))
            known = self._parts[name] = (whole, views)
        return known[1][expert]

    def _codes(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[f"{name}_codes"])

    def _scale(self, name: str) -> torch.Tensor:
        return cast(torch.Tensor, self._buffers[f"{name}_scale"])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModule:
        self._parts = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}


@cache
def _class_of(scheme: Any, experts: Any) -> Any:
    """Return the class of `experts` that are stored by `scheme`."""
    prefix = scheme.__name__.removesuffix("Experts")
    body: dict[str, Any] = {"float_class": experts, "scheme_class": scheme, "__module__": scheme.__module__}
    if getattr(experts.forward, "__globals__", None) is vars(moe):
        # transformers' switch between implementations: those that take all experts at once would want all as floats.
        body["forward"] = experts.forward.__wrapped__
    return new_class(f"{prefix}{experts.__name__}", (scheme, experts), exec_body=lambda space: space.update(body))


def _blank(scheme: Hashable, experts: Hashable) -> Any:
    made = _class_of(scheme, experts)
    return made.__new__(made)
