"""The training loop: `transformers.Trainer` with a distillation loss, leaving no trace but the trained weights.

Trainer and accelerate do the running (mixed precision, accumulation, several processes); what is here computes the
loss, counts over the global batch, and gives model and caller back everything that training touches.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..compressor import Rounding
from ..errors import CompressionError
from .batches import Row
from .fake_quantization import fake_quantized
from .first_rows import fitted_projections
from .heads import Batch, model_inputs
from .objective import Objective
from .observation import Observer, Teacher, observing
from .projections import projected
from .zeros import HeldZeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["auto", "fp32", "bf16"]
_FITTED_ROWS = 32
Remake = Callable[[Batch, torch.Generator], dict[str, torch.Tensor]]


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss is an `Objective` over student and teacher.

    Args:
        student: what observes `model`.
        teacher: answers to a batch, without a gradient and not wrapped by accelerate; None where the objective asks
            none.
        objective: the loss.
        remake: what is done to each batch when its turn comes (masking, generation); its generator is the same however
            often a run was interrupted.
        more: what `Trainer` takes: `model`, `args`, `train_dataset`, `data_collator`, `callbacks`.
    """

    def __init__(
        self,
        *,
        student: Observer,
        teacher: Teacher | None,
        objective: Objective,
        remake: Remake | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self.remake = remake
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
        if self.remake is not None:
            batches = [self.remake(batch, self._generator(part)) for part, batch in enumerate(batches)]
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
        target = None
        if self.teacher is not None and self.objective.asks_teacher:
            with torch.no_grad():
                target = self.teacher(inputs)
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the losses in `state.log_history`, and write nothing anywhere."""
        self.state.log_history.append({**logs, "step": self.state.global_step})

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        # Rows of like length share a batch, so little is padded. The generator of its own makes every process draw the
        # same order, whatever its dropout took from the global one.
        rows = self.train_dataset if train_dataset is None else train_dataset
        generator = torch.Generator().manual_seed(self.args.seed)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(size, lengths=[len(row["input_ids"]) for row in rows], generator=generator)


class _RestoreZeros(TrainerCallback):
    def __init__(self, zeros: HeldZeros) -> None:
        self._zeros = zeros

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._zeros.restore()


def train(
    model: PreTrainedModel,
    teacher: Teacher | None,
    rows: Sequence[Row],
    objective: Objective,
    *,
    collator: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    epochs: float | None,
    steps: int | None,
    learning_rate: float,
    batch_size: int,
    warmup: float,
    weight_decay: float,
    gradient_accumulation: int,
    precision: Precision,
    seed: int,
    progress: bool,
    roundings: Sequence[Rounding] = (),
    remake: Remake | None = None,
) -> list[float]:
    """Train `model` in place and return the losses: of the first step, then the mean of each epoch.

    With `roundings` the student computes as a later quantization step will have it; see `fake_quantized`.

    The weights are all that changes: device, dtype, modes, config, forward, gradients and the caller's random state
    are as before, also if training fails. Weights below 32 bits are trained in fp32 and rounded at the end.

    Raises:
        CompressionError: the loss is NaN or infinite.
    """
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="llmcompress-"))
        undo.enter_context(_random_state_kept())
        undo.enter_context(_traces_removed(model))
        pairs = objective.alignment.pairs
        student = undo.enter_context(observing(model, objective.reads, [{mine for mine, _ in own} for own in pairs]))
        if teacher is not None:
            # As many rows whatever the size of a batch is, so that processes may share them.
            shown = rows[:_FITTED_ROWS]
            batches = (collator(shown[at : at + batch_size]) for at in range(0, len(shown), batch_size))
            layers = fitted_projections(student, teacher, objective, batches)
            undo.enter_context(projected(model, layers, [f"{prefix}hidden_states" for prefix in student.prefixes]))
        zeros = HeldZeros(model)
        undo.enter_context(zeros.masked_gradients())
        undo.enter_context(fake_quantized(model, roundings))
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs if epochs is not None else 1,
            max_steps=steps if steps is not None else -1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=warmup,
            weight_decay=weight_decay,
            bf16=use_bf16(precision, model.device),
            use_cpu=model.device.type == "cpu",
            seed=seed,
            save_strategy="no",
            logging_strategy="epoch",
            logging_first_step=True,
            report_to="none",
            disable_tqdm=not progress,
            remove_unused_columns=False,
            dataloader_pin_memory=model.device.type == "cuda",
        )
        # One process drives one device: DataParallel would copy the student, not the teacher.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = DistillationTrainer(
            model=model,
            student=student,
            teacher=teacher,
            objective=objective,
            remake=remake,
            args=arguments,
            train_dataset=list(rows),
            data_collator=collator,
            callbacks=[_RestoreZeros(zeros)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.accelerator.free_memory()
    return losses


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Tell whether matrix products are in bfloat16; `"auto"` takes it where the hardware gains by it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # AVX-512's bf16 dot product alone loses more in casts than it gains (measured: 1.1x to 1.4x slower than fp32 on
        # MiniLM); matrix tiles pay.
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return False


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _traces_removed(model: PreTrainedModel) -> Iterator[None]:
    """Train in fp32, and undo all that Trainer and accelerate leave on a model beside its weights."""
    attributes = set(vars(model))
    device, cache = model.device, getattr(model.config, "use_cache", None)
    dtypes = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # Steps of a small learning rate vanish in the rounding of half precision.
    for parameter in dtypes:
        parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
    try:
        with _modes_kept(model):
            yield
    finally:
        model.to(device)
        model.zero_grad(set_to_none=True)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        # Accelerate puts its autocast around `forward` as an attribute of the instance.
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        if cache is not None:
            model.config.use_cache = cache
        elif "use_cache" in vars(model.config):
            del model.config.use_cache
