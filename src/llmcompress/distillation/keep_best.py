"""Stop when the student gets no better, and give back the best one that there was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..anatomy.kept import modes_kept, random_state_kept
from .checkpoints import load_weights, save_weights
from .early_stopping import EarlyStopping

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KeepBest(TrainerCallback):
    """Evaluate at even distances, keep the best weights in the output folder, stop without a better one.

    All that it knows stands in the trainer's log, so that a training that was killed goes on with it.

    Args:
        settings: how often, and how patient.
        model: the student.
        measure: returns how good it is, and whether more is better.
    """

    def __init__(
        self, settings: EarlyStopping, model: PreTrainedModel, measure: Callable[[], tuple[float, bool]]
    ) -> None:
        self._settings, self._model, self._measure = settings, model, measure

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Evaluate if it is time."""
        every = math.ceil(state.max_steps / self._settings.evaluations)
        if state.global_step % every and state.global_step < state.max_steps:
            return
        with random_state_kept(), modes_kept(self._model), torch.no_grad():
            self._model.eval()
            # One process decides: the last digit of a score may differ between them.
            score, higher = broadcast_object_list(list(self._measure()))
        before = [entry["evaluation"] for entry in state.log_history if "evaluation" in entry]
        state.log_history.append({"evaluation": score, "step": state.global_step})
        best = (max if higher else min)(before, default=None)
        if best is None or (score > best if higher else score < best):
            save_weights(self._model, _best_file(args))
        elif len(before) - before.index(best) >= self._settings.patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Take the best weights."""
        load_weights(self._model, _best_file(args))


def _best_file(args: Any) -> Path:
    # Processes need not share a disk, and all have the same weights.
    return Path(args.output_dir) / f"best-{args.process_index}.safetensors"
