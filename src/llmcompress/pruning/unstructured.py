"""What the unstructured pruners share: how many zeros each layer is to get, and which weights of a score go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator, model_validator

from ..anatomy.empty import note_zeros, noted_zeros
from ..anatomy.layers import WeightLayer, by_weight, select, weight_layers
from ..compressor import Action, Compressor, Context, Outline
from ..errors import ConfigError, NothingToCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Scores are made for so many weights at a time: temporary memory does not grow with the layer.
_CHUNK = 1 << 20

# Bytes that each weight of a chunk takes while it is scored and chosen, and how often each is read or written.
_CHUNK_BYTES, _SWEEPS = 20, 5

_REMARK = Action(path="", reason="zeros in dense tensors: 0 % smaller on disk, 0 % faster here by this step alone")


@dataclass(frozen=True)
class Quota:
    """The zeros that one layer is to get.

    Attributes:
        layer: the layer.
        sparsity: share of its weights that become zero, in (0, 1).
        pattern: (N, M) where N of every M consecutive inputs stay, or None.
        own: whether an override says so: nothing shifts it then.
    """

    layer: WeightLayer
    sparsity: float
    pattern: tuple[int, int] | None = None
    own: bool = False

    def __str__(self) -> str:
        return "{}:{} zeros".format(*self.pattern) if self.pattern else f"{self.sparsity:.4g} of its weights zero"


class UnstructuredPruning(Compressor):
    """Base of the strategies that write zeros into dense weights: their common fields, checks and plan."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the chosen weights that become zero")
    pattern: str | None = Field(None, description="'N:M' keeps N of every M consecutive inputs; None: unstructured")
    overrides: dict[str, float | str] = Field({}, description="sparsity or 'N:M' by pattern of layer names; 0 leaves")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layer names to prune; None: all in blocks")
    skip: tuple[str, ...] = Field((), description="patterns of layer names to leave alone")

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, fields: Any) -> Any:
        """Let the sparsity follow from the pattern where it is not given."""
        if isinstance(fields, dict) and isinstance(fields.get("pattern"), str) and "sparsity" not in fields:
            n, m = _parsed(fields["pattern"], f"{cls.__name__}.pattern")
            return {**fields, "sparsity": 1 - n / m}
        return fields

    @field_validator("overrides", mode="after")
    @classmethod
    def _amounts(cls, overrides: dict[str, float | str]) -> dict[str, float | str]:
        for name, amount in overrides.items():
            where = f"{cls.__name__}.overrides[{name!r}]"
            if isinstance(amount, str):
                _parsed(amount, where)
            elif not 0 <= amount < 1:
                raise ConfigError(f"{where} must be in [0, 1) or 'N:M', got {amount}; 0 leaves the layers alone.")
        return overrides

    @model_validator(mode="after")
    def _agree(self) -> UnstructuredPruning:
        if self.pattern is not None:
            n, m = _parsed(self.pattern, f"{type(self).__name__}.pattern")
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise ConfigError(
                    f"{type(self).__name__}.sparsity must be {1 - n / m:.6g} (or left out) with "
                    f"pattern={self.pattern!r}, got {self.sparsity}."
                )
        return self

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name the layers that get zeros and how many, those that do not, and what the zeros do not give."""
        quotas, left = self._quotas(model)
        return [Action(path=quota.layer.name, does=self._does(quota)) for quota in quotas] + left + [_REMARK]

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Note the zeros; no size changes."""
        quotas, _ = self._quotas(model)
        overlap = None
        for quota in quotas:
            weight = quota.layer.weight
            before = noted_zeros(weight)
            if before and not self._adds_to_zeros(quota):
                overlap = "how many of the new zeros are among those of an earlier step depends on the weights"
            note_zeros(weight, max(self._zeros(quota), before))
        weights = [quota.layer.weight.numel() for quota in quotas]
        scratch = _CHUNK_BYTES * min(max(weights), _CHUNK)
        return Outline(model, scratch=scratch, swept=_SWEEPS * sum(weights), overlap=overlap)

    def _zeros(self, quota: Quota) -> int:
        """Return how many of a layer's weights become zero: its share of each matrix, where it has several."""
        weight = quota.layer.weight
        parts = weight.shape[0] if weight.dim() == 3 else 1
        return parts * round(quota.sparsity * (weight.numel() // parts))

    def _adds_to_zeros(self, quota: Quota) -> bool:
        """Whether zeros that a layer has already are always the first to be counted among those that it is to get."""
        return False

    def _does(self, quota: Quota) -> str:
        return str(quota)

    def _quotas(self, model: PreTrainedModel) -> tuple[list[Quota], list[Action]]:
        """Return what each chosen layer is to get, and the layers that are left, with the reasons.

        Raises:
            NothingToCompressError: nothing is chosen, or a pattern of the fields matches no layer.
            ConfigError: N:M does not divide the inputs of a layer.
        """
        who = type(self).__name__
        layers, left = select(model, who=who, targets=self.targets, skip=self.skip)
        for name in self.overrides:
            if not any(fnmatchcase(layer.name, name) for layer in layers):
                raise NothingToCompressError(
                    f"no layer that {who} works on in {type(model).__name__} matches {who}.overrides[{name!r}]; it "
                    f"works on {', '.join(layer.name for layer in layers[:8])}{', ...' if len(layers) > 8 else ''}."
                )
        layers, shared = _one_of_each(model, layers)
        left += shared
        quotas = []
        for layer in layers:
            match = next((name for name in self.overrides if fnmatchcase(layer.name, name)), None)
            amount = self.overrides[match] if match is not None else self.pattern or self.sparsity
            where = f"{who}.overrides[{match!r}]" if match is not None else f"{who}.pattern"
            if isinstance(amount, str):
                n, m = _parsed(amount, where)
                _check_divides(layer, (n, m), where)
                quotas.append(Quota(layer, 1 - n / m, (n, m), own=match is not None))
            elif amount > 0:
                quota = Quota(layer, amount, own=match is not None)
                if self._zeros(quota):
                    quotas.append(quota)
                else:
                    few = f"{amount:.2g} of its {layer.weight.numel():,} weights is less than one"
                    left.append(Action(path=layer.name, reason=few))
            else:
                left.append(Action(path=layer.name, reason=f"overrides[{match!r}] = 0"))
        if not quotas:
            why = "; ".join(f"{action.path}: {action.reason}" for action in left[-4:])
            raise NothingToCompressError(f"{who} prunes no layer of {type(model).__name__}. {why}")
        return quotas, left


def _one_of_each(model: PreTrainedModel, layers: Sequence[WeightLayer]) -> tuple[list[WeightLayer], list[Action]]:
    """Take a weight that several layers share once, and not at all where one of these is to stay as it is."""
    holders = by_weight(weight_layers(model))
    chosen = {layer.name for layer in layers}
    kept: list[WeightLayer] = []
    shared = []
    for layer in layers:
        together = [holder.name for holder in holders[id(layer.weight)]]
        outside = next((name for name in together if name not in chosen), None)
        if outside is not None:
            why = f"shares its weight with {outside}, which this step does not change"
            shared.append(Action(path=layer.name, reason=why))
        elif together[0] != layer.name:
            shared.append(Action(path=layer.name, does=f"the zeros of {together[0]}, whose weight it shares"))
        else:
            kept.append(layer)
    return kept, shared


def matrices(layer: WeightLayer) -> list[torch.Tensor]:
    """Return the layer's matrices as views of shape (outputs, inputs): one, or one for each of its experts.

    Example:
        >>> from llmcompress.anatomy.layers import weight_layers
        >>> from llmcompress.testing import tiny_model
        >>> layers = {layer.name: layer for layer in weight_layers(tiny_model("gpt2"))}
        >>> [tuple(matrix.shape) for matrix in matrices(layers["transformer.h.0.mlp.c_fc"])]  # Conv1D: (in, out)
        [(256, 64)]
    """
    weight = layer.weight.detach()
    upright = weight if layer.input_axis == weight.dim() - 1 else weight.transpose(-1, -2)
    return list(upright) if upright.dim() == 3 else [upright]


def chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield `weight` as views of whole rows, about a million weights each.

    Example:
        >>> [tuple(part.shape) for part in chunks(torch.zeros(2, 3000, 1000))]
        [(1048, 1000), (1048, 1000), (904, 1000), (1048, 1000), (1048, 1000), (904, 1000)]
    """
    if weight.dim() > 2:
        for part in weight:
            yield from chunks(part)
    else:
        yield from weight.split(max(_CHUNK // max(weight[:1].numel(), 1), 1))


def lowest(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mark of each row of `scores` (rows, inputs) the `counts` (rows,) lowest.

    Of equal scores, which ones go is not specified; how many is exact.

    Example:
        >>> lowest(torch.tensor([[1.0, 4.0, 3.0], [1.0, 4.0, 3.0]]), torch.tensor([1, 2])).tolist()
        [[True, False, False], [True, False, True]]
    """
    most = int(counts.max())
    order = scores.topk(most, dim=-1, largest=False, sorted=bool((counts != most).any())).indices
    taken = torch.arange(most, device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, taken)


def lowest_of_groups(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """Mark all but the highest N of every M consecutive inputs in each row of `scores` (rows, inputs).

    Example:
        >>> lowest_of_groups(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), (1, 2)).tolist()
        [[True, False, False, True]]
    """
    n, m = pattern
    groups = scores.unflatten(-1, (-1, m))
    drop = groups.topk(m - n, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, drop, True).view(scores.shape)


def row_counts(rows: int, count: int) -> torch.Tensor:
    """Spread `count` over the rows as evenly as whole numbers allow.

    Example:
        >>> row_counts(4, 10).tolist()
        [2, 3, 2, 3]
    """
    return (torch.arange(rows + 1) * count // rows).diff()


@torch.no_grad()
def zero_lowest(matrix: torch.Tensor, quota: Quota, norms: torch.Tensor | None = None) -> None:
    """Write zeros where |w|, times the norm of its input if there are any, is lowest in its row. In place.

    Args:
        matrix: of shape (outputs, inputs).
        quota: how many zeros. Where a row's share is no whole number some rows get one more, so that the matrix has the
            share to the exact count.
        norms: of shape (inputs,), float32.

    Example:
        >>> from types import SimpleNamespace
        >>> matrix = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
        >>> zero_lowest(matrix, Quota(SimpleNamespace(), 0.5, (2, 4)), norms=torch.tensor([9.0, 1.0, 1.0, 1.0]))
        >>> matrix.tolist()
        [[1.0, -4.0, 0.0, 0.0]]
    """
    counts = row_counts(len(matrix), round(quota.sparsity * matrix.numel())).to(matrix.device)
    done = 0
    for rows in chunks(matrix):
        scores = rows.abs().float()
        if norms is not None:
            scores *= norms
        own = counts[done : done + len(rows)]
        rows.masked_fill_(lowest_of_groups(scores, quota.pattern) if quota.pattern else lowest(scores, own), 0)
        done += len(rows)


def _parsed(pattern: str, where: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise ConfigError(
            f"{where} must be 'N:M' with 0 < N < M, which keeps N of every M consecutive inputs (for instance '2:4'), "
            f"got {pattern!r}."
        )
    return n, m


def _check_divides(layer: WeightLayer, pattern: tuple[int, int], where: str) -> None:
    inputs = layer.weight.shape[layer.input_axis]
    if inputs % pattern[1]:
        raise ConfigError(
            f"{where}='{pattern[0]}:{pattern[1]}' must divide the inputs of every layer, and {layer.name} has "
            f"{inputs}; leave it out with skip=({layer.name!r},)."
        )
