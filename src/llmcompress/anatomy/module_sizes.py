"""Sizes that no plain config can tell: where a model differs, module by module, from the one that its config builds.

`module_sizes` describes the difference in plain numbers, and `resize` gives an empty model those sizes. Pruning only
shrinks, so a description that adds a tensor or makes one grow is refused: a config read from anywhere cannot ask for
more memory than the model it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, UnsupportedModelError
from .empty import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModuleSizes = dict[str, dict[str, dict[str, Any]]]
"""Module path -> {"tensors": {name: shape}, "attributes": {name: an integer, or a list of them}}; valid JSON."""

_Shapes = dict[str, tuple[int, ...]]
_Numbers = dict[str, int | tuple[int, ...]]


def module_sizes(model: PreTrainedModel) -> ModuleSizes:
    """Return what differs in size between `model` and the model that its config alone builds.

    A parameter or buffer of another shape is named with its shape, and so are the integer attributes (`num_heads`,
    `out_features`, the `normalized_shape` of a LayerNorm) that differ in its module or in one around it. A layer that
    is stored in another form than float is described as the float layer it stands for.

    Returns:
        The description; empty where the config tells all.

    Raises:
        UnsupportedModelError: the difference is more than smaller sizes: a module or tensor too many or too few, one
            that grew, or a cut buffer that no folder holds.

    Example:
        >>> from llmcompress.anatomy.surgery import keep_rows
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> keep_rows(model.bert.embeddings.position_embeddings, torch.arange(32))
        >>> module_sizes(model)
        {'bert.embeddings.position_embeddings': {'tensors': {'weight': [32, 64]}, 'attributes': {'num_embeddings': 32}}}
    """
    built = build(model)
    theirs = dict(built.named_modules(remove_duplicate=False))
    ours = dict(model.named_modules(remove_duplicate=False))
    if ours.keys() != theirs.keys():
        path = min(ours.keys() ^ theirs.keys())
        raise _untold(model, f"{path} is a module of only one of the two")
    views = {path: _as_float(module, theirs[path]) for path, module in ours.items()}
    cut = {path: _cut_tensors(model, path, views[path][0], module) for path, module in theirs.items()}
    around = {"", *(path[:end] for path in ours if cut[path] for end in _ends(path))} if any(cut.values()) else set()
    bound = largest_axis(built)
    sizes: ModuleSizes = {}
    for path in ours:
        numbers = _cut_numbers(views[path][1], theirs[path], bound) if path in around else {}
        if cut[path] or numbers:
            sizes[path] = {"tensors": cut[path], "attributes": numbers}
    return sizes


def resize(model: nn.Module, sizes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Give the modules of `model` the described sizes, with tensors that are not filled yet.

    Args:
        model: as its config builds it, usually on the meta device.
        sizes: what `module_sizes` returned, with paths of `model`.

    Raises:
        CheckpointError: a module, tensor or attribute that `model` does not have, or a size it cannot take; `model` is
            unchanged then.

    Example:
        >>> layer = nn.Linear(4, 4, device="meta")
        >>> resize(layer, {"": {"tensors": {"weight": [3, 4], "bias": [3]}, "attributes": {"out_features": 3}}})
        >>> layer
        Linear(in_features=4, out_features=3, bias=True)
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    bound = largest_axis(model)
    for path, entry in sizes.items():
        if path not in modules:
            raise _damaged(path, f"{type(model).__name__} has no such module")
        _check(path, modules[path], entry, bound)
    for path, entry in sizes.items():
        module = modules[path]
        for name, shape in entry["tensors"].items():
            old = getattr(module, name)
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for name, value in entry["attributes"].items():
            setattr(module, name, tuple(value) if isinstance(value, (list, tuple)) else value)


def largest_axis(model: nn.Module) -> int:
    """Return the longest axis of all tensors: no size of a pruned model is above it."""
    return max((axis for tensor in model.state_dict().values() for axis in tensor.shape), default=0)


def quantized_by(model: PreTrainedModel) -> str | None:
    """Return the name of the method by which weights of `model` are stored in another form than float, or None.

    A model whose config only notes sizes is not quantized.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> quantized_by(tiny_model("bert")) is None
        True
    """
    config = getattr(model.config, "quantization_config", None)
    content = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    if content.get("sizes") and not content.get("groups") and getattr(model, "quantization_method", None) is None:
        return None
    method = getattr(model, "quantization_method", None) or content.get("quant_method")
    if method is None and (content or getattr(model, "is_quantized", False)):
        return "unknown method"
    return None if method is None else str(getattr(method, "value", method))


def build(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that the config of `model` alone builds, on the meta device: shapes, but no weights.

    Raises:
        UnsupportedModelError: the config does not build one there.
    """
    from transformers import initialization

    # transformers 5.0 has none: there, models that compute numbers while they are built are refused below.
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    try:
        with safe():
            return empty_model(model, model.config)
    except Exception as error:  # code of any model runs here
        raise _untold(model, f"the config builds none ({type(error).__name__}: {error})") from error


def _ends(path: str) -> list[int]:
    """Return where each prefix of a dotted path ends, its own end included."""
    return [*(index for index, letter in enumerate(path) if letter == "."), len(path)]


