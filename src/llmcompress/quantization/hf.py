"""What transformers must know in order to load and save our quantized models: the method called "llmcompress".

A folder's `config.json` carries `quantization_config`: a format version and groups, each a scheme with its settings and
the paths of the modules stored so. On loading, those modules are replaced, still without weights, before transformers
fills them from the safetensors file: plain `from_pretrained` and `save_pretrained` do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from .modules import SCHEMES, QuantizedModule, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "llmcompress"
FORMAT_VERSION = 1


class LLMCompressConfig(QuantizationConfigMixin):
    """How the modules of a folder are stored.

    Args:
        groups: dicts with `scheme`, the scheme's settings, and `modules`: the paths stored so.
        format_version: of this dict and of the tensors it describes.

    Raises:
        CheckpointError: a newer format, an unknown scheme, or a malformed group.

    Example:
        >>> LLMCompressConfig([{"scheme": "int8_embedding", "modules": ["wte"]}]).to_dict()["quant_method"]
        'llmcompress'
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]] = (), format_version: int = FORMAT_VERSION) -> None:
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: quantization_config.format_version must be at most {FORMAT_VERSION}, got "
                f"{format_version!r}; the folder was written by a newer llmcompress: upgrade it with pip."
            )
        for group in groups:
            if group.get("scheme") not in SCHEMES or not isinstance(group.get("modules"), (list, tuple)):
                raise CheckpointError(
                    f"config.json: each of quantization_config.groups must have a scheme of {', '.join(SCHEMES)} and a "
                    f"list of modules, got {dict(group)!r:.200}; the file is damaged."
                )
        # transformers writes the attributes of this object to config.json, no more and no less.
        self.quant_method = METHOD
        self.format_version = format_version
        self.groups = [{**group, "modules": list(group["modules"])} for group in groups]

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> LLMCompressConfig | tuple[LLMCompressConfig, dict[str, Any]]:
        """Read what `to_dict` wrote; transformers fixes this signature."""
        if not isinstance(config_dict.get("groups"), list):
            raise CheckpointError("config.json: quantization_config must have a list of groups; the file is damaged.")
        config = cls(config_dict["groups"], config_dict.get("format_version", 0))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(cls, model: nn.Module) -> LLMCompressConfig:
        """Describe the quantized modules that `model` has."""
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for path, module in model.named_modules():
            if not isinstance(module, QuantizedModule):
                continue
            spec = module.spec()
            paths = next((paths for known, paths in groups if known == spec), None)
            if paths is None:
                groups.append((spec, paths := []))
            paths.append(path)
        return cls([{**spec, "modules": paths} for spec, paths in groups])


class LLMCompressQuantizer(HfQuantizer):
    """Puts our modules into an empty model, and checks after loading that each of them was filled."""

    quantization_config: LLMCompressConfig

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """int8 layers have no backward pass; the Trainer refuses the model by this."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize while loading.

        Raises:
            CheckpointError: the folder holds float weights.
        """
        if not self.pre_quantized:
            raise CheckpointError(
                "LLMCompressConfig cannot quantize while a model is loaded: the folder holds float weights; load it "
                "without quantization_config and pass the model to lc.compress."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replacements: dict[nn.Module, nn.Module] = {}
        for group in self.quantization_config.groups:
            for path in group["modules"]:
                module = _find(model, path)
                if module is not None:
                    replacements[module] = SCHEMES[group["scheme"]].from_spec(module, group)
        replace_modules(model, replacements)
        for target, source in model.all_tied_weights_keys.items():
            tied, partner = (model.get_submodule(key.rpartition(".")[0]) for key in (target, source))
            if isinstance(tied, QuantizedModule) and isinstance(partner, QuantizedModule) and target.endswith("weight"):
                tied.tie(partner)
        # A base model read from a folder with a head (or the reverse) has other paths than the folder.
        self.quantization_config = LLMCompressConfig.of(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if isinstance(module, QuantizedModule):
                    if not getattr(tensor, "_is_hf_initialized", False):
                        raise CheckpointError(
                            f"model.safetensors has no {path}.{name}; the folder is damaged: save the model again."
                        )
                elif isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                    raise CheckpointError(
                        f"model.safetensors holds codes for {path}.{name}, but quantization_config in config.json does "
                        "not name that module; the file was edited or is damaged: save the model again."
                    )


def mark_quantized(model: PreTrainedModel) -> None:
    """Put a model that was quantized in memory in the state in which `from_pretrained` would have left it."""
    from transformers import PreTrainedModel

    config = LLMCompressConfig.of(model)
    model.config.quantization_config = config
    model.hf_quantizer = LLMCompressQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def _find(model: PreTrainedModel, path: str) -> nn.Module | None:
    """Return the module that the folder calls `path`, or None where a base model lacks a head's module."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if candidate in modules:
            return modules[candidate]
    if type(model).__name__ in (model.config.architectures or ()):
        raise CheckpointError(
            f"config.json: quantization_config names the module {path!r}, which {type(model).__name__} does not have; "
            "the file is damaged: save the model again."
        )
    return None


# Importing this file makes the method known; `llmcompress._autoregister` sees to it that it is imported in time.
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LLMCompressConfig)
    register_quantizer(METHOD)(LLMCompressQuantizer)
