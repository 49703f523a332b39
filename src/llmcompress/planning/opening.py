"""Models without weights, of whatever a plan is asked about: a model in memory, a config, a folder, a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..anatomy.empty import dtype_plan, empty_of_class, weightless
from ..anatomy.module_sizes import resize
from ..checkpoint import saved_class
from ..errors import CheckpointError, ConfigError
from ..quantization.hf import METHOD, mark
from ..streaming.folder import Folder, open_folder
from ..streaming.reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def open_weightless(model: PreTrainedModel | PreTrainedConfig | str | Path) -> PreTrainedModel:
    """Return `model` on the meta device, in eval mode and in the dtype that `lc.load` would read it in.

    Args:
        model: in memory (its twin is returned), a config that names its class in `architectures`, a folder or the name
            of a model on the hub (of which only the config and the headers of weights are read).

    Raises:
        CheckpointError: there is no such folder or name.
        ConfigError: it is none of these, or a config that names no class.

    Example:
        >>> from transformers import GPT2Config
        >>> config = GPT2Config(n_layer=2, architectures=["GPT2LMHeadModel"])
        >>> open_weightless(config).device
        device(type='meta')
    """
    if isinstance(model, transformers.PreTrainedModel):
        return weightless(model)
    if isinstance(model, transformers.PreTrainedConfig):
        return _built(_class_of(model), model, _dtype(model) or torch.float32)
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model must be a transformers model, a config, a folder or a name on the hub, got {model!r:.80}."
        )
    model_class, config = saved_class(model)
    folder = _stored(Path(model))
    stored = (
        next((one.dtype for one in folder.stored.values() if one.dtype.is_floating_point), None) if folder else None
    )
    empty = _built(model_class, config, _dtype(config) or stored or torch.float32)
    empty.config._name_or_path = str(model)
    if folder is not None:
        # What transformers renamed when it read the folder it turns back when it saves.
        empty._weight_conversions = Reading(folder, empty).conversions()
    if empty.can_generate() and (Path(model) / "generation_config.json").is_file():
        empty.generation_config = transformers.GenerationConfig.from_pretrained(model)
    return empty


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    name = (config.architectures or [None])[0]
    found: Any = getattr(transformers, str(name), None)
    if found is None:
        raise ConfigError(
            f"the {type(config).__name__} must name the class of its model, got architectures="
            f"{config.architectures!r}; set config.architectures = ['...ForCausalLM'], or pass a folder or a model."
        )
    model_class: type[PreTrainedModel] = found
    return model_class


def _built(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        empty = empty_of_class(model_class, config).eval()
    finally:
        torch.set_default_dtype(usual)
    # What transformers keeps in float32 whatever the folder's dtype is.
    exact = tuple(dtype_plan(empty, dtype))
    for name, parameter in empty.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if _is_in(name, exact) else dtype)
    told = getattr(config, "quantization_config", None)
    content = told if isinstance(told, dict) else vars(told) if told is not None else {}
    if content.get("quant_method") == METHOD and not content.get("groups"):
        resize(empty, content.get("sizes", {}))
        mark(empty)
    elif told is not None:
        # A step refuses it by this, as it refuses the model itself.
        empty.config.quantization_config = told
    return empty


def _is_in(name: str, modules: tuple[str, ...]) -> bool:
    return any(f".{module}." in f".{name}" for module in modules)


def _dtype(config: PreTrainedConfig) -> torch.dtype | None:
    named = config.dtype
    found: torch.dtype | None = getattr(torch, named) if isinstance(named, str) else named
    return found


def _stored(path: Path) -> Folder | None:
    try:
        return open_folder(path)
    except CheckpointError:  # a folder with a config alone, or a name on the hub
        return None