def _as_float(module: nn.Module, built: nn.Module) -> tuple[_Shapes, _Numbers]:
    """Return shapes and numbers of `module`; those of the float layer that it stands for, if it stores codes."""
    if not hasattr(module, "coded_weights"):
        return _shapes(module), _numbers(module)
    shapes, numbers = _shapes(built), _numbers(built)
    if hasattr(module, "float_shapes"):
        own = {name: shape for name, shape in _shapes(module).items() if name in shapes}
        return {**own, **module.float_shapes()}, _numbers(module)
    if isinstance(built, nn.Embedding):
        rows, columns = module.num_embeddings, module.embedding_dim
        return {**shapes, "weight": (rows, columns)}, {**numbers, "num_embeddings": rows, "embedding_dim": columns}
    if isinstance(built, (nn.Linear, Conv1D)):
        ins, outs = module.in_features, module.out_features
        conv = isinstance(built, Conv1D)
        shapes = {name: ((ins, outs) if conv else (outs, ins)) if name == "weight" else (outs,) for name in shapes}
        return shapes, {**numbers, **({"nx": ins, "nf": outs} if conv else {"in_features": ins, "out_features": outs})}
    return shapes, numbers


def _shapes(module: nn.Module) -> _Shapes:
    tensors = {**module._parameters, **module._buffers}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}


def _numbers(module: nn.Module) -> _Numbers:
    """Return the public attributes that are integers or tuples of them; a bool is none."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and _is_number(value)}


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple) and bool(value) and all(type(item) is int for item in value))


def _cut_tensors(model: PreTrainedModel, path: str, shapes: _Shapes, built: nn.Module) -> dict[str, list[int]]:
    whole = _shapes(built)
    if shapes.keys() != whole.keys():
        raise _untold(model, f"{_join(path, min(shapes.keys() ^ whole.keys()))} is a tensor of only one of the two")
    cut = {}
    for name, shape in shapes.items():
        if shape == whole[name]:
            continue
        full = _join(path, name)
        if not _fits(shape, whole[name]):
            raise _untold(model, f"{full} has the shape {shape}, which is not within {whole[name]}")
        if name in built._non_persistent_buffers_set:
            raise _untold(model, f"{full} has the shape {shape} instead of {whole[name]}, and no folder holds it")
        cut[name] = list(shape)
    return cut


def _cut_numbers(numbers: _Numbers, built: nn.Module, bound: int) -> dict[str, int | list[int]]:
    """Return the numbers that differ; one beyond every size in the model is none (a running count of something)."""
    cut: dict[str, int | list[int]] = {}
    for name, whole in _numbers(built).items():
        value = numbers.get(name)
        if value is not None and value != whole and _alike(value, whole, bound):
            cut[name] = list(value) if isinstance(value, tuple) else value
    return cut


def _check(path: str, module: nn.Module, entry: Any, bound: int) -> None:
    """Raise unless `entry` asks for nothing but smaller tensors and other numbers of `module`."""
    if not (
        isinstance(entry, Mapping)
        and entry.keys() == {"tensors", "attributes"}
        and all(isinstance(part, Mapping) for part in entry.values())
    ):
        raise _damaged(path, f"it must hold tensors and attributes, got {entry!r:.80}")
    shapes, numbers = _shapes(module), _numbers(module)
    for name, shape in entry["tensors"].items():
        if name not in shapes:
            raise _damaged(path, f"{type(module).__name__} has no tensor {name!r}")
        if not isinstance(shape, (list, tuple)) or not _fits(shape, shapes[name]):
            raise _damaged(path, f"the shape of {name!r} must be within {list(shapes[name])}, got {shape!r:.80}")
        if name in module._non_persistent_buffers_set:
            raise _damaged(path, f"{name!r} is not in any folder")
    for name, value in entry["attributes"].items():
        if name not in numbers:
            raise _damaged(path, f"{type(module).__name__} has no integer attribute {name!r}")
        if not _alike(tuple(value) if isinstance(value, list) else value, numbers[name], bound):
            raise _damaged(path, f"{name!r} is {numbers[name]} and cannot become {value!r:.80}")


def _fits(shape: Any, whole: tuple[int, ...]) -> bool:
    """Whether `shape` has the axes of `whole`, none of them empty or longer."""
    if len(shape) != len(whole):
        return False
    return all(type(new) is int and (0 < new <= old or new == old) for new, old in zip(shape, whole, strict=True))


def _alike(value: Any, whole: int | tuple[int, ...], bound: int) -> bool:
    """Whether `value` is of the kind of `whole`, and a size that may occur in the model."""
    if isinstance(whole, tuple):
        pairs = zip(value, whole, strict=True) if isinstance(value, tuple) and len(value) == len(whole) else [(None, 0)]
        return all(_alike(new, old, bound) for new, old in pairs)
    return type(value) is int and (value == whole or 0 <= value <= max(whole, bound))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _untold(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} differs from the model of its config by more than smaller sizes, so no folder can "
        f"tell it: {why}."
    )


def _damaged(path: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization_config.sizes: {path or 'the whole model'}: {why}; the file is damaged: save the "
        "model again."
    )
