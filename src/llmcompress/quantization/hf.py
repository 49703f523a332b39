"""What transformers must know in order to load and save our models: the method called "llmcompress".

A folder's `config.json` carries `quantization_config`: a format version; groups, each a scheme with its settings and
the paths of the modules stored so; and the sizes of modules that are smaller than the rest of the config tells. On
loading, those modules shrink or are replaced, still without weights, before transformers fills them from the
safetensors file: plain `from_pretrained` and `save_pretrained` do the rest.

A model of which only sizes are noted is not quantized: it trains, casts and is pruned on like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..anatomy.module_sizes import ModuleSizes, module_sizes, quantized_by, resize
from ..anatomy.per_layer import per_layer_config
from ..errors import CheckpointError, UnsupportedModelError
from .between import use_native
from .fast_path import use_fast_path
from .modules import QuantizedModule, replace_modules
from .schemes import SCHEMES
from .whole_codes import keep_codes_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "llmcompress"
FORMAT_VERSION = 2
"""The newest format: 1 has groups alone, 2 has sizes as well. A folder is written in the oldest that can tell it."""


class LLMCompressConfig(QuantizationConfigMixin):
    """How the modules of a folder are stored.

    Args:
        groups: dicts with `scheme`, the scheme's settings, and `modules`: the paths stored so.
        format_version: of this dict and of the tensors it describes; None takes the oldest that can tell the rest.
        sizes: what `module_sizes` found that the rest of the config does not tell.
        per_layer_config: what the sizes mean, layer by layer, for the reader; loading does not look at it.

    Raises:
        CheckpointError: a newer format, an unknown scheme, or a malformed group.

    Example:
        >>> LLMCompressConfig([{"scheme": "int8_embedding", "modules": ["wte"]}]).to_dict()["quant_method"]
        'llmcompress'
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        format_version: int | None = None,
        sizes: ModuleSizes | None = None,
        per_layer_config: dict[str, dict[str, int]] | None = None,
    ) -> None:
        if format_version is None:
            format_version = 2 if sizes else 1
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
        if sizes:
            self.sizes = sizes
            self.per_layer_config = per_layer_config or {}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> LLMCompressConfig | tuple[LLMCompressConfig, dict[str, Any]]:
        """Read what `to_dict` wrote; transformers fixes this signature."""
        if not isinstance(config_dict.get("groups"), list):
            raise CheckpointError("config.json: quantization_config must have a list of groups; the file is damaged.")
        told = [config_dict.get(name, {}) for name in ("sizes", "per_layer_config")]
        if not all(isinstance(value, dict) for value in told):
            raise CheckpointError(
                "config.json: sizes and per_layer_config of quantization_config must be dicts; the file is damaged."
            )
        config = cls(config_dict["groups"], config_dict.get("format_version", 0), *told)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of(
        cls, model: nn.Module, sizes: ModuleSizes | None = None, per_layer: dict[str, dict[str, int]] | None = None
    ) -> LLMCompressConfig:
        """Describe the quantized modules that `model` has, and its `sizes`, which are known."""
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for path, module in model.named_modules():
            if not isinstance(module, QuantizedModule):
                continue
            spec = module.spec()
            paths = next((paths for known, paths in groups if known == spec), None)
            if paths is None:
                groups.append((spec, paths := []))
            paths.append(path)
        return cls([{**spec, "modules": paths} for spec, paths in groups], None, sizes, per_layer)


class LLMCompressQuantizer(HfQuantizer):
    """Puts our modules into an empty model, and checks after loading that each of them was filled."""

    quantization_config: LLMCompressConfig

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """int8 layers have no backward pass; the Trainer refuses the model by this."""
        return not self.quantization_config.groups

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
        paths = _Paths(model)
        config = self.quantization_config
        found = {paths.find(path): entry for path, entry in getattr(config, "sizes", {}).items()}
        sizes = {path: entry for path, entry in found.items() if path is not None}
        resize(model, sizes)
        replacements: dict[nn.Module, nn.Module] = {}
        for group in config.groups:
            for name in group["modules"]:
                path = paths.find(name)
                if path is not None:
                    module = model.get_submodule(path)
                    replacements[module] = SCHEMES[group["scheme"]].from_spec(module, group)
        replace_modules(model, replacements)
        for target, source in model.all_tied_weights_keys.items():
            tied, partner = (model.get_submodule(key.rpartition(".")[0]) for key in (target, source))
            if isinstance(tied, QuantizedModule) and isinstance(partner, QuantizedModule) and target.endswith("weight"):
                tied.tie(partner)
        # Older transformers (5.17) take a tensor of another shape as it is.
        self._shapes = {name: tensor.shape for name, tensor in _tensors(model)}
        # A base model read from a folder with a head (or the reverse) has other paths than the folder.
        self.quantization_config = LLMCompressConfig.of(model, sizes, getattr(config, "per_layer_config", None))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                told = self._shapes.get(f"{path}.{name}".removeprefix("."), tensor.shape)
                if isinstance(module, QuantizedModule):
                    if tensor.shape != told or not getattr(tensor, "_is_hf_initialized", False):
                        raise CheckpointError(
                            f"model.safetensors has no {path}.{name} of the shape {tuple(told)} that "
                            "config.json tells; load it without other sizes (num_labels, ignore_mismatched_sizes) or "
                            "offloading, or else the folder is damaged: save the model again."
                        )
                elif tensor.shape != told:
                    raise CheckpointError(
                        f"{path}.{name} has the shape {tuple(tensor.shape)}, where config.json tells {tuple(told)}; "
                        "one of the two files was edited or comes from elsewhere: save the model again."
                    )
                elif isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                    raise CheckpointError(
                        f"model.safetensors holds codes for {path}.{name}, but quantization_config in config.json does "
                        "not name that module; the file was edited or is damaged: save the model again."
                    )
        # Where only sizes are noted, transformers must not go on to treat the model as a quantized one.
        _note(model, self.quantization_config)


