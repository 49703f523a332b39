"""What single blocks cost: their bytes in a file, and the time of a pass through them on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.saved import file_bytes, saved_tensors
from ..calibration.replay import replaced
from ..evaluation.latency import forward_inputs, least_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEWEST, _SECONDS = 8, 0.15


def bytes_of_blocks(model: PreTrainedModel, blocks: Sequence[str]) -> tuple[list[float], float]:
    """Return the bytes of each block in the safetensors file of `model`, its part of the header included, and the rest.

    Example:
        >>> from llmcompress.anatomy.footprint import disk_bytes
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> own, rest = bytes_of_blocks(model, ["bert.encoder.layer.0", "bert.encoder.layer.1"])
        >>> abs(sum(own) + rest - disk_bytes(model)) < 200
        True
    """
    tensors = saved_tensors(model)
    parts: dict[str, dict[str, torch.Tensor]] = {path: {} for path in blocks}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        # A classifier's folder has the names of its encoder with or without the prefix of the class.
        path = next((path for path in blocks if f".{name}".find(f".{path}.") >= 0), None)
        (rest if path is None else parts[path])[name] = tensor
    empty = file_bytes({})
    return [float(file_bytes(own) - empty) for own in parts.values()], float(file_bytes(rest))


def alike(model: PreTrainedModel, blocks: Sequence[str]) -> list[int]:
    """Return for each block the number of the first one of its stack with the same tensors: those cost the same.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> alike(tiny_model("bert"), ["bert.encoder.layer.0", "bert.encoder.layer.1"])
        [0, 0]
    """
    first: dict[object, int] = {}
    found = []
    for number, path in enumerate(blocks):
        tensors = tuple((name, tuple(tensor.shape)) for name, tensor in model.get_submodule(path).state_dict().items())
        found.append(first.setdefault((path.rpartition(".")[0], tensors), number))
    return found


class BlockTimer:
    """Times blocks on the very inputs that the blocks of a model get from a pass at a shape.

    Args:
        model: the model.
        blocks: the paths of the blocks that are to be timed.
        shape: rows and tokens.
        seconds: how long each timing goes on, at most.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[str], shape: tuple[int, int], seconds: float = _SECONDS
    ) -> None:
        self._seconds = min(seconds, _SECONDS)
        self._inputs = forward_inputs(model, *shape)
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._device = model.device
        with torch.inference_mode(), replaced(model, {path: partial(self._listening, path) for path in blocks}):
            model(**self._inputs)

    def block(self, model: PreTrainedModel, path: str) -> float:
        """Return the milliseconds of one pass through a block of `model`, which is as wide as that of the inputs."""
        args, kwargs = self._calls[path]
        module = model.get_submodule(path)
        return self._least(lambda: module(*args, **kwargs))

    def whole(self, model: PreTrainedModel) -> float:
        """Return the milliseconds of one pass through all of `model`."""
        return self._least(lambda: model(**self._inputs))

    def _listening(self, path: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._calls[path] = _without_cache(args, kwargs)
            return own(*args, **kwargs)

        return forward

    def _least(self, run: Callable[[], Any]) -> float:
        return 1e3 * least_seconds(run, self._device, seconds=self._seconds, fewest=_FEWEST)


def _without_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take the cache out, whether it has a name or only a place: what it holds would grow with every pass."""
    own = {"use_cache": False} if "use_cache" in kwargs else {}
    named = {name: None if "past_key_value" in name else _unless_cache(value) for name, value in kwargs.items()}
    return tuple(map(_unless_cache, args)), {**named, **own}


def _unless_cache(value: Any) -> Any:
    from transformers import Cache

    return None if isinstance(value, Cache) else value
