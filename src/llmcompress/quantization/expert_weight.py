"""What stands for a 3-D weight of experts, or for one expert's matrix, in the code of a model.

torch hands every function that gets such an object to `__torch_function__`. A product `x @ weight[expert]` or
`F.linear(x, weight[expert])` is computed from the codes; any other function gets the float weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..anatomy.reads import PRODUCTS
from .modules import NoBackward

if TYPE_CHECKING:
    from .expert_modules import QuantizedExperts


class ExpertWeight:
    """A weight in codes that is used like the tensor it stands for.

    Args:
        owner: the experts that hold the codes.
        name: the parameter.
        shape: of the tensor: (experts, ., .), or (., .) of one expert.
        dtype: of the tensor.
        transposed: whether the last axis runs over the outputs.
        expert: which one; None for all.
    """

    __slots__ = ("dtype", "expert", "name", "owner", "shape", "transposed")
    # transformers fills what was not loaded, and asks every weight for this mark.
    _is_hf_initialized = True

    def __init__(
        self,
        owner: QuantizedExperts,
        name: str,
        shape: torch.Size,
        dtype: torch.dtype,
        transposed: bool,
        expert: int | None = None,
    ) -> None:
        self.owner, self.name, self.shape, self.dtype = owner, name, shape, dtype
        self.transposed, self.expert = transposed, expert

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return next(self.owner.parameters(recurse=False)).device

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> torch.Size | int:
        """Return the shape, or the length of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def transpose(self, first: int, second: int) -> ExpertWeight | torch.Tensor:
        """Swap two axes: the last two without any work, others of the float weight."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 1, self.ndim - 2}:
            return self.dequantized().transpose(first, second)
        shape = torch.Size((*self.shape[:-2], self.shape[-1], self.shape[-2]))
        return ExpertWeight(self.owner, self.name, shape, self.dtype, not self.transposed, self.expert)

    @property
    def mT(self) -> ExpertWeight | torch.Tensor:  # noqa: N802
        """The weight with its last two axes swapped."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> ExpertWeight | torch.Tensor:  # noqa: N802
        """The weight with its axes in reverse order."""
        return self.transpose(0, 1) if self.ndim == 2 else self.dequantized().permute(2, 1, 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> ExpertWeight | torch.Tensor:
        whole = isinstance(key, torch.Tensor) and key.dim() == 0 and key.dtype in (torch.int64, torch.int32)
        if self.expert is None and (whole or type(key) is int):
            expert = range(self.shape[0])[int(key)]
            return ExpertWeight(self.owner, self.name, self.shape[1:], self.dtype, self.transposed, expert)
        return self.dequantized()[key]

    def dequantized(self) -> torch.Tensor:
        """Return the float tensor that this one stands for."""
        if self.expert is None:
            stack = torch.stack([self.owner.matrix(self.name, expert) for expert in range(self.shape[0])])
        else:
            stack = self.owner.matrix(self.name, self.expert)
        return (stack.mT if self.transposed else stack).to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor can do, the float tensor does."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dequantized(), name)

    def __repr__(self) -> str:
        which = "" if self.expert is None else f"[{self.expert}]"
        return f"ExpertWeight({type(self.owner).__name__}.{self.name}{which}, {tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = None
        if func is F.linear:
            product = _linear(*args, **kwargs)
        elif func in PRODUCTS and not kwargs:
            product = _matmul(*args)
        if product is not None:
            return product
        return func(*_as_floats(args), **{key: _as_floats(value) for key, value in kwargs.items()})

    def multiply(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return `x` (..., inputs) times the weight, or None where the shapes do not fit."""
        if self.expert is not None:
            return self._one(x, self.expert)
        if x.dim() != 3 or len(x) != len(self):
            return None
        return torch.stack([self._one(own, expert) for expert, own in enumerate(x)])

    def _one(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        if x.dim() < 2:
            return self._one(x.unsqueeze(0), expert).squeeze(0)
        if x.requires_grad and torch.is_grad_enabled():
            return NoBackward.apply(x, lambda x: self.owner.product(self.name, expert, x), type(self.owner).__name__)
        return self.owner.product(self.name, expert, x)


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    if not isinstance(input, torch.Tensor) or not isinstance(weight, ExpertWeight):
        return None
    product = None if weight.transposed or weight.expert is None else weight.multiply(input)
    return product if product is None or bias is None else product + bias


def _matmul(left: Any, right: Any) -> torch.Tensor | None:
    if isinstance(left, torch.Tensor) and isinstance(right, ExpertWeight) and right.transposed:
        return right.multiply(left)
    return None


def _as_floats(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_as_floats(item) for item in value)
    return value.dequantized() if isinstance(value, ExpertWeight) else value
