"""Open a model folder without reading its weights: they stay in its files until a block needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import bars_hidden
from ..errors import CheckpointError, UnsupportedModelError
from .tensors import Stored, stored_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Folder:
    """A model folder: where its config and its tensors are.

    Attributes:
        path: the folder.
        files: its safetensors files, in order.
        stored: every tensor by its name on disk.
    """

    path: Path
    files: tuple[Path, ...]
    stored: Mapping[str, Stored]


def open_folder(path: str | Path) -> Folder:
    """Find the tensors of a folder, in one safetensors file or in shards with an index.

    Raises:
        CheckpointError: it is no model folder, or a file is missing or damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"folder_in must be a folder with config.json and safetensors files, got {str(path)!r}.")
    if (path / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path / _INDEX} is damaged ({error!r}); download or save it again.") from error
    else:
        names = [_SINGLE]
    files = tuple(path / name for name in names)
    for file in files:
        if not file.is_file():
            other = next(iter(sorted(path.glob("*.bin"))), None)
            raise CheckpointError(
                f"folder_in has no {file.name}"
                + (f", but {other.name}; only safetensors are read: save the model again." if other else ".")
            )
    return Folder(path, files, {name: stored for file in files for name, stored in stored_in(file).items()})


def open_model(folder: Folder) -> tuple[PreTrainedModel, dict[str, Stored]]:
    """Build the model of a folder, its weights being views of the files.

    Returns:
        The model in eval mode, in the dtype of its config, and where each tensor of its state is stored, by its name in
        the model.

    Raises:
        CheckpointError: the weights do not fill the model.
        UnsupportedModelError: it is quantized, or transformers changes its tensors when it reads them.
    """
    config, chosen = _config_and_class(folder)
    views, places = {}, {}
    for name, stored in folder.stored.items():
        views[name], _ = stored.view()
        places[views[name].data_ptr()] = stored
    with bars_hidden():
        model, info = chosen.from_pretrained(
            None, config=config, state_dict=views, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    for name, found, told in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{folder.path} cannot be loaded: {name} has the shape {tuple(found)}, where config.json tells "
            f"{tuple(told)}; one of the two was edited or comes from elsewhere: save the model again."
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise CheckpointError(f"{folder.path} has no weights for {missing}; save the model again.")
    model.config._name_or_path = str(folder.path)
    _read_generation_config(model, folder.path)
    stored_as: dict[str, Stored] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = places.get(tensor.data_ptr()) if tensor.numel() else None
        if place is not None and (place.shape, place.dtype) == (tuple(tensor.shape), tensor.dtype):
            stored_as[name] = place
    converted = next((name for name in model.state_dict() if name not in stored_as), None)
    if converted is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be streamed: its {converted} is not on disk as it is in memory (another "
            f"dtype, or tensors that transformers merges); load the model and pass it to lc.compress."
        )
    return model, stored_as


def _config_and_class(folder: Folder) -> tuple[Any, Any]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder.path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder.path} is no folder of a model: {error}") from error
    method = getattr(config, "quantization_config", None)
    if method is not None:
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
    return config, chosen


def _read_generation_config(model: PreTrainedModel, path: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
