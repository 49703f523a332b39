"""llmcompress: compress any Hugging Face model by strategies that compose, and prove what each step cost and gained.

Importing the package imports no torch: every public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressor import Action, Compressor, Context, Cut
    from .errors import (
        CheckpointError,
        CompressionError,
        ConfigError,
        DuplicateNameError,
        MissingInputError,
        NothingToCompressError,
        PipelineOrderError,
        PluginError,
        UnknownNameError,
        UnsupportedModelError,
        VerificationError,
    )
    from .registry import Registry, compressors, register, tasks

__version__ = "0.1.0"

_HOME = {
    "compressor": ("Action", "Compressor", "Context", "Cut"),
    "errors": (
        "CheckpointError",
        "CompressionError",
        "ConfigError",
        "DuplicateNameError",
        "MissingInputError",
        "NothingToCompressError",
        "PipelineOrderError",
        "PluginError",
        "UnknownNameError",
        "UnsupportedModelError",
        "VerificationError",
    ),
    "registry": ("Registry", "compressors", "register", "tasks"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
