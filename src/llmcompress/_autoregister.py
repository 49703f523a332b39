"""Makes plain `from_pretrained` know our folders, without importing torch or transformers.

transformers keeps its quantization methods in a table in `transformers.quantizers.auto`. Where that module is loaded
already, our method is entered at once; else a finder waits for the import, whoever asks for it, and enters it then.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only `transformers.quantizers.auto`, as usual, and has our method registered once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        # Where that file is itself the one that imports transformers, it is found half done here and goes on after us.
        importlib.import_module("llmcompress.quantization.hf")
    except Exception as error:
        # Whoever imports transformers may not need us at all: their import must not fail for our sake.
        warnings.warn(
            f"llmcompress could not register with transformers ({type(error).__name__}: {error}); folders that it "
            "quantized will not load. Check that the versions of the two fit.",
            stacklevel=2,
        )


def install() -> None:
    """Register now if transformers is there, else as soon as it is imported."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
