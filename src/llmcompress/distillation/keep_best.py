"""Stop when the student gets no better, and give back the best one that there was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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
        count = self._settings.evaluations
        if state.global_step not in {round(number * state.max_steps / count) for number in range(1, count + 1)}:
            return
        with random_state_kept(), modes_kept(self._model), torch.no_grad():
            self._model.eval()
            # One process decides: the last digit of a score may differ between them.
            score, higher = broadcast_object_list(list(self._measure()))
        state.log_history.append({"evaluation": score, "higher_is_better": higher, "step": state.global_step})
        behind = evaluations_since_best(state.log_history)
        if not behind:
            save_weights(self._model, _best_file(args))
        elif behind >= self._settings.patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Take the best weights."""
        load_weights(self._model, _best_file(args))


def evaluations_since_best(log: Iterable[Mapping[str, Any]]) -> int:
    """Return how many evaluations the trainer's log has behind the best one; 0 where the last one is the best.

    Example:
        >>> evaluations_since_best([{"evaluation": score, "higher_is_better": True} for score in (0.5, 0.7, 0.7, 0.6)])
        2
    """
    best, behind = None, 0
    for entry in log:
        if "evaluation" not in entry:
            continue
        score = entry["evaluation"] if entry["higher_is_better"] else -entry["evaluation"]
        # No comparison with NaN holds: as the first score it would stay the best one.
        score = -math.inf if math.isnan(score) else score
        if best is None or score > best:
            best, behind = score, 0
        else:
            behind += 1
    return behind


def _best_file(args: Any) -> Path:
    # Processes need not share a disk, and all have the same weights.
    return Path(args.output_dir) / f"best-{args.process_index}.safetensors"
