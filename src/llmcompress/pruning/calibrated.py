"""Pruning that looks at the inputs of the layers: block after block on what pruned ones put out, or all at once."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from ..anatomy.layers import WeightLayer, refuse_nonfinite
from ..anatomy.turns import in_turns
from ..calibration import InputProducts, Statistic, block_by_block, calibration_batches, observe
from ..calibration.effort import calibration_effort
from ..compressor import Action, Context, Need, Outline
from ..errors import ConfigError
from .allocation import owl_quotas
from .unstructured import Quota, UnstructuredPruning, matrices, zero_lowest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# For each pair of a layer's inputs: the factor of their products, an identity and the inverse in float64, and a copy.
_INVERSE_BYTES = 28

ALL_ZERO = "pruned by magnitude: its inputs were zero on every calibration token"


class CalibratedPruning(UnstructuredPruning):
    """Base of the strategies that prune a layer by statistics of its inputs on calibration texts."""

    samples: int = Field(128, ge=1, description="texts of the data to calibrate on at most")
    max_length: int = Field(512, ge=1, description="tokens of a text to take at most")
    inputs: Literal["pruned", "dense"] = Field("pruned", description="calibrate on what pruned blocks put out, or not")
    allocation: Literal["uniform", "owl"] = Field("uniform", description="prune all layers alike, or by outliers")
    owl_m: float = Field(5.0, gt=1, description="an outlier scores above this many times the mean of its block")
    owl_lambda: float = Field(0.08, gt=0, lt=0.5, description="how far from the sparsity a block may be")

    @model_validator(mode="after")
    def _allocatable(self) -> CalibratedPruning:
        who = type(self).__name__
        if self.allocation == "owl" and self.pattern:
            raise ConfigError(f"{who}.allocation must be 'uniform' with a pattern: N:M fixes the share of each row.")
        for name in ("owl_m", "owl_lambda"):
            if self.allocation == "uniform" and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{who}.{name} must be left out with allocation='uniform', which does not look for outliers, got "
                    f"{getattr(self, name)}; pass allocation='owl'."
                )
        room = min(self.sparsity, 1 - self.sparsity)
        if self.allocation == "owl" and self.owl_lambda >= room:
            raise ConfigError(
                f"{who}.owl_lambda must be below {room:.4g} with sparsity={self.sparsity}, so that every block keeps "
                f"some weights and loses some, got {self.owl_lambda}."
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """Texts to calibrate on, and what makes tokens of them."""
        return frozenset({"data", "tokenizer"})

    @property
    def in_turns(self) -> bool:
        """Block after block."""
        return True

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Prune block after block, in place."""
        who = type(self).__name__
        quotas, _ = self._quotas(model)
        refuse_nonfinite(quota.layer for quota in quotas)
        batches = calibration_batches(model, context, who=who, samples=self.samples, max_length=self.max_length)
        if self.allocation == "owl":
            quotas = owl_quotas(model, batches, quotas, self.sparsity, self.owl_m, self.owl_lambda, who=who)
            for quota in quotas:
                context.tell(Action(path=quota.layer.name, does=str(quota), reason="allocated by its block's outliers"))
        by_name = {quota.layer.name: quota for quota in quotas}
        layers = [quota.layer for quota in quotas]
        if self.inputs == "dense":
            seen = observe(model, batches, layers, self._statistic, who=who, progress=context.progress)
            for _, own in in_turns(model, layers):
                for layer in own:
                    why = "no calibration token was seen to reach it"
                    self._prune_layer(by_name[layer.name], seen.pop(layer.name), why, context)
            return model
        for turn in block_by_block(model, batches, layers, self._statistic, who=who, progress=context.progress):
            for name, statistics in turn.statistics.items():
                hidden = name in turn.unseen
                why = "its inputs cannot be seen" if hidden else "no calibration token reached it"
                self._prune_layer(by_name[name], statistics, why, context)
        return model

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Note the zeros, and count what the calibration takes."""
        layers = [quota.layer for quota in self._quotas(model)[0]]
        products = isinstance(self._statistic(layers[0]), InputProducts)
        effort = calibration_effort(
            model, context, layers, who=type(self).__name__, samples=self.samples, max_length=self.max_length,
            products=products,
        )  # fmt: skip
        plain = super().outline(model, context)
        if not products:
            return replace(plain, scratch=plain.scratch + effort.scratch, flops=effort.flops)
        inverse = _INVERSE_BYTES * max(layer.weight.shape[layer.input_axis] for layer in layers) ** 2
        flops = effort.flops + sum(_solving(layer) for layer in layers)
        return replace(plain, scratch=plain.scratch + effort.scratch + inverse, flops=flops)

    @abstractmethod
    def _statistic(self, layer: WeightLayer) -> Statistic:
        """Return an empty statistic of the inputs of `layer`."""

    @abstractmethod
    def _prune(self, matrix: torch.Tensor, statistic: Statistic, quota: Quota) -> str | None:
        """Prune `matrix` (outputs, inputs) in place; return a remark for the report, or None."""

    def _prune_layer(self, quota: Quota, statistics: list[Statistic], unknown: str, context: Context) -> None:
        """Prune each matrix of a layer; `unknown` says why, where nothing was seen of its inputs."""
        remarks: dict[str, list[int]] = {}
        for part, (matrix, statistic) in enumerate(zip(matrices(quota.layer), statistics, strict=True)):
            if statistic.count:
                remark = self._prune(matrix, statistic, quota)
            else:
                zero_lowest(matrix, quota)
                remark = f"pruned by magnitude: {unknown}"
            if remark is not None:
                remarks.setdefault(remark, []).append(part)
        for remark, parts in remarks.items():
            where = f"experts {', '.join(map(str, parts))}: " if len(statistics) > 1 else ""
            context.tell(Action(path=quota.layer.name, does=str(quota), reason=f"{where}{remark}"))

    def _does(self, quota: Quota) -> str:
        if self.allocation == "owl" and not quota.own:
            return f"{self.sparsity:.4g} +- {self.owl_lambda:.4g} of its weights zero, by its block's outliers"
        return str(quota)


def _solving(layer: WeightLayer) -> float:
    """Return the arithmetic of one inverse and of the updates that follow from it."""
    inputs = layer.weight.shape[layer.input_axis]
    return 4.0 * inputs**3 + 2.0 * layer.weight.numel() * inputs
