"""How big a model is, in five numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from ..anatomy.footprint import footprint, sparse_bytes
from ..tensor_files import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Size(BaseModel, frozen=True, extra="forbid"):
    """How big the model is; tied weights counted once."""

    parameters: int = Field(description="weights, whatever their encoding")
    nonzero: int = Field(description="weights that are not zero")
    memory_bytes: int = Field(description="bytes of all tensors in memory")
    disk_bytes: int = Field(description="bytes of the safetensors files that from_pretrained reads")
    from_files: bool = Field(description="whether disk_bytes was read off the folder, or predicted from the tensors")
    sparse_bytes: int | None = Field(
        default=None,
        description="theoretical, not realised: bytes of a file that stores a bit a weight and only those that are not "
        "zero, where that is smaller; None in documents from before it was counted",
    )

    @property
    def zeros(self) -> float:
        """Share of the weights that are zero, in [0, 1]."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0


def measure_size(model: PreTrainedModel, source: object = None) -> Size:
    """Measure how big `model` is; `source` is the folder it was loaded from, if it was.

    Example:
        >>> import llmcompress.testing as lt
        >>> size = measure_size(lt.tiny_model("bert"))
        >>> size.parameters, size.memory_bytes > 4 * size.parameters, size.sparse_bytes < size.disk_bytes
        (112450, True, True)
    """
    found = footprint(model)
    files = weight_files(Path(source)) if isinstance(source, (str, Path)) else ()
    from_files = bool(files) and all(file.is_file() for file in files)
    return Size(
        parameters=found.parameters,
        nonzero=found.nonzero,
        memory_bytes=found.memory_bytes,
        disk_bytes=sum(file.stat().st_size for file in files) if from_files else found.disk_bytes,
        from_files=from_files,
        sparse_bytes=sparse_bytes(model),
    )
