"""How much each channel matters: scores that a structural pruner ranks by, higher is dearer.

An importance is a plain function from a model and its groups to one score a channel, entered by
`@register_importance(name)`. What it may ask beside the weights is its `Evidence`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..anatomy.groups import Group, tensor_of
from ..compressor import Action, Context, Need
from ..errors import CompressionError, ConfigError
from ..registry import importances

if TYPE_CHECKING:
    from transformers import PreTrainedModel

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Evidence:
    """What an importance may look at beside the weights.

    Attributes:
        batches: calibration batches without padding; empty where the importance did not ask for data. Those of a
            classifier hold `labels`, where every text has one.
        seed: seeds what is random.
        who: the strategy, for messages and progress bars.
        progress: whether progress bars are wanted.
    """

    batches: Sequence[Mapping[str, torch.Tensor]] = ()
    seed: int = 0
    who: str = "StructuredPruning"
    progress: bool = False

    @property
    def inputs(self) -> list[dict[str, torch.Tensor]]:
        """The batches without labels: what the model takes to compute no loss of its own."""
        return [{key: tensor for key, tensor in batch.items() if key != "labels"} for batch in self.batches]

    @property
    def texts(self) -> list[dict[str, torch.Tensor]]:
        """The batches with one text each."""
        return [
            {key: tensor[row : row + 1] for key, tensor in batch.items()}
            for batch in self.batches
            for row in range(len(batch["input_ids"]))
        ]


def register_importance(name: str, *, data: bool = False) -> Callable[[F], F]:
    """Enter a function in the registry of importances: from then on `StructuredPruning(importance=name)` ranks by it.

    The function gets the model, the groups and an `Evidence`, and returns a tensor for each group: shape (count,), or
    where `group.experts` is set (experts, count). It must leave the model as it is. Scores of zero for a whole group,
    or for all channels of an expert, mean that nothing is known of it: magnitude decides there.

    Args:
        name: snake_case.
        data: whether it asks for calibration batches.

    Raises:
        ConfigError: `name` is not snake_case.
        DuplicateNameError: `name` belongs to another function.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> @lc.register_importance("the_first_ones")
        ... def the_first_ones(model, groups, evidence):
        ...     return [torch.arange(group.count, 0, -1.0) for group in groups]
        >>> step = lc.StructuredPruning(ffn=0.5, importance="the_first_ones")
        >>> lc.compress(tiny_model("bert"), step, progress=False).model.config.intermediate_size
        64
    """

    def enter(function: F) -> F:
        vars(function)["needs"] = frozenset({"data", "tokenizer"}) if data else frozenset()
        return importances.register(name)(function)

    return enter


def needs_of(name: str) -> frozenset[Need]:
    """Return what an importance asks for.

    Raises:
        UnknownNameError: there is none of this name; suggests the nearest.

    Example:
        >>> sorted(needs_of("taylor")), sorted(needs_of("magnitude"))
        (['data', 'tokenizer'], [])
    """
    needs: frozenset[Need] = getattr(importances.get(name), "needs", frozenset())
    return needs


def score_groups(
    model: PreTrainedModel, groups: Sequence[Group], importance: str, evidence: Evidence, context: Context
) -> list[torch.Tensor]:
    """Return the scores of each group by the importance of this name.

    Args:
        model: the model; not changed.
        groups: groups of any kinds.
        importance: a registered name.
        evidence: what it may look at.
        context: told of parts of which the data say nothing.

    Returns:
        Float32 tensors on the CPU, shape (count,), or (experts, count).

    Raises:
        UnknownNameError: no such importance.
        CompressionError: a score is NaN or infinite; the message names the layer.
        ConfigError: the function returned something else than scores.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.anatomy.coupling import feed_forward_groups
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("mixtral")
        >>> groups = feed_forward_groups(anatomy(model))
        >>> [scores.shape for scores in score_groups(model, groups, "magnitude", Evidence(), Context())]
        [torch.Size([4, 128]), torch.Size([4, 128])]
    """
    found = list(importances.get(importance)(model, groups, evidence))
    expected = [(group.experts, group.count) if group.experts else (group.count,) for group in groups]
    shapes = [tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__ for scores in found]
    if shapes != expected:
        raise ConfigError(f"importance {importance!r} must return tensors of the shapes {expected}, got {shapes}.")
    # A copy: what ranks them writes into them.
    found = [scores.detach().to("cpu", torch.float32, copy=True) for scores in found]
    for group, scores in zip(groups, found, strict=True):
        if not bool(torch.isfinite(scores).all()):
            raise CompressionError(
                f"{evidence.who}: the {importance} of {group.path or 'the residual stream'} is NaN or infinite: its "
                f"weights hold NaN or infinity{' or its gradients or activations do' if evidence.batches else ''}; "
                f"repair the checkpoint first{', or load it in float32' if model.dtype == torch.float16 else ''}."
            )
    if evidence.batches:
        _fill_unknown(model, groups, found, importance, context)
    return found


@torch.no_grad()
def per_channel(
    model: PreTrainedModel, group: Group, worth: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> torch.Tensor:
    """Add the worth of single weights up over the channels that they belong to.

    A tensor that is tied to another one counts once.

    Args:
        model: the model.
        group: the channels.
        worth: for a tensor's name and value (in float32) what each of its weights is worth, of the same shape; None
            leaves the tensor out.

    Returns:
        Shape (count,), or (experts, count).
    """
    total = torch.zeros(*((group.experts,) if group.experts else ()), group.count, dtype=torch.float32)
    seen = set()
    for member in group.members:
        tensor = tensor_of(model, member.tensor).detach()
        place = (tensor.data_ptr(), member.axis)
        if place in seen or not tensor.is_floating_point():
            continue
        seen.add(place)
        values = worth(member.tensor, tensor.float())
        if values is None:
            continue
        others = [axis for axis in range(values.dim()) if axis != member.axis and not (member.per_expert and axis == 0)]
        summed = (values.sum(others) if others else values).cpu()
        owned = (member.channel >= 0).nonzero().flatten()
        total.index_add_(-1, member.channel[owned], summed[..., owned])
    return total


def _fill_unknown(
    model: PreTrainedModel, groups: Sequence[Group], found: list[torch.Tensor], importance: str, context: Context
) -> None:
    """Rank by magnitude what the data say nothing of, on the scale of the group's other scores."""
    for index, (group, scores) in enumerate(zip(groups, found, strict=True)):
        rows = scores if group.experts else scores[None]
        unknown = rows.abs().sum(-1) == 0
        if not unknown.any():
            continue
        [sizes] = importances.get("magnitude")(model, [group], Evidence())
        sizes = sizes.view_as(rows)
        if not unknown.all():
            sizes = sizes * (rows[~unknown].mean() / sizes[unknown].mean().clamp(min=1e-12))
        found[index] = torch.where(unknown[:, None], sizes, rows).view_as(scores)
        which = f"experts {', '.join(map(str, unknown.nonzero().flatten().tolist()))}: " if group.experts else ""
        remark = f"{which}no {importance} on the calibration texts (no token came by); ranked by magnitude"
        action = Action(path=group.path, reason=remark)
        if action not in context.told:
            context.tell(action)
