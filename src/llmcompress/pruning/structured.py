"""Structured pruning: whole channels, heads and experts go, real shapes change, and the folder loads again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from ..anatomy.groups import Group, Kind, new_shapes
from ..anatomy.sizes import shapes_of
from ..calibration import calibration_batches
from ..calibration.effort import activation_bytes
from ..compressor import Action, Compressor, Context, Need, Outline
from ..errors import ConfigError
from ..registry import register
from .cutting import cut_outlined, cut_proven, refuse_if_bound
from .importance import Evidence, needs_of, score_groups
from .rounding import Rounding, fastest_rounding
from .selection import choose
from .widths import Widths, find_widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Experts go last: until then each is there to lose channels of its own.
_KINDS: tuple[Kind, ...] = ("heads", "query_heads", "ffn", "experts", "hidden")


@register("structured_pruning")
class StructuredPruning(Compressor):
    """Remove the feed-forward channels, attention heads, experts or hidden features of least importance.

    What goes together is found as in DepGraph (Fang et al., arXiv 2301.12900), whatever the architecture. With
    `uniform=True` all blocks keep the same sizes, written to the plain config, so that the saved folder loads in plain
    transformers. Before it returns, the step proves itself: the sliced model must give the outputs of the model with
    the same channels masked, and have exactly the shapes that were predicted. Which channels stayed is left in
    `context.history`, where distillation finds it.

    Args:
        ffn: share of the feed-forward channels to remove, in (0, 1); experts each choose their own. 0.5 if nothing else
            is asked for.
        heads: share of the attention heads to remove; under grouped-query attention each key and value head goes with
            its query heads.
        query_heads: share of the query heads to remove from each group that shares a key and value head.
        experts: share of the experts of each mixture to remove; never below those that a token is sent to.
        hidden: share of the features of the residual stream to remove, through all blocks. RMSNorms are rescaled so
            that nothing but the features is lost; LayerNorms take their mean over fewer features, and the report tells
            how much that alone changes.
        importance: how channels are ranked, by what counts as dear; the names of `lc.importances`.
            `"magnitude"`, `"magnitude_l1"`: large weights (arXiv 2301.12900, 1608.08710).
            `"taylor"`: what moves the loss of a text, to first order (arXiv 1906.10771, 2305.11627).
            `"fisher"`: what moves it by the diagonal of the Fisher information (arXiv 1801.05787).
            `"activation"`: large activations (Minitron, arXiv 2407.14679).
            `"wanda"`: large weights on large activations (arXiv 2306.11695).
            `"random"`: nothing.
            All but magnitudes and random ask for texts and a tokenizer. Taylor and fisher take the loss of the model's
            own head: the next token, or a classifier's labels if all texts have them, or else its own answers.
        scope: "layer" ranks the channels of each layer; "global" those of all layers together (with `uniform=False`).
        floor: share of its channels that each layer keeps at least under the global scope.
        uniform: only sizes that a plain config can tell, the nearest legal ones; False allows any, which load with
            llmcompress.
        round_to: widths are the nearest multiple of this, at least one, in [1, 1024]; kernels like multiples of 8 and
            more. Experts need a multiple of 8 as well. "auto" times the matrix products of the model's own feed-forward
            network for about a second, where the model is, at widths next to the one asked for, and takes the multiple
            with the least time for each weight kept; the plan tells the numbers.
        rounds: prune in so many rounds, scored anew on what is left.
        samples: how many texts to score on at most.
        max_length: how many tokens of a text to take at most.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> pruned = lc.compress(tiny_model("llama"), lc.StructuredPruning(ffn=0.5, heads=0.5), progress=False).model
        >>> pruned.config.intermediate_size, pruned.config.num_attention_heads, pruned.config.num_key_value_heads
        (64, 2, 1)
    """

    ffn: float | None = Field(None, gt=0, lt=1, description="share of the feed-forward channels to remove")
    heads: float | None = Field(None, gt=0, lt=1, description="share of the attention heads to remove")
    query_heads: float | None = Field(None, gt=0, lt=1, description="share of each key head's query heads to remove")
    experts: float | None = Field(None, gt=0, lt=1, description="share of the experts to remove")
    hidden: float | None = Field(None, gt=0, lt=1, description="share of the residual stream's features to remove")
    importance: str = Field("magnitude", description="how channels are ranked")
    scope: Literal["layer", "global"] = Field("layer", description="rank within each layer, or across all")
    floor: float = Field(0.2, gt=0, lt=1, description="share that each layer keeps at least under the global scope")
    uniform: bool = Field(True, description="only sizes that a plain config can tell")
    round_to: int | Literal["auto"] = Field(8, description="widths are a multiple of this; 'auto' measures which")
    rounds: int = Field(1, ge=1, le=100, description="rounds of scoring and pruning")
    samples: int = Field(128, ge=1, description="texts to score on at most")
    max_length: int = Field(512, ge=1, description="tokens of a text at most")

    @model_validator(mode="before")
    @classmethod
    def _something(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and all(fields.get(kind) is None for kind in _KINDS):
            return {**fields, "ffn": 0.5}
        return fields

    @field_validator("round_to", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if number != "auto" and (type(number) is not int or not 1 <= number <= 1024):
            raise ConfigError(
                f"StructuredPruning.round_to must be 'auto' or a whole number in [1, 1024], got {value!r}."
            )
        return number

    @model_validator(mode="after")
    def _agree(self) -> StructuredPruning:
        needs_of(self.importance)
        if self.scope == "global" and self.uniform:
            raise ConfigError(
                "StructuredPruning.scope must be 'layer' with uniform=True, got 'global': layers that compete end with "
                "different sizes, which no plain config tells; pass uniform=False."
            )
        if self.scope == "layer" and self.floor != type(self).model_fields["floor"].default:
            raise ConfigError(
                f"StructuredPruning.floor must be left out with scope='layer', where each layer keeps its share, got "
                f"{self.floor}; pass scope='global', uniform=False."
            )
        if self.heads is not None and self.query_heads is not None:
            raise ConfigError("StructuredPruning must have heads or query_heads, not both; run two steps.")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """Data and a tokenizer, where the importance asks data."""
        return needs_of(self.importance)

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each part with its old and new size, and the parameters that will be left."""
        widths, multiple = self._widths(model), self._rounding(model).multiple
        if not self.uniform:
            # A config that tells the sizes builds a model for them; here code may still rely on the old ones.
            refuse_if_bound(model, [(group, _some(group, kept)) for group, kept in widths.changed])
        actions = [Action(path="", reason=self._rounding(model).remark)] if self.round_to == "auto" else []
        for group, kept in zip(widths.groups, widths.kept, strict=True):
            if kept == group.count:
                reason = f"{_NAMES[group.kind]} stay {group.count}: the nearest size to what is asked for"
                actions.append(Action(path=group.path, reason=reason))
            else:
                about = "about " if self.scope == "global" else ""
                does = f"{about}{group.count} -> {kept} {_NAMES[group.kind]}"
                actions.append(Action(path=group.path, does=does, reason=_told(group, kept, widths, multiple)))
        actions += [Action(path=path, reason=reason) for path, reason in widths.left.items()]
        actions += [Action(path=path, reason="reads no tokens") for path in widths.body.towers]
        if self.ffn is not None:
            for block in widths.body.blocks():
                actions += [Action(path=other, reason="no part of a known network") for other in block.others]
        return actions

    def predicted_shapes(self, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
        """Return the shape that each tensor of the state dict will have (`scope="layer"`). Reads no weight.

        Example:
            >>> from llmcompress.testing import tiny_model
            >>> shapes = StructuredPruning(heads=0.5).predicted_shapes(tiny_model("llama"))
            >>> shapes["model.layers.0.self_attn.k_proj.weight"]
            (16, 64)
        """
        widths = self._widths(model)
        return {**shapes_of(model), **new_shapes(model, widths.changed)}

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Score, mask, cut, write the config, and prove the cut."""
        widths = self._widths(model)
        evidence = self._evidence(model, context)
        cuts = choose(
            model,
            widths,
            lambda: score_groups(model, widths.groups, self.importance, evidence, context),
            rounds=self.rounds,
            floor=self.floor if self.scope == "global" else None,
            multiple=self._rounding(model).multiple,
        )
        cut_proven(model, cuts, context, values=widths.values if self.uniform else None, who="StructuredPruning")
        return model

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Cut the sizes; which channels stay is open, and their numbers stand for it."""
        widths = self._widths(model)
        scratch, flops = self._effort(model, context) if self.needs else (0, 0.0)
        cuts = [(group, _some(group, kept)) for group, kept in widths.changed]
        cut_outlined(model, cuts, context, values=widths.values if self.uniform else None)
        competing = self.scope == "global" and "under the global scope widths depend on the weights"
        return Outline(model, competing or None, scratch=scratch, flops=flops, swept=_SWEEPS * model.num_parameters())

    def _effort(self, model: PreTrainedModel, context: Context) -> tuple[int, float]:
        """Return the bytes of gradients and activations of a batch, and the arithmetic of the passes, back as well."""
        batches = calibration_batches(
            model, context, who="StructuredPruning", samples=self.samples, max_length=self.max_length
        )
        sizes = [batch["input_ids"].numel() for batch in batches]
        backward = self.importance in ("taylor", "fisher")
        gradients = 4 * model.num_parameters() if backward else 0
        passes = 3 if backward else 1
        flops = 2.0 * self.rounds * passes * sum(sizes) * model.num_parameters()
        return gradients + activation_bytes(model, max(sizes), backward=backward), flops

    @property
    def _shares(self) -> dict[Kind, float]:
        return {kind: share for kind in _KINDS if (share := getattr(self, kind)) is not None}

    def _rounding(self, model: PreTrainedModel) -> Rounding:
        return fastest_rounding(model, self._shares) if self.round_to == "auto" else Rounding(self.round_to, "")

    def _widths(self, model: PreTrainedModel) -> Widths:
        multiple = self._rounding(model).multiple
        return find_widths(model, self._shares, multiple=multiple, uniform=self.uniform, who="StructuredPruning")

    def _evidence(self, model: PreTrainedModel, context: Context) -> Evidence:
        who = "StructuredPruning"
        if not self.needs:
            return Evidence(seed=context.seed, who=who)
        batches = calibration_batches(
            model, context, who=who, samples=self.samples, max_length=self.max_length, labels=True
        )
        return Evidence(batches, context.seed, who, context.progress)


def _some(group: Group, kept: int) -> torch.Tensor:
    """Return `kept` channels of a group, any; in equal numbers from each run that must keep as many."""
    runs = torch.arange(group.count).view(group.balance, -1)[:, : kept // group.balance].flatten()
    return runs.expand(group.experts, -1) if group.experts else runs


# How often each weight is read or written: scored, silenced, cut.
_SWEEPS = 4
_NAMES: dict[Kind, str] = {
    "ffn": "FFN channels",
    "heads": "heads",
    "query_heads": "query heads",
    "hidden": "hidden features",
    "experts": "experts",
}


def _told(group: Group, kept: int, widths: Widths, multiple: int) -> str | None:
    """Return a remark where the size is not the one that was asked for."""
    asked = group.count * (1 - widths.asked[group.kind])
    if abs(asked - kept) < 0.5 or (group.kind in ("ffn", "hidden") and abs(asked - kept) <= multiple / 2):
        return None
    return f"{asked:g} was asked for; {kept} is the nearest size that is legal"
