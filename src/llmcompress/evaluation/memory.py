"""Peak memory of loading a model and of running it, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from ..data import longest_input
from ..errors import CheckpointError, CompressionError, ConfigError
from .inference import bars_hidden
from .tasks.task import check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Memory(BaseModel, frozen=True, extra="forbid"):
    """Peak resident memory of a fresh process that loads a folder and runs one batch.

    Python and the libraries take some hundred MiB before any model is there: `baseline_bytes`. What the model costs is
    what comes on top. Weights are mapped from the file and count when they are first read: rows of an embedding that no
    token of the batch asks for are not resident.
    """

    baseline_bytes: int = Field(description="resident before loading, with all libraries imported")
    load_peak_bytes: int = Field(description="peak while the folder is loaded")
    inference_peak_bytes: int = Field(description="peak while the batch runs")
    cuda_peak_bytes: int | None = Field(description="peak of the CUDA allocator over both; None without a CUDA device")
    batch_size: int
    tokens: int

    @property
    def model_bytes(self) -> int:
        """What loading and running the model took beyond the libraries, at its peak."""
        return max(self.load_peak_bytes, self.inference_peak_bytes) - self.baseline_bytes


def measure_memory(
    model: PreTrainedModel | str | Path, *, batch_size: int = 1, tokens: int = 128, device: str = "cpu"
) -> Memory:
    """Load `model` in a fresh process, run one batch, and report the peaks.

    Args:
        model: a folder that `save_pretrained` wrote, or a model, which is saved to a temporary folder first.
        batch_size: rows of the batch.
        tokens: tokens a row.
        device: where the fresh process runs the model.

    Raises:
        ConfigError: a number is out of range, or the model cannot take so many tokens.
        CheckpointError: there is no such folder.
        CompressionError: the fresh process failed; the message holds its last words.
    """
    check_positive("batch_size", batch_size, optional=False)
    check_positive("tokens", tokens, optional=False)
    if not isinstance(model, (str, Path)):
        most = longest_input(model)
        if most is not None and tokens > most:
            raise ConfigError(f"tokens must be at most {most} for {type(model).__name__}, got {tokens}.")
    with ExitStack() as stack:
        if isinstance(model, (str, Path)):
            folder = Path(model)
            if not (folder / "config.json").is_file():
                raise CheckpointError(f"measure_memory.model must be a model or its folder, got {str(model)!r}.")
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmcompress-")))
            stack.enter_context(bars_hidden())
            model.save_pretrained(folder)
        command = [sys.executable, "-m", "llmcompress.evaluation.memory_probe", str(folder.resolve())]
        process = subprocess.run(
            [*command, str(batch_size), str(tokens), device], capture_output=True, text=True, check=False
        )
    if process.returncode != 0:
        name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        last = process.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise CompressionError(
            f"measure_memory could not load and run {name} in a fresh process "
            f"(exit status {process.returncode}): {last[0]}"
        )
    return Memory.model_validate_json(process.stdout.strip().splitlines()[-1])
