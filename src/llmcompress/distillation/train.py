"""A whole training that leaves no trace but the trained weights: all else that it touches is given back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..anatomy.find import anatomy
from ..anatomy.kept import random_state_kept
from ..compressor import Rounding
from ..errors import ConfigError
from .arguments import Training, training_arguments
from .batches import Row
from .checkpoints import WEIGHTS, last_checkpoint, load_weights, state_of
from .dropout import dropout_of
from .early_stopping import EarlyStopping, held_out_rows
from .fake_quantization import fake_quantized
from .first_rows import fitted_projections
from .generation import OnPolicy
from .isolation import checkpointed_activations, traces_removed
from .keep_best import KeepBest, evaluations_since_best
from .lora import adapted
from .masking import Masking
from .objective import Objective
from .observation import Teacher, observing
from .projections import projected
from .sharding import ShardedZeros, check_sharding, is_sharded, sharded_copy
from .trainer import DistillationTrainer
from .zeros import HeldZeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FITTED_ROWS = 32


@dataclass(frozen=True)
class Course:
    """How a training went.

    Attributes:
        losses: of the first step, then the mean of each tenth of the training.
        evaluations: step and score of each evaluation of early stopping.
        steps: how many were taken.
        adapted: layers with an adapter; 0 without LoRA.
    """

    losses: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    steps: int
    adapted: int = 0

    def __str__(self) -> str:
        told = f"loss {' -> '.join(f'{loss:.4g}' for loss in self.losses)}"
        if self.evaluations:
            told += (
                f"; evaluated {', '.join(f'{score:.4g} at {step}' for step, score in self.evaluations)}; the best kept"
            )
        return told + (f"; {self.adapted} layers by low-rank changes, added to the weights" if self.adapted else "")


def train(
    model: PreTrainedModel,
    teacher: Teacher | None,
    rows: Sequence[Row],
    objective: Objective,
    training: Training,
    *,
    collator: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    roundings: Sequence[Rounding] = (),
    masking: Masking | None = None,
    on_policy: OnPolicy | None = None,
) -> Course:
    """Train `model` in place, and return how it went.

    With `roundings` the student computes as a later quantization step will have it; see `fake_quantized`. `masking`
    hides tokens of each batch, `on_policy` replaces batches by what the student writes.

    The weights are all that changes: device, dtype, modes, config, forward, gradients and the caller's random state
    are as before, also if training fails. Weights below 32 bits are trained in fp32 and rounded at the end.

    Raises:
        CompressionError: the loss is NaN or infinite.
        ConfigError: it is launched under FSDP in a way that is not supported; see `check_sharding`.
    """
    sharded = is_sharded()
    if sharded:
        check_sharding(training, rounded=bool(roundings), on_policy=on_policy is not None)
        # What Trainer saves of sharded weights is in pickles.
        training = replace(training, folder=None)
    with ExitStack() as undo:
        folder = training.folder
        if folder is None:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="llmcompress-")))
        undo.enter_context(random_state_kept())
        undo.enter_context(traces_removed(model))
        arguments = training_arguments(training, folder, model.device)
        # Its parts have the names by which they are known before adapters and shards are put around them.
        body = anatomy(model) if objective.reads & {"relations", "attention"} else None
        if sharded:
            model = undo.enter_context(sharded_copy(model))
        zeros = ShardedZeros(model) if sharded else HeldZeros(model)
        if training.dropout is not None:
            # Before adapters are put around its layers: theirs is LoRA's own.
            undo.enter_context(dropout_of(model.modules(), training.dropout))
        adapted_layers = 0
        if training.lora is not None:
            # Zeros of the weights underneath are not trained; what is added to them is zeroed at the end.
            undo.callback(zeros.restore)
            adapted_layers = undo.enter_context(adapted(model, training.lora, objective.head))
        if training.gradient_checkpointing:
            undo.enter_context(checkpointed_activations(model))
        pairs = objective.alignment.pairs
        blocks = [{mine for mine, _ in own} for own in pairs]
        student = undo.enter_context(observing(model, objective.reads, blocks, body=body))
        if teacher is not None:
            # As many rows whatever the size of a batch is, so that processes may share them.
            shown, size = rows[:_FITTED_ROWS], training.batch_size
            batches = (collator(shown[at : at + size]) for at in range(0, len(shown), size))
            layers = fitted_projections(student, teacher, objective, batches)
            undo.enter_context(projected(model, layers, [f"{prefix}hidden_states" for prefix in student.prefixes]))
        undo.enter_context(zeros.masked_gradients())
        undo.enter_context(fake_quantized(model, roundings))
        train_rows: list[Row] = list(rows)
        held_rows: list[Row] = []
        stop = training.early_stopping
        if stop is not None and stop.task is None:
            train_rows, held_rows = held_out_rows(train_rows, stop.held_out, training.seed)
        trainer = DistillationTrainer(
            model=model,
            student=student,
            teacher=teacher,
            objective=objective,
            masking=masking,
            on_policy=on_policy,
            args=arguments,
            train_dataset=train_rows,
            data_collator=collator,
            callbacks=[_RestoreZeros(zeros), _LogTheEnd()],
        )
        if sharded and not trainer.is_fsdp_enabled:
            raise ConfigError(
                f"KnowledgeDistillation must have its model on a GPU under FSDP, got one on {model.device}, where "
                f"accelerate does not shard; move it to the process's GPU, or launch without --use_fsdp."
            )
        trainer.remove_callback(PrinterCallback)
        if stop is not None:
            trainer.add_callback(KeepBest(stop, model, _measure(trainer, stop, held_rows, training)))
        log, steps = _run(trainer, last_checkpoint(folder), stop)
        # The folder may go as soon as one process is back; none shall still read from it.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
    return Course(
        losses=tuple(entry["loss"] for entry in log if "loss" in entry),
        evaluations=tuple((entry["step"], entry["evaluation"]) for entry in log if "evaluation" in entry),
        steps=steps,
        adapted=adapted_layers,
    )


def _run(
    trainer: DistillationTrainer, last: Path | None, stop: EarlyStopping | None
) -> tuple[list[dict[str, Any]], int]:
    """Train to the end, on from the checkpoint `last` if there is one; return the log and the steps taken."""
    if last is not None and _is_over(state := state_of(last), stop):
        # Killed behind its last step; Trainer would take one more.
        load_weights(trainer.model, last / WEIGHTS)
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        return state["log_history"], state["global_step"]
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer.state.log_history, trainer.state.global_step


def _is_over(state: Mapping[str, Any], stop: EarlyStopping | None) -> bool:
    """Tell whether training ended at a checkpoint: by its steps or, which Trainer does not keep there, before."""
    stopped = stop is not None and evaluations_since_best(state["log_history"]) >= stop.patience
    return stopped or state["global_step"] >= state["max_steps"]


def _measure(
    trainer: DistillationTrainer, stop: EarlyStopping, held: Sequence[Row], training: Training
) -> Callable[[], tuple[float, bool]]:
    def measure() -> tuple[float, bool]:
        if stop.task is None:
            return trainer.loss_on(held), False
        score = stop.task.evaluate(trainer.model, training.tokenizer, batch_size=training.batch_size, progress=False)
        return float(score.value), bool(score.higher_is_better)

    return measure


class _RestoreZeros(TrainerCallback):
    def __init__(self, zeros: HeldZeros) -> None:
        self._zeros = zeros

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if isinstance(self._zeros, ShardedZeros):
            self._zeros.find(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._zeros.restore()


class _LogTheEnd(TrainerCallback):
    """Training need not end where a tenth of it does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps
