"""What is in a model folder, told from its files alone: no weight is read, no model is built."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from .checkpoint import METADATA_FILE, read_metadata
from .errors import CheckpointError
from .evaluation.table import Table
from .evaluation.units import bytes_text
from .result import Report
from .streaming.folder import open_folder
from .tensor_files import Stored

# What the architectures call the same size, in the order in which they are looked for.
_SIZES: Mapping[str, tuple[str, ...]] = {
    "blocks": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "key/value heads": ("num_key_value_heads",),
    "feed-forward": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim"),
    "experts": ("num_local_experts", "num_experts"),
    "vocabulary": ("vocab_size",),
}


class StoredAs(BaseModel, frozen=True):
    """One way in which tensors of a folder are stored."""

    scheme: str = Field(description="scheme of the quantization, or the dtype of what is not quantized")
    bits: float | None = Field(
        None, description="bits a code, scales and zero points not included; of a dtype: its own"
    )
    group_size: int | None = Field(None, description="inputs that share a scale; None: a whole row, or no scale at all")
    modules: tuple[str, ...] = Field(description="paths of the modules, or names of the tensors")
    bytes: int = Field(description="bytes of all their tensors")


class Contents(BaseModel, frozen=True):
    """What a model folder holds; `show` reads it."""

    folder: str
    architecture: str = Field(description="name of the model's class")
    sizes: dict[str, int] = Field(description="number of blocks, hidden features...; as far as the config tells them")
    cut: int = Field(0, description="modules that are smaller than these sizes tell")
    files: dict[str, int] = Field(description="bytes of each file")
    stored: tuple[StoredAs, ...] = Field(description="how the tensors are stored, most bytes first")
    method: str | None = Field(None, description="the quantization method, as the config names it")
    report: Report | None = Field(None, description="the run that made it; None for a folder of another origin")

    @property
    def recipe(self) -> str | None:
        """The recipe that made it, as YAML, or None: where a step was rolled back, those that are left."""
        if self.report is None:
            return None
        recipe = self.report.recipe
        if self.report.rolled_back is not None:
            recipe = {"name": recipe["name"], "steps": [record.step for record in self.report.steps]}
        return yaml.safe_dump(recipe, sort_keys=False).rstrip()

    def __str__(self) -> str:
        total = sum(self.files.values())
        lines = [f"{self.folder}: {self.architecture}, {bytes_text(total)} in {len(self.files)} files"]
        lines.append(", ".join(f"{name} {size}" for name, size in self.sizes.items()) or "the config tells no sizes")
        if self.cut:
            lines.append(f"{self.cut} modules are smaller than that, each by its own entry in config.json")
        lines += ["", self._stored_table().text(), ""]
        if self.report is None:
            return "\n".join([*lines, f"no {METADATA_FILE}: llmcompress did not write this folder"])
        versions = ", ".join(f"{name} {number}" for name, number in self.report.versions.items())
        return "\n".join([*lines, str(self.report), "", "recipe", self.recipe or "", "", f"made with {versions}"])

    def _repr_html_(self) -> str:
        return self._stored_table().html() + ("" if self.report is None else self.report._repr_html_())

    def _stored_table(self) -> Table:
        rows = [
            [
                one.scheme,
                "" if one.bits is None else f"{one.bits:g}",
                "" if one.group_size is None else str(one.group_size),
                str(len(one.modules)),
                bytes_text(one.bytes),
                one.modules[0],
            ]
            for one in self.stored
        ]
        return Table(["stored as", "bits", "group", "parts", "bytes", "first of them"], rows)


def show(folder: str | Path) -> Contents:
    """Tell what is in a model folder: sizes, how each part is stored, and the run that made it.

    Args:
        folder: one that `save_pretrained` of a result wrote, or any other with `config.json` and safetensors files.

    Returns:
        The contents: `print` shows a table, `.model_dump_json()` writes everything. Weights are not checked against
        their hashes; `checkpoint.verify` does that.

    Raises:
        CheckpointError: it is no model folder, or one of its files is damaged.

    Example:
        >>> import llmcompress as lc, tempfile
        >>> from llmcompress.testing import tiny_model
        >>> folder = tempfile.mkdtemp() + "/small"
        >>> _ = lc.compress(tiny_model("bert"), "dynamic_quantization", progress=False).save_pretrained(folder)
        >>> sorted(one.scheme for one in lc.show(folder).stored)
        ['float32', 'int8_embedding', 'int8_linear']
    """
    path = Path(folder)
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise CheckpointError(f"show() must have a model folder, got {str(folder)!r}, which is {found}.")
    opened = open_folder(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
        architecture = (config.get("architectures") or [config["model_type"]])[0]
        stored = tuple(sorted(_stored(opened.stored, quantization), key=lambda one: -one.bytes))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'config.json'} is damaged ({error!r}); copy or save the model again."
        ) from error
    return Contents(
        folder=str(folder),
        architecture=architecture,
        sizes=_sizes(config),
        cut=len(quantization.get("sizes") or {}),
        files={file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()},
        stored=stored,
        method=quantization.get("quant_method"),
        report=_report(path),
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    # Models of images and texts tell the sizes of their language model one level below.
    config = {**(config.get("text_config") or {}), **config}
    found = {size: next((config[key] for key in keys if key in config), None) for size, keys in _SIZES.items()}
    return {size: value for size, value in found.items() if isinstance(value, int)}


def _stored(tensors: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Iterable[StoredAs]:
    """Yield one entry for each group of the quantization, and one for each dtype of what no group names."""
    left = dict(tensors)
    for group in quantization.get("groups") or []:
        modules = tuple(group["modules"])
        own = {name: tensor for path in modules for name, tensor in tensors.items() if name.startswith(f"{path}.")}
        left = {name: tensor for name, tensor in left.items() if name not in own}
        yield StoredAs(
            scheme=group["scheme"],
            bits=group.get("bits", 8 if group["scheme"].startswith("int8") else None),
            group_size=group.get("group_size"),
            modules=modules,
            bytes=sum(tensor.nbytes for tensor in own.values()),
        )
    by_dtype: dict[Any, dict[str, Stored]] = defaultdict(dict)
    for name, tensor in left.items():
        by_dtype[tensor.dtype][name] = tensor
    for dtype, own in by_dtype.items():
        scheme = str(dtype).removeprefix("torch.")
        count = sum(tensor.nbytes for tensor in own.values())
        yield StoredAs(scheme=scheme, bits=8.0 * dtype.itemsize, modules=tuple(own), bytes=count)


def _report(path: Path) -> Report | None:
    if not (path / METADATA_FILE).is_file():
        return None
    try:
        return Report.model_validate(read_metadata(path))
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"{path / METADATA_FILE} is damaged at {wrong}; copy or save the model again.") from None
