"""Where a training stands, on disk: weights in safetensors, optimizer and random states for `weights_only` loading."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "weights.safetensors"
_STATE = "trainer_state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint that `transformers.Trainer` wrote into `folder`, or None.

    One that was being written when the run was killed lacks its last file, or has half of it.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_complete(path)), None)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Return what Trainer tells of itself there: `global_step`, `max_steps`, `log_history` and more."""
    return dict(json.loads((checkpoint / _STATE).read_text(encoding="utf-8")))


def save_weights(model: nn.Module, file: Path) -> None:
    """Write all parameters and buffers of `model`, each once, atomically.

    Example:
        >>> import tempfile
        >>> layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(layer, Path(folder) / "weights.safetensors")
        ...     load_weights(other, Path(folder) / "weights.safetensors")
        >>> torch.equal(layer.weight, other.weight)
        True
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model)}, half)
    os.replace(half, file)


@torch.no_grad()
def load_weights(model: nn.Module, file: Path) -> None:
    """Copy what `save_weights` wrote into `model`, in place."""
    saved = load_file(file)
    for name, tensor in _tensors(model):
        tensor.copy_(saved[name].to(tensor.device))


def remembered(file: Path | None, make: Callable[[], list[Any]]) -> list[Any]:
    """Return what `make` makes, plain lists and dicts; read from `file` if an earlier run got so far.

    Example:
        >>> remembered(None, lambda: [1, 2])
        [1, 2]
    """
    if file is None:
        return make()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under torchrun each process makes and writes the same.
        half = file.with_suffix(f".{os.getpid()}.part")
        half.write_text(json.dumps(make()), encoding="utf-8")
        os.replace(half, file)
    return list(json.loads(file.read_text(encoding="utf-8")))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # Both leave out the second name of what is tied.
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in state_of(checkpoint)
    except (OSError, ValueError):
        return False
