"""Which attributes of a config tell a size, found by building the model from changed configs on the meta device.

No table of names: an attribute tells the FFN width if setting it gives exactly the wanted shapes, and nothing else. So
the folder of a pruned model loads in plain transformers, or the size is refused before any weight is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]


def solve_config(
    model: PreTrainedModel, wanted: Mapping[str, tuple[int, ...]], sizes: Mapping[int, int], *, what: str
) -> dict[str, int]:
    """Return the config attributes that give tensors the shapes `wanted` and leave all others as they are.

    Args:
        model: the model before the cut; its weights are not read.
        wanted: new shapes by state-dict name, of those tensors that change.
        sizes: new value of each old size, such as `{3072: 1536}`.
        what: what is being sized, for the message.

    Returns:
        New values by attribute path, such as `{"intermediate_size": 1536}`; apply them with `set_sizes`.

    Raises:
        UnsupportedModelError: no set of attributes does it (as in BLOOM, whose FFN is always four times its hidden
            size).

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("gpt2")
        >>> block = {"c_fc.weight": (64, 32), "c_fc.bias": (32,), "c_proj.weight": (32, 64)}
        >>> wanted = {f"transformer.h.{i}.mlp.{name}": shape for i in range(2) for name, shape in block.items()}
        >>> solve_config(model, wanted, {256: 32}, what="FFN width")
        {'n_inner': 32}
    """
    before = _shapes(model)
    target = {**before, **wanted}
    chosen: dict[str, int] = {}
    tried = []
    for path, old in _sizes(model.config):
        for new in _candidates(old, sizes):
            tried.append(path)
            shapes = _build(model, {path: new})
            changed = {name for name in before if shapes is not None and shapes.get(name) != before[name]}
            if shapes is not None and changed and all(shapes.get(name) == target[name] for name in changed):
                chosen[path] = new
    if not chosen or _build(model, chosen) != target:
        raise UnsupportedModelError(
            f"the {what} of {type(model).__name__} cannot be changed: no attribute of {type(model.config).__name__} "
            f"gives {', '.join(f'{old} -> {new}' for old, new in sizes.items())} and leaves all else as it is "
            f"(tried {', '.join(tried) or 'none: no attribute has that value'}); use another axis or strategy."
        )
    return chosen


def set_sizes(model: PreTrainedModel, chosen: Mapping[str, int], sizes: Mapping[int, int], scopes: list[str]) -> None:
    """Write solved sizes to the model's config, and to the integers that the cut modules remember.

    Args:
        model: the model after the cut.
        chosen: what `solve_config` returned.
        sizes: new value of each old size.
        scopes: paths of the modules that were cut; only their own attributes are looked at.
    """
    _set(model.config, chosen)
    for scope in scopes:
        for name, value in list(vars(model.get_submodule(scope)).items()):
            if type(value) is int and value in sizes and not name.startswith("_"):
                setattr(model.get_submodule(scope), name, sizes[value])


def matches_config(model: PreTrainedModel) -> bool:
    """Tell whether a model built from the config alone has the shapes that `model` has: whether a folder will load."""
    return _build(model, {}) == _shapes(model)


def _sizes(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Yield integers of the config and of its sub-configs, and unset attributes that may stand for a width."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _sizes(value, f"{prefix}{name}.")
        elif name.startswith("_"):
            continue
        elif type(value) is int:
            yield f"{prefix}{name}", value
        elif value is None and any(word in name for word in ("inner", "ffn", "intermediate")):
            yield f"{prefix}{name}", None


def _candidates(old: int | None, sizes: Mapping[int, int]) -> list[int]:
    return sorted(set(sizes.values())) if old is None else [sizes[old]] if old in sizes else []


def _set(config: PreTrainedConfig, values: Mapping[str, int]) -> None:
    for path, value in values.items():
        owner: Any = config
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)


def _build(model: PreTrainedModel, values: Mapping[str, int]) -> Shapes | None:
    """Return the shapes of a model built from the changed config, or None where the config refuses."""
    config = copy.deepcopy(model.config)
    try:
        _set(config, values)
        with torch.device("meta"):
            return _shapes(type(model)(config))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, AssertionError, IndexError, KeyError):
        return None


def _shapes(model: PreTrainedModel) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
