"""Builds the native kernels into the wheel, and beside their sources for an editable install.

Without a compiler the package is installed all the same, computes in torch, and `llmcompress.kernels()` says so.
"""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BUILD = "src/llmcompress/quantization/kernels/native/build.py"


class NativeKernels(BuildHookInterface):
    """Compiles, and names the platform that the wheel is for."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and put the library among the files of the wheel."""
        if self.target_name != "wheel":
            return
        spec = importlib.util.spec_from_file_location("llmcompress_native_build", Path(self.root) / _BUILD)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except RuntimeError as error:
            self.app.display_warning(f"llmcompress is installed without native kernels: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())
