"""Which losses, and with which settings: what `KnowledgeDistillation.soft` and `.features` hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from ..compressor import Settings
from ..errors import ConfigError, did_you_mean
from .losses.table import FEATURE_LOSSES, SOFT_LOSSES, Reads
from .schedule import Scheduled, most, read_scheduled


class SoftLoss(Settings):
    """A loss on the logits of student and teacher; in recipes its name, or a dict with the name.

    Args:
        name: `"forward_kl"` (KL(teacher || student), arXiv 1503.02531), `"reverse_kl"` (the other way round; arXiv
            2306.08543), `"jsd"` (between the two; arXiv 2306.13649), `"skew_kl"` and `"skew_reverse_kl"` (against a
            mixture of both; arXiv 2402.03898), `"tvd"` (total variation; arXiv 2307.15190), `"mse"` (squared distance
            of logits; arXiv 2105.08919), `"uld"` (of sorted probabilities, for a teacher with another tokenizer; arXiv
            2402.12030).
        beta: for `"jsd"`, in [0, 1]: 0 is the forward KL, 1 the reverse KL; 0.5 if not given.
        skew: for `"skew_kl"` and `"skew_reverse_kl"`, in [0, 1): share of the other side in the mixture; 0.1 if not
            given.

    Example:
        >>> SoftLoss(name="jsd", beta=0.1)(torch.zeros(1, 4), torch.zeros(1, 4), temperature=2.0)
        tensor(0.)
    """

    name: str = Field("forward_kl", description="which loss")
    beta: float | None = Field(None, ge=0, le=1, description="of 'jsd': from forward (0) to reverse KL (1)")
    skew: float | None = Field(None, ge=0, lt=1, description="of the skew losses: share of the other side")

    @model_validator(mode="after")
    def _known(self) -> SoftLoss:
        if self.name not in SOFT_LOSSES:
            hint = did_you_mean(self.name, SOFT_LOSSES)
            raise ConfigError(f"SoftLoss.name must be one of {', '.join(SOFT_LOSSES)}, got {self.name!r}{hint}.")
        taken = inspect.signature(SOFT_LOSSES[self.name]).parameters
        for setting in self.settings:
            if setting not in taken:
                raise ConfigError(f"SoftLoss.{setting} must be left out for {self.name!r}, which does not use it.")
        return self

    @property
    def settings(self) -> dict[str, float]:
        """The settings that were given."""
        return {key: value for key, value in (("beta", self.beta), ("skew", self.skew)) if value is not None}

    def __call__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        *,
        temperature: float,
        mask: torch.Tensor | None = None,
        count: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Return the loss; arguments as of `losses.divergences.forward_kl`."""
        loss = SOFT_LOSSES[self.name]
        return loss(student, teacher, temperature=temperature, mask=mask, count=count, **self.settings)


def read_soft(given: Any) -> Any:
    """Return what stands in a recipe for a soft loss, a name or a dict, as the fields of one."""
    return {"name": given} if isinstance(given, str) else given


def write_soft(loss: SoftLoss) -> str | dict[str, Any]:
    """Return a soft loss as a recipe holds it: its name where it has no settings.

    Example:
        >>> write_soft(SoftLoss(name="tvd")), write_soft(SoftLoss(name="jsd", beta=0.1))
        ('tvd', {'name': 'jsd', 'beta': 0.1})
    """
    return {"name": loss.name, **loss.settings} if loss.settings else loss.name


def read_features(given: Any) -> Any:
    """Return the feature losses of a recipe, each with its weight.

    Raises:
        ConfigError: there is no such loss, or a weight is negative.

    Example:
        >>> read_features({"hidden": 1, "relations": [1, 0]})
        {'hidden': 1.0, 'relations': (1.0, 0.0)}
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"KnowledgeDistillation.features must be weights by name such as {{'hidden': 1.0}}, got {given!r}; the "
            f"names are {', '.join(FEATURE_LOSSES)}."
        )
    for name in given:
        if name not in FEATURE_LOSSES:
            hint = did_you_mean(str(name), FEATURE_LOSSES) or "."
            raise ConfigError(
                f"KnowledgeDistillation.features must name {', '.join(FEATURE_LOSSES)}, got {name!r}{hint}"
            )
    return {name: read_scheduled(f"KnowledgeDistillation.features[{name!r}]", given[name]) for name in given}


def reads_of(features: Mapping[str, Scheduled]) -> frozenset[Reads]:
    """Return what of the inside of the models is compared, by the losses whose weight is above 0.

    Example:
        >>> sorted(reads_of({"hidden": 1.0, "hidden_cosine": 0.5, "relations": 0.0}))
        ['states']
    """
    return frozenset(FEATURE_LOSSES[name].reads for name, weight in features.items() if most(weight) > 0)


_WHO = "KnowledgeDistillation"
Soft = Annotated[
    SoftLoss, BeforeValidator(read_soft, json_schema_input_type=SoftLoss | str), PlainSerializer(write_soft)
]
Temperature = Annotated[Scheduled, BeforeValidator(partial(read_scheduled, f"{_WHO}.temperature", above=True))]
Alpha = Annotated[Scheduled, BeforeValidator(partial(read_scheduled, f"{_WHO}.alpha", high=1.0))]
Features = Annotated[dict[str, Scheduled], BeforeValidator(read_features)]
"""The fields of `KnowledgeDistillation` that say what its loss is."""
