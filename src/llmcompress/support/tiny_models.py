"""The architectures of the installed transformers by task, and a tiny random model of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.models.auto import modeling_auto

from ..anatomy.probe import probe_inputs, probe_outputs
from ..errors import UnsupportedModelError
from .tiny_configs import tiny_configs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_SPREAD = 0.1


@dataclass(frozen=True)
class Task:
    """One auto class of transformers.

    Attributes:
        key: its name in commands and files.
        title: its name on the page.
        classes: model class by architecture (`model_type`).
    """

    key: str
    title: str
    classes: Mapping[str, str]


TASKS: dict[str, Task] = {
    task.key: task
    for task in (
        Task("causal-lm", "Causal language models", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        Task("classification", "Sequence classifiers", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        Task("seq2seq-lm", "Sequence-to-sequence models", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    )
}


class NotBuiltError(Exception):
    """No tiny model of an architecture could be built or run; the message says why."""


def build_tiny(task: str, architecture: str) -> PreTrainedModel:
    """Return a tiny random model of `architecture` for `task`, in eval mode, that reads token ids; always the same one.

    Raises:
        NotBuiltError: the config does not build at this size, or the model needs more than token ids.

    Example:
        >>> model = build_tiny("classification", "bert")
        >>> type(model).__name__, model.config.hidden_size
        ('BertForSequenceClassification', 64)
    """
    model_class = getattr(transformers, TASKS[task].classes[architecture])
    reason = None
    configs = tiny_configs(architecture, model_class)
    while True:
        try:
            config = next(configs, None)
            if config is None:
                break
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = model_class(config).eval()
                _spread(model)
            if _runs(model):
                return model
            reason = reason or "its tiny random model gives NaN or infinity"
        except UnsupportedModelError as error:
            reason = reason or str(error)
        except Exception as error:  # any model's code runs here
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NotBuiltError(reason)


def _runs(model: PreTrainedModel) -> bool:
    return bool(torch.isfinite(probe_outputs(model, probe_inputs(model))).all())


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Give biases, norms and whatever starts constant a spread: damage to what is all zero or one would not show."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dim() < 2 or bool((parameter == parameter.flatten()[0]).all())):
            parameter.add_(_SPREAD * torch.randn_like(parameter))
