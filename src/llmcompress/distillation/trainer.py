"""The trainer: `transformers.Trainer` with a distillation loss.

Trainer and accelerate do the running (mixed precision, accumulation, several processes, checkpoints); what is here
computes the loss and counts over the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer

from ..errors import CompressionError
from .batches import Row
from .checkpoints import WEIGHTS, load_weights, save_weights
from .generation import OnPolicy
from .heads import Batch, model_inputs
from .masking import Masking
from .objective import Objective
from .observation import Observed, Observer, Teacher
from .order import LikeLengths


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is an `Objective` over student and teacher.

    Args:
        student: what observes `model`.
        teacher: answers to a batch, without a gradient and not wrapped by accelerate; None where the objective asks
            none.
        objective: the loss.
        masking: hides tokens of each batch when its turn comes, or None.
        on_policy: replaces batches by what the student writes, or None.
        more: what `Trainer` takes: `model`, `args`, `train_dataset`, `data_collator`, `callbacks`.
    """

    def __init__(
        self,
        *,
        student: Observer,
        teacher: Teacher | None,
        objective: Objective,
        masking: Masking | None = None,
        on_policy: OnPolicy | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self.masking = masking
        self.on_policy = on_policy
        # The loss is divided by the counts of the whole accumulated batch; Trainer must not divide once more. Releases
        # before the second attribute look at the first one.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Take the batches of one optimizer step, and count over them and all processes what the losses divide by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        remake = self.masking or self.on_policy
        if remake is not None:
            batches = [remake(batch, self._generator(part)) for part, batch in enumerate(batches)]
        counts = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0)
        return batches, self.accelerator.reduce(counts.to(device), reduction="sum").clamp(min=1)

    def _generator(self, part: int) -> torch.Generator:
        """Return the source of chance of one batch: by seed, step, process and place in the step."""
        place = f"{self.args.seed} {self.state.global_step} {self.args.process_index} {part}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big"))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one batch, and the student's outputs if asked."""
        fed = model_inputs(inputs)
        # Fake quantization rounds a weight once a pass, though models may read it several times (each of the experts).
        with parametrize.cached():
            seen = self.student(fed, run=model)
        target = self.teach(inputs)
        counts = self.objective.counts(inputs) if num_items_in_batch is None else num_items_in_batch
        # The last step has the last value of a schedule.
        progress = self.state.global_step / max(self.state.max_steps - 1, 1)
        loss = self.objective(seen, target, inputs, counts, progress=min(progress, 1.0))
        if not bool(torch.isfinite(loss)):
            raise CompressionError(
                f"the loss of KnowledgeDistillation must be finite, got {loss.item()} at step "
                f"{self.state.global_step + 1} of {self.state.max_steps} on the rows "
                f"{', '.join(map(str, inputs['row'].tolist()))}; lower learning_rate, add warmup, or use "
                f"precision='fp32'; if it is always these rows, look at their texts and labels."
            )
        # Gradients are averaged over the processes, and the counts are already those of all of them.
        loss = loss * self.accelerator.num_processes
        return (loss, seen.outputs) if return_outputs else loss

    def teach(self, inputs: Batch) -> Observed | None:
        """Return what the teacher puts out for a batch; None where it is not asked."""
        if self.teacher is None or not self.objective.asks_teacher:
            return None
        with torch.no_grad():
            return self.teacher(inputs)

    def loss_on(self, held: Sequence[Row]) -> float:
        """Return the loss on rows that are not trained on, as it is weighted at the end of the training."""
        size = self.args.per_device_train_batch_size
        batches = [self._prepare_inputs(self.data_collator(held[at : at + size])) for at in range(0, len(held), size)]
        if self.masking is not None:
            batches = [self.masking(batch, torch.Generator().manual_seed(at)) for at, batch in enumerate(batches)]
        counts = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0).clamp(min=1)
        loss = 0.0
        for batch in batches:
            with self.accelerator.autocast():
                seen = self.student(model_inputs(batch))
            # No schedule shall pass for progress.
            loss += float(self.objective(seen, self.teach(batch), batch, counts.to(self.args.device), progress=1.0))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the losses in `state.log_history`, and write nothing anywhere."""
        self.state.log_history.append({**logs, "step": self.state.global_step})

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengths:
        rows = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LikeLengths([len(row["input_ids"]) for row in rows], size=size, seed=self.args.seed)

    # Checkpoints: weights alone, in safetensors; nothing is pickled that could run code when it is read.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_weights(self.model, Path(output_dir or self.args.output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(model or self.model, Path(resume_from_checkpoint) / WEIGHTS)