def mark(model: PreTrainedModel) -> None:
    """Write in the config of `model` what it must tell of it: the quantized modules, and sizes smaller than it says.

    Plain `save_pretrained` then writes a folder that plain `from_pretrained` loads. Where there is nothing to tell, an
    earlier note is taken away. A model quantized by another method is left alone: that one writes its own config.

    Raises:
        UnsupportedModelError: the model differs from its config by more than smaller sizes, which no folder can tell;
            its quantized modules are noted nevertheless.

    Example:
        >>> import torch
        >>> from llmcompress.anatomy.surgery import keep_rows
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> keep_rows(model.bert.embeddings.position_embeddings, torch.arange(32))
        >>> mark(model)
        >>> list(model.config.quantization_config.sizes)
        ['bert.embeddings.position_embeddings']
    """
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        mark_quantized(model)
    if quantized_by(model) in (None, METHOD):
        _note(model, _config_of(model, module_sizes(model)))


def mark_quantized(model: PreTrainedModel) -> None:
    """Put a model that was quantized in memory in the state in which `from_pretrained` would have left it."""
    try:
        sizes = module_sizes(model)
    except UnsupportedModelError:
        sizes = {}  # it works in memory; that no folder can tell it is said by `mark`, which the runner calls
    _note(model, _config_of(model, sizes))


def _config_of(model: PreTrainedModel, sizes: ModuleSizes) -> LLMCompressConfig:
    return LLMCompressConfig.of(model, sizes, per_layer_config(model, sizes) if sizes else None)


def _note(model: PreTrainedModel, config: LLMCompressConfig) -> None:
    from transformers import PreTrainedModel

    quantized = bool(config.groups)
    keep_codes_whole(model)
    if quantized:
        use_native(model)
        use_fast_path(model)
        model.hf_quantizer = LLMCompressQuantizer(config, pre_quantized=True)
        model.is_quantized = True
        model.quantization_method = METHOD
    else:
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
    if quantized or hasattr(config, "sizes"):
        model.config.quantization_config = config
    else:
        vars(model.config).pop("quantization_config", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
            if quantized:
                module.config._is_quantized = True


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Paths:
    """Where the modules of a folder are in a model that may be its base model, or have a head that the folder lacks."""

    def __init__(self, model: PreTrainedModel) -> None:
        written = model.config.architectures or ()
        self._who = type(model).__name__
        self._same = self._who in written
        self._is_base = model.base_model is model
        self._of_base = type(model.base_model).__name__ in written
        self._prefix = model.base_model_prefix
        self._known = {path for path, _ in model.named_modules(remove_duplicate=False)}

    def find(self, path: str) -> str | None:
        """Return the path in the model, or None where it lacks a head's module.

        Raises:
            CheckpointError: the model is of the folder's very class, which is no base, and has no such module.
        """
        inside = f"{self._prefix}.{path}".removesuffix(".")
        if self._same:
            # `model.base_model.save_pretrained` writes paths of the whole model, and the class of its base.
            candidates = [path, path.removeprefix(f"{self._prefix}.")]
        elif self._of_base:
            candidates = [inside]
        elif path == self._prefix:
            candidates = [path, ""]
        else:
            candidates = [path, path.removeprefix(f"{self._prefix}."), inside] if path else []
        found = next((candidate for candidate in candidates if candidate in self._known), None)
        if found is None and self._same and not self._is_base:
            raise CheckpointError(
                f"config.json: quantization_config names the module {path!r}, which {self._who} does not have; the "
                "file is damaged: save the model again."
            )
        return found


# Importing this file makes the method known; `llmcompress._autoregister` sees to it that it is imported in time.
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LLMCompressConfig)
    register_quantizer(METHOD)(LLMCompressQuantizer)
