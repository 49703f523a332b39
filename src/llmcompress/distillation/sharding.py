"""Training with the weights spread over the processes (FSDP2), as `accelerate launch --use_fsdp` asks for.

Sharding rebuilds a model's parameters for good. So a copy is sharded and trained, and its weights are brought home.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError
from .arguments import Training
from .zeros import HeldZeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_sharded() -> bool:
    """Tell whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def check_sharding(training: Training, *, rounded: bool, on_policy: bool) -> None:
    """Refuse what cannot be done on sharded weights.

    Raises:
        ConfigError: the older FSDP is asked for, or a way of training that reads whole weights.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("KnowledgeDistillation must be launched with FSDP 2, got FSDP 1; pass --fsdp_version 2.")
    wanted = {
        "lora": training.lora is not None,
        "early_stopping": training.early_stopping is not None,
        "quantize_for": rounded,
        "generation on policy": on_policy,
    }
    given = [name for name, is_given in wanted.items() if is_given]
    if given:
        raise ConfigError(
            f"KnowledgeDistillation.{given[0]} must be left out under FSDP, where no process has whole weights; launch "
            f"it without --use_fsdp: then each process has the whole model (DDP)."
        )


@contextmanager
def sharded_copy(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Give a copy to shard and train; afterwards `model` has its weights, in every process.

    The model itself waits in the CPU's memory.
    """
    trained = copy.deepcopy(model)
    model.to("cpu")
    yield trained
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*trained.named_parameters(), *trained.named_buffers()):
            # Each process has a part; all put them together, one weight after the other.
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if name in own:
                own[name].copy_(whole.to("cpu"))


class ShardedZeros(HeldZeros):
    """Zeros of weights that are spread over processes; each holds those of its part. `find` comes after sharding."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._masks = [(names[id(weight)], zero) for weight, zero in self._held]
        self._held = []

    def find(self, model: torch.nn.Module) -> None:
        """Take the parts that this process has of the weights of the sharded `model`."""
        from torch.distributed.tensor import distribute_tensor

        parameters = dict(model.named_parameters())
        for name, zero in self._masks:
            weight = parameters[name]
            part = distribute_tensor(zero.to(weight.device), weight.device_mesh, weight.placements)
            self._held.append((weight, part))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the zeros again."""
        for weight, zero in self._held:
            weight.to_local().masked_fill_(zero.to_local(), 0)
