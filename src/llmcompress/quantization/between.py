"""What stands between the products of a quantized model, in the native kernels: activation functions and norms.

Where products are fast, these are a tenth of the time and more: torch's GELU takes twice as long as it must, and a
Llama's norm is seven operators. The modules here take the place of a model's own when it is quantized, and again when
it is loaded: nothing of them is saved, and names, parameters and state dict stay what they were.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .kernels.native import Gate, Native, activate, layer_norm, native, rms_norm
from .modules import replace_modules

# Where functions without parameters or state are found, which may be called in order to see what they are.
_FUNCTIONS = ("transformers.activations", "torch.nn.modules.activation")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Between(nn.Module, ABC):
    """Computes what `plain` does: in one pass where it can, that is for float32 on the CPU without a backward pass.

    Args:
        plain: the module whose place it takes; it runs in all other cases, traced by `torch.compile` among them.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        # In a tuple it is no submodule, so that its parameters are not in the state dict a second time.
        self._plain = (plain,)
        self.train(plain.training)

    @property
    def plain(self) -> nn.Module:
        """The module whose place this one has, with the parameters that this one has now."""
        plain = self._plain[0]
        # Written only where it changes something, which a compiled graph may not do.
        for name, parameter in self._parameters.items():
            if plain._parameters[name] is not parameter:
                plain._parameters[name] = parameter
        return plain if plain.training == self.training else plain.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` to a new tensor of its shape."""
        if torch.compiler.is_compiling() or x.dtype is not torch.float32 or not x.is_cpu:
            return cast(torch.Tensor, self.plain(x))
        if x.numel() == 0 or (torch.is_grad_enabled() and self._has_gradient(x)):
            return cast(torch.Tensor, self.plain(x))
        return self._compute(x.contiguous())

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the module."""
        return f"native {self._plain[0]}"

    @abstractmethod
    def _has_gradient(self, x: torch.Tensor) -> bool:
        """Tell whether there would be a backward pass."""

    @abstractmethod
    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the result for contiguous float32 `x` on the CPU."""


class Activation(Between):
    """An activation function.

    Args:
        plain: the module whose place it takes.
        gate: the function that it is.
    """

    def __init__(self, plain: nn.Module, gate: Gate) -> None:
        super().__init__(plain)
        self.gate: Gate = gate

    def _has_gradient(self, x: torch.Tensor) -> bool:
        return x.requires_grad

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        kernels = native()
        return self.plain(x) if kernels is None else activate(self.gate, x, kernels)


class Norm(Between):
    """A norm of rows; its parameters are shared with the module whose place it takes.

    Args:
        plain: that module.
        epsilon: added to the mean of squares.
    """

    weight: nn.Parameter

    def __init__(self, plain: nn.Module, epsilon: float) -> None:
        super().__init__(plain)
        for name, parameter in plain._parameters.items():
            self.register_parameter(name, parameter)
        self.epsilon = epsilon

    @property
    def tensors(self) -> tuple[torch.Tensor, ...] | None:
        """The parameters as a kernel reads them, or None where it cannot."""
        found: tuple[Any, ...] = tuple(self._parameters.values())
        return found if all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in found) else None

    def _has_gradient(self, x: torch.Tensor) -> bool:
        return x.requires_grad or any(cast(nn.Parameter, p).requires_grad for p in self._parameters.values())

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        tensors, kernels = self.tensors, native()
        if kernels is None or tensors is None or x.shape[-1:] != tensors[0].shape:
            return cast(torch.Tensor, self.plain(x))
        return self._normalize(x, tensors, kernels)

    @abstractmethod
    def _normalize(self, x: torch.Tensor, tensors: tuple[torch.Tensor, ...], kernels: Native) -> torch.Tensor:
        """Call the kernel."""


class RMSNorm(Norm):
    """A root mean square norm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Args:
        plain: the module whose place it takes.
        epsilon: added to the mean of squares.
        offset: added to the weight: 1 in Gemma's.
    """

    def __init__(self, plain: nn.Module, epsilon: float, offset: float = 0.0) -> None:
        super().__init__(plain, epsilon)
        self.offset = offset

    def _normalize(self, x: torch.Tensor, tensors: tuple[torch.Tensor, ...], kernels: Native) -> torch.Tensor:
        return rms_norm(x, tensors[0], self.epsilon, kernels, self.offset)


class LayerNorm(Norm):
    """A layer norm with a bias (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""

    def _normalize(self, x: torch.Tensor, tensors: tuple[torch.Tensor, ...], kernels: Native) -> torch.Tensor:
        return layer_norm(x, tensors[0], tensors[1], self.epsilon, kernels)


def use_native(model: nn.Module) -> None:
    """Put the modules of this file in the place of those of `model` that compute the same, as far as can be seen.

    What a module computes is found by trying it. Modules with hooks stay, and all where there are no native kernels.

    Example:
        >>> model = nn.Sequential(nn.GELU(), nn.Tanh())
        >>> use_native(model)
        >>> torch.allclose(model[0](torch.ones(2)), F.gelu(torch.ones(2))), type(model[1]).__name__
        (True, 'Tanh')
    """
    if native() is None:
        return
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, Between) or any(getattr(module, name) for name in _HOOKS):
            continue
        found = _activation(module) or _layer_norm(module) or _rms_norm(module)
        if found is not None:
            replacements[module] = found
    replace_modules(model, replacements)


def use_plain(model: nn.Module) -> None:
    """Give `model` its own modules back: the reverse of `use_native`."""
    replace_modules(model, {module: module.plain for module in model.modules() if isinstance(module, Between)})


def is_function(module: nn.Module) -> bool:
    """Tell whether a module of torch or transformers is a function of its input, such as an activation function.

    Example:
        >>> is_function(nn.GELU()), is_function(nn.PReLU()), is_function(nn.Dropout())
        (True, False, False)
    """
    return type(module).__module__ in _FUNCTIONS and not (module._parameters or module._buffers or module._modules)


def _tried(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Return what `module` makes of `x`, or None if it cannot take it, or may be given more."""
    taken = list(inspect.signature(module.forward).parameters.values())
    # A norm that may get a gate as well is another function.
    if len(taken) != 1 or taken[0].kind is not taken[0].POSITIONAL_OR_KEYWORD:
        return None
    try:
        y = module(x.clone())
    except Exception:
        # Whatever a model's own code raises: one that wants another shape or type is none of those here.
        return None
    return y if isinstance(y, torch.Tensor) and y.shape == x.shape and y.dtype is x.dtype else None


def _activation(module: nn.Module) -> Activation | None:
    if not is_function(module):
        return None
    x = torch.linspace(-6, 6, 49, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected: dict[Gate, torch.Tensor] = {
            "gelu": F.gelu(x),
            "gelu_tanh": F.gelu(x, approximate="tanh"),
            "silu": F.silu(x),
        }
        y = _tried(module, x)
    for gate, known in expected.items():
        if y is not None and torch.allclose(y, known, rtol=0, atol=2e-6):
            return Activation(module, gate)
    return None


def _layer_norm(module: nn.Module) -> LayerNorm | None:
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1 or module._modules:
        return None
    tensors = list(module._parameters.values())
    known = len(tensors) == 2 and all(t is not None and t.dtype is torch.float32 and t.is_cpu for t in tensors)
    return LayerNorm(module, module.eps) if known else None


def _rms_norm(module: nn.Module) -> RMSNorm | None:
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if not isinstance(epsilon, float) or weight is None or module._buffers or module._modules:
        return None
    if len(module._parameters) > 1 or weight.dim() != 1 or weight.dtype is not torch.float32 or not weight.is_cpu:
        return None
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        # Small rows, of which the epsilon is a part.
        x[1] *= epsilon**0.5
        y, normed = _tried(module, x), x * (x.square().mean(1, keepdim=True) + epsilon).rsqrt()
        for offset in (0.0, 1.0):
            if y is not None and torch.allclose(y, normed * (weight + offset), rtol=1e-5):
                return RMSNorm(module, epsilon, offset)
    return None
