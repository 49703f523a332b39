"""Keep some of a model's repeated blocks: the surgery, and the plain config that tells the new depth.

Which fields of a config hold the depth is found by trial, not by a table of model names: the model's class is built
without memory (on the meta device) from a config with one field changed, and what comes out is compared with the blocks
that were kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..compressor import Cut
from ..errors import UnsupportedModelError
from .empty import empty_model
from .stacks import find_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class DepthChange:
    """What `keep_blocks` would write beside the blocks themselves.

    Attributes:
        kept: block indices kept, by path of the stack.
        fields: config fields that hold the depth or one entry a block, with their new values.
        config: the config of the shallower model.
        attributes: (module path, attribute, new value) of what modules derive from the depth or from their own place,
            such as the `layer_idx` that finds a block's part of the cache; paths as after the cut.
    """

    kept: dict[str, tuple[int, ...]]
    fields: dict[str, Any]
    config: PreTrainedConfig
    attributes: list[tuple[str, str, int]]


def evenly_spaced(of: int, keep: int) -> tuple[int, ...]:
    """Return `keep` of `of` block indices, evenly spread, the first and the last among them (one alone is the first).

    Example:
        >>> evenly_spaced(12, 6), evenly_spaced(6, 3), evenly_spaced(6, 1)
        ((0, 2, 4, 6, 8, 11), (0, 2, 5), (0,))
    """
    return tuple(index * (of - 1) // (keep - 1) for index in range(keep)) if keep > 1 else (0,)


def plan_depth(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> DepthChange:
    """Find out how a plain config tells that only the blocks `kept` (stack path -> ascending indices) are left.

    Reads no weight and changes nothing.

    Raises:
        UnsupportedModelError: no config field sets the depth of a stack; a block that stays depends on its place (such
            as T5's first block, which alone holds the position bias) or on one that goes; or no attention stays to
            tell how much is in the cache.
    """
    chosen = {path: tuple(indices) for path, indices in kept.items()}
    shallow = empty_model(model, model.config)
    depths = {stack.path: len(stack) for stack in find_stacks(shallow)}
    for path, indices in chosen.items():
        _keep(shallow, path, indices)
    config = model.config
    fields: dict[str, Any] = {}
    for path, indices in chosen.items():
        if len(indices) < depths[path]:
            config, changed = _set_depth(model, config, path, depths[path], indices)
            fields.update(changed)
    attributes = _compare(model, shallow, empty_model(model, config), chosen)
    _check_shared(model, chosen)
    _check_cache(model, config, chosen)
    return DepthChange(chosen, fields, config, attributes)


def keep_blocks(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> list[Cut]:
    """Drop all blocks but `kept` from `model`, in place, and write its config.

    Returns:
        One `Cut` a stack, for `context.history`.

    Raises:
        UnsupportedModelError: as `plan_depth`, or the decoder would be deeper than its cache; the model is unchanged
            then.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("gpt2")
        >>> keep_blocks(model, {"transformer.h": (1,)})
        [Cut(path='transformer.h', axis='layers', kept=(1,), of=2)]
        >>> model.config.n_layer, model.transformer.h[0].attn.layer_idx
        (1, 0)
    """
    change = plan_depth(model, kept)
    _check_places(model, change.config, change.kept)
    reference = empty_model(model, change.config)
    cuts = []
    for path, indices in change.kept.items():
        cuts.append(Cut(path=path, axis="layers", kept=indices, of=len(model.get_submodule(path))))
        _keep(model, path, indices)
    for path, attribute, value in change.attributes:
        setattr(model.get_submodule(path), attribute, value)
    # Parts of a model may hold a config of their own (T5's stacks do); each takes over what construction gives it.
    written: set[int] = set()
    for path, module in model.named_modules():
        own = vars(module).get("config")
        if own is None or id(own) in written:
            continue
        written.add(id(own))
        source = vars(reference.get_submodule(path))["config"]
        for holder, model_holder in zip(_holders(source), _holders(own), strict=True):
            for name in change.fields:
                if name in vars(holder):
                    setattr(model_holder, name, copy.deepcopy(getattr(holder, name)))
    return cuts


def origins(history: Sequence[Cut], path: str, depth: int, teacher_depth: int) -> tuple[int, ...]:
    """Return which of the teacher's blocks each of the `depth` blocks now in the stack at `path` was.

    What the history does not tell (a student from elsewhere) is taken as evenly spread.

    Example:
        >>> first, second = Cut("h", "layers", (0, 2, 3), 4), Cut("h", "layers", (0, 2), 3)
        >>> origins([first, second], "h", 2, 4)
        (0, 3)
        >>> origins([], "h", 2, 4)
        (0, 3)
    """
    blocks = tuple(range(teacher_depth))
    for cut in history:
        if cut.path == path and cut.axis == "layers" and cut.of == len(blocks):
            blocks = tuple(blocks[index] for index in cut.kept)
    return blocks if len(blocks) == depth else evenly_spaced(teacher_depth, depth)


def _check_shared(model: PreTrainedModel, kept: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if a block that stays shares a weight with one that goes: which of them runs it depends on their places."""
    for path, indices in kept.items():
        blocks = model.get_submodule(path)
        stays = {id(tensor): index for index in indices for tensor in blocks[index].parameters()}
        for index in set(range(len(blocks))) - set(indices):
            other = next((stays[id(tensor)] for tensor in blocks[index].parameters() if id(tensor) in stays), None)
            if other is not None:
                raise UnsupportedModelError(
                    f"blocks {_listed(kept)} of {type(model).__name__} cannot stand alone: block {other} shares "
                    f"weights with block {index}, which goes; choose other blocks."
                )


def _check_cache(model: PreTrainedModel, config: PreTrainedConfig, kept: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if a cache told its length before and cannot any more, since no attention is among the blocks left."""
    from transformers import DynamicCache

    if not model.can_generate():
        return
    try:
        DynamicCache(config=model.config).get_seq_length()
    except Exception:  # it never could; some configs are of no use to a cache
        return
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError as error:
        raise UnsupportedModelError(
            f"blocks {_listed(kept)} of {type(model).__name__} cannot generate: {error} Keep a block with an attention."
        ) from error


def _check_places(model: PreTrainedModel, config: PreTrainedConfig, kept: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if the decoder has more blocks than a cache has places.

    For some encoder-decoders (T5) transformers takes the depth of the encoder for that of the decoder.
    """
    from transformers import DynamicCache

    if not (config.is_encoder_decoder and model.can_generate()):
        return
    decoder = model.get_decoder()
    name = next((path for path, module in model.named_modules() if module is decoder), None)
    before, places = (
        len(DynamicCache(config=own.get_text_config(decoder=True)).layers) for own in (model.config, config)
    )
    for stack in find_stacks(model):
        depth = len(kept.get(stack.path, range(len(stack))))
        if stack.path.startswith(f"{name}.") and places < depth <= before:
            raise UnsupportedModelError(
                f"blocks {_listed(kept)} of {type(model).__name__} cannot generate: transformers takes the encoder's "
                f"depth, {places}, for that of the decoder, {depth}. Keep as many blocks of the encoder, or cut "
                f"the decoder too."
            )


def _keep(model: nn.Module, path: str, indices: tuple[int, ...]) -> None:
    parent, _, name = path.rpartition(".")
    blocks = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, nn.ModuleList([blocks[index] for index in indices]))


def _holders(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _set_depth(
    model: PreTrainedModel, config: PreTrainedConfig, path: str, depth: int, indices: tuple[int, ...]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return a copy of `config` from which the stack at `path` is built with `len(indices)` blocks."""
    tried = []
    for level, holder in enumerate(_holders(config)):
        for name, value in vars(holder).items():
            if type(value) is not int or value != depth:
                continue
            trial = copy.deepcopy(config)
            changed = {name: len(indices), **_per_block(holder, name, depth, indices)}
            tried.append(name)
            try:
                for field, new in changed.items():
                    setattr(_holders(trial)[level], field, new)
                built = empty_model(model, trial)
            except Exception:  # a number that merely equals the depth (heads, labels) may build nothing
                continue
            if any(stack.path == path and len(stack) == len(indices) for stack in find_stacks(built)):
                return trial, changed
    raise UnsupportedModelError(
        f"the depth of {path} in {type(model).__name__} must be set by a field of its config; {depth} stands in "
        f"{', '.join(tried) or 'none of its fields'}, and changing it there does not change the depth."
    )


def _per_block(config: PreTrainedConfig, field: str, depth: int, indices: tuple[int, ...]) -> dict[str, list[Any]]:
    """Return the config's lists with one entry a block (`layer_types`), cut to the kept blocks.

    Lists of token ids, and others whose length by default is not the depth by default (the two ends of a range of time
    steps), may have the depth's length by chance.
    """
    try:
        default = type(config)()
    except Exception:  # a config that refuses its own defaults tells nothing
        default = None
    return {
        name: [value[index] for index in indices]
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple))
        and len(value) == depth
        and "token" not in name
        and name != "architectures"
        and _may_follow(default, name, field)
    }


def _may_follow(default: PreTrainedConfig | None, name: str, field: str) -> bool:
    value = vars(default).get(name) if default is not None else None
    return not isinstance(value, (list, tuple)) or not value or len(value) == vars(default).get(field, len(value))


def _compare(
    model: PreTrainedModel, cut: nn.Module, built: nn.Module, kept: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str, int]]:
    """Check that the model cut from the deep one equals the one built shallow; return the attributes to renumber."""
    who = type(model).__name__
    have = {name: tensor.shape for name, tensor in cut.state_dict().items()}
    want = {name: tensor.shape for name, tensor in built.state_dict().items()}
    if have != want:
        odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise UnsupportedModelError(
            f"blocks {_listed(kept)} of {who} cannot stand alone: {odd[0]} is not what a model of that depth has there "
            f"(a block that differs from the others was dropped or moved); keep block 0, or choose other blocks."
        )
    renumbered = []
    other = dict(built.named_modules())
    for path, module in cut.named_modules():
        place = next((index for stack, indices in kept.items() for index in _place(path, stack, indices)), None)
        for name, value in _plain(module):
            new = vars(other[path]).get(name)
            if new == value:
                continue
            # Outside of the blocks numbers and flags are derived (`has_sliding_layers`); inside only the place is.
            if isinstance(new, int) and type(value) is type(new) and (place is None or (value, new) == place):
                renumbered.append((path, name, new))
            else:
                raise UnsupportedModelError(
                    f"blocks {_listed(kept)} of {who} cannot stand alone: {path}.{name} is {value!r}, and {new!r} in a "
                    f"model of that depth, which its config cannot tell; choose other blocks."
                )
    return renumbered


def _place(path: str, stack: str, indices: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (old, new) index of the block that the module at `path` belongs to, if it belongs to one."""
    if path.startswith(f"{stack}."):
        new = int(path[len(stack) + 1 :].split(".")[0])
        yield indices[new], new


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        numbers = isinstance(value, dict) and all(type(item) is int for pair in value.items() for item in pair)
        if (isinstance(value, (bool, int, float, str)) or numbers) and name != "training":
            yield name, value


def _listed(kept: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{list(indices)} of {path}" for path, indices in kept.items())
