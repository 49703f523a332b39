"""Which attributes of a config tell a size, found by building the model from changed configs on the meta device.

No table of names: an attribute tells the FFN width if setting it gives exactly the wanted shapes, and nothing else. So
the folder of a pruned model loads in plain transformers, or the size is refused before any weight is touched.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from .empty import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
Values = dict[str, Any]
# Attributes that are set together when none does it by itself; more than this many are not combined.
_TOGETHER = 3
_MOST_CANDIDATES = 12


def solve_config(
    model: PreTrainedModel,
    wanted: Mapping[str, tuple[int, ...]],
    sizes: Mapping[int, Collection[int]],
    *,
    what: str,
    unset: Mapping[str, int] | None = None,
    agrees: Callable[[PreTrainedModel], bool] = lambda reference: True,
) -> Values:
    """Return the config attributes that give tensors the shapes `wanted` and leave all others as they are.

    Args:
        model: the model before the cut; its weights are not read.
        wanted: new shapes by state-dict name, of those tensors that change.
        sizes: the values that each old size may take, such as `{3072: [1536]}`.
        what: what is being sized, for the message.
        unset: values for attributes that the config may leave unset or lack, such as the size of a head.
        agrees: a further test of the model, without weights, that the config builds; equal shapes may hide other
            heads.

    Returns:
        New values by attribute path, such as `{"intermediate_size": 1536}`; apply them with `adopt_config`.

    Raises:
        UnsupportedModelError: no set of attributes does it (as in BLOOM, whose FFN is always four times its hidden
            size).

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("gpt2")
        >>> block = {"c_fc.weight": (64, 32), "c_fc.bias": (32,), "c_proj.weight": (32, 64)}
        >>> wanted = {f"transformer.h.{i}.mlp.{name}": shape for i in range(2) for name, shape in block.items()}
        >>> solve_config(model, wanted, {256: [32]}, what="FFN width")
        {'n_inner': 32}
    """
    before = shapes_of(model)
    target = {**before, **wanted}
    fixed = dict(_unset(model.config, unset or {}))
    candidates = list(_candidates(model.config, sizes))
    # The same values are tried on several ways to a solution.
    built: dict[str, PreTrainedModel | None] = {}

    def built_with(values: Values) -> PreTrainedModel | None:
        key = repr(sorted(values.items()))
        if key not in built:
            built[key] = build(model, values)
        return built[key]

    def fits(values: Values) -> bool:
        reference = built_with(values)
        return reference is not None and shapes_of(reference) == target and agrees(reference)

    def shapes_if(values: Values) -> Shapes | None:
        reference = built_with(values)
        return None if reference is None else shapes_of(reference)

    def brings_a_part(others: Shapes, shapes: Shapes) -> bool:
        changed = {name for name in others.keys() | shapes.keys() if shapes.get(name) != others.get(name)}
        return bool(changed) and all(shapes.get(name) == target.get(name) for name in changed)

    def brings_an_axis(others: Shapes, shapes: Shapes) -> bool:
        # The other axes of the same tensors may be another attribute's: hidden features beside heads.
        return (
            others.keys() == shapes.keys()
            and all(
                len(shape) == len(target[name])
                and all(size in (old, new) for size, old, new in zip(shape, others[name], target[name], strict=True))
                for name, shape in shapes.items()
                if shape != others[name]
            )
            and shapes != others
        )

    chosen: Values = {}
    for brings in (brings_an_axis, brings_a_part):
        for start in ({}, fixed) if fixed else ({},):
            chosen = dict(start)
            others = shapes_if(chosen)
            for path, new in candidates:
                shapes = shapes_if({**chosen, path: new})
                if shapes is not None and others is not None and brings(others, shapes):
                    chosen[path], others = new, shapes
            if len(chosen) > len(start) and fits(chosen):
                return chosen
    # What no attribute brings by itself, a few together may.
    rest = [entry for entry in candidates if chosen.get(entry[0]) != entry[1]][:_MOST_CANDIDATES]
    for count in range(1, _TOGETHER + 1):
        for added in itertools.combinations(rest, count):
            for values in ({**chosen, **dict(added)}, dict(added)):
                if len({path for path, _ in added}) == count and fits(values):
                    return values
    tried = sorted({*fixed, *(path for path, _ in candidates)})
    wishes = ", ".join(f"{old} -> {new}" for old, news in sizes.items() for new in sorted(news) if new != old)
    raise UnsupportedModelError(
        f"the {what} of {type(model).__name__} cannot be told by its config: no attribute of "
        f"{type(model.config).__name__} gives {wishes} and leaves all else as it is "
        f"(tried {', '.join(tried) or 'none: no attribute has that value'}); use uniform=False, which saves sizes that "
        f"load with llmcompress, or another axis or strategy."
    )


def adopt_config(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    """Write solved `values` to the model's config, and what modules derive from it to the modules.

    Plain numbers that a module built from the new config holds, and one built from the old config holds otherwise, are
    taken over: head counts, widths, scales.

    Args:
        model: the model after the cut.
        values: what `solve_config` returned.
    """
    with _RealScalars():
        old, new = build(model, {}), build(model, values)
    assert old is not None
    assert new is not None
    before, after = dict(old.named_modules()), dict(new.named_modules())
    configs: dict[int, PreTrainedConfig] = {}
    for path, module in model.named_modules():
        if path not in before or path not in after:
            continue
        for name, value in _plain(after[path]):
            if vars(before[path]).get(name) != value and name in vars(module):
                setattr(module, name, value)
        for name, scalar in after[path].named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set and not scalar.is_meta and scalar.dim() == 0:
                module.get_buffer(name).copy_(scalar)
        # Parts of a model may hold a config of their own (T5's stacks do).
        own = vars(module).get("config")
        if isinstance(own, PreTrainedConfig) and id(own) not in configs:
            configs[id(own)] = own
    _set(model.config, values)
    trees = {id(holder) for holder in _tree(model.config)}
    for config in configs.values():
        if id(config) in trees:
            continue
        for path, value in values.items():
            name = path.rpartition(".")[2]
            if name in vars(config):
                setattr(config, name, copy.copy(value))


def matches_config(model: PreTrainedModel) -> bool:
    """Tell whether a model built from the config alone has the shapes that `model` has: whether a folder will load."""
    reference = build(model, {})
    return reference is not None and shapes_of(reference) == shapes_of(model)


def build(model: PreTrainedModel, values: Mapping[str, Any]) -> PreTrainedModel | None:
    """Return a model without weights, built from the config with `values` set, or None where it refuses them."""
    config = copy.deepcopy(model.config)
    try:
        _set(config, values)
        return empty_model(model, config)
    # Configs refuse in many ways, and none of them tells more than that this value is not to be had.
    except Exception:
        return None


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Return the shapes of all tensors by state-dict name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _candidates(config: PreTrainedConfig, sizes: Mapping[int, Collection[int]]) -> Iterator[tuple[str, Any]]:
    """Yield (attribute path, new value) of integers and lists of them that hold an old size, or may stand for one."""
    for path, old in _attributes(config):
        if type(old) is int:
            yield from ((path, new) for new in sizes.get(old, ()) if new != old)
        elif old is None:
            yield from ((path, new) for new in sorted({new for news in sizes.values() for new in news}))
        else:
            # A list holds one entry a block; all entries of one size change alike.
            new_list = [next(iter(sizes[entry])) if entry in sizes else entry for entry in old]
            if new_list != list(old):
                yield path, new_list


def _unset(config: PreTrainedConfig, values: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
    text = config.get_text_config()
    prefix = next((f"{name}." for name, value in vars(config).items() if value is text), "")
    for name, value in values.items():
        if getattr(text, name, None) is None:
            yield f"{prefix}{name}", value


def _attributes(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield integers of the config and of its sub-configs, and unset attributes that may stand for a width."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _attributes(value, f"{prefix}{name}.")
        elif name.startswith("_") or "token" in name:
            continue
        elif type(value) is int or (
            isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value)
        ):
            yield f"{prefix}{name}", value
        elif value is None and any(word in name for word in ("inner", "ffn", "intermediate")):
            yield f"{prefix}{name}", None


def _set(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    for path, value in values.items():
        owner: Any = config
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, copy.copy(value))


class _RealScalars(TorchFunctionMode):
    """Gives `torch.tensor(number)` a value even where all else is built without: a scale kept as a buffer."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], (int, float)):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _plain(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and isinstance(value, (int, float, tuple)):
            yield name, value


def _tree(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _tree(value)
