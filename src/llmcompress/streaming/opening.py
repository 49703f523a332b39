"""Open a model without reading the weights of its blocks: they stay in files until a block needs them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, UnsupportedModelError
from ..evaluation.inference import bars_hidden
from ..tensor_files import Stored
from .folder import Folder
from .reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_empty(folder: Folder) -> PreTrainedModel:
    """Build the model of a folder without weights, on the meta device.

    Raises:
        CheckpointError: the config is damaged, or names no class that transformers has.
        UnsupportedModelError: the folder is quantized.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder.path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder.path} is no folder of a model: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{folder.path} is already quantized, or its sizes are noted in quantization_config; start from the float "
            f"model, or load it and pass it to lc.compress."
        )
    names = config.architectures or [None]
    chosen = getattr(transformers, str(names[0]), None)
    if chosen is None:
        raise CheckpointError(
            f"{folder.path}: transformers {transformers.__version__} has no class {names[0]!r}; upgrade it."
        )
    with torch.device("meta"):
        model: PreTrainedModel = chosen(copy.deepcopy(config))
    model.config._name_or_path = str(folder.path)
    return model.to(_dtype_of(config, folder)).eval()


def open_model(folder: Folder, empty: PreTrainedModel, scratch: Path) -> tuple[PreTrainedModel, dict[str, Stored]]:
    """Build the model of a folder, the weights of its blocks being views of files.

    Args:
        folder: the folder.
        empty: from `open_empty`.
        scratch: where blocks are written that are not on disk as they are in memory; kept and used again.

    Returns:
        The model in eval mode, in the dtype of its config, and where each tensor of its state is stored, by its name in
        the model. What is in no block may be stored nowhere, and is in memory.

    Raises:
        CheckpointError: the weights do not fill the model, or `scratch` cannot be written.
    """
    read = Reading(folder, empty)
    stored = {**read.plain(), **read.converted(scratch)}
    views, places = {}, {}
    for name, one in stored.items():
        views[name], _ = one.view()
        places[views[name].data_ptr()] = one
    with bars_hidden():
        model, info = type(empty).from_pretrained(
            None,
            config=copy.deepcopy(empty.config),
            state_dict=views,
            dtype=empty.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for name, found, told in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{folder.path} cannot be loaded: {name} has the shape {tuple(found)}, where config.json tells "
            f"{tuple(told)}; one of the two was edited or comes from elsewhere: save the model again."
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise CheckpointError(f"{folder.path} has no weights for {missing}; save the model again.")
    # What was converted above must be turned back when it is saved.
    model._weight_conversions = read.conversions()
    model.config._name_or_path = str(folder.path)
    _read_generation_config(model, folder.path)
    found_at: dict[str, Stored] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = places.get(tensor.data_ptr()) if tensor.numel() else None
        if place is not None and (place.shape, place.dtype) == (tuple(tensor.shape), tensor.dtype):
            found_at[name] = place
    return model, found_at


def _dtype_of(config: Any, folder: Folder) -> torch.dtype:
    """Return the dtype in which the model is compressed: the config's, else that of the first float tensor."""
    named = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    if named is not None:
        return named
    return next((one.dtype for one in folder.stored.values() if one.dtype.is_floating_point), torch.float32)


def _read_generation_config(model: PreTrainedModel, path: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
