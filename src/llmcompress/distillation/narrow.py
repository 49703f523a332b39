"""Students as deep as their teacher and narrower: which widths are cut, by the registered structural pruning."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..compressor import Action, Compressor, Context
from ..errors import ConfigError, UnsupportedModelError
from ..registry import compressors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tried in turn: the residual stream where it can be cut, then what lies inside the blocks.
_AXES = (
    ("hidden", "heads", "ffn"),
    ("hidden", "query_heads", "ffn"),
    ("heads", "ffn"),
    ("query_heads", "ffn"),
    ("ffn",),
)


def parse_width(spec: str) -> float:
    """Return the share of each width that `"width:0.5"` keeps.

    Raises:
        ConfigError: it is no number in (0, 1).

    Example:
        >>> parse_width("width:0.5")
        0.5
    """
    match = re.fullmatch(r"width:(\d*\.?\d+)", spec.replace(" ", ""))
    if match is None or not 0 < float(match[1]) < 1:
        raise ConfigError(
            f"KnowledgeDistillation.student must be 'width:' and the share of each width to keep, in (0, 1), got "
            f"{spec!r}."
        )
    return float(match[1])


def narrowing(model: PreTrainedModel, spec: str, context: Context) -> tuple[Compressor, list[Action]]:
    """Return the step that makes a student of `spec` out of `model`, and its plan.

    Hidden features, attention heads and feed-forward channels go together, those of least importance by the gradients
    of the model's own loss (`"taylor"`). What the architecture or its config cannot have narrower is left, with the
    reason in the plan.

    Raises:
        ConfigError: `spec` is malformed.
        UnsupportedModelError: no width of the model can be cut.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> narrowing(tiny_model("llama"), "width:0.5", Context())[0].hidden
        0.5
    """
    share = 1 - parse_width(spec)
    refusal: UnsupportedModelError | None = None
    for axes in _AXES:
        fields: dict[str, Any] = dict.fromkeys(axes, share)
        step = compressors.create({"name": "structured_pruning", "importance": "taylor", **fields})
        try:
            actions = step.plan(model, context)
        except UnsupportedModelError as error:
            refusal = refusal or error
            continue
        if refusal is not None:
            # What else to ask for is advice for the pruning step.
            told = str(refusal).partition(";")[0]
            actions.append(Action(path="", reason=f"only {' and '.join(axes)} become narrower: {told}"))
        return step, actions
    assert refusal is not None
    raise refusal
