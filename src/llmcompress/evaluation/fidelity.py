"""How closely a candidate answers as the base does, whether or not either is right: needs no labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch.nn import functional as F

from ..calibration.answers import divergence
from .tasks.forward import Batch, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So many numbers of each model's logits are turned into distributions at a time (16 MiB in float32).
_MOST_NUMBERS = 2**22
# One answer to more than this share of all questions is suspect where the base gives it to less than half of that.
_ONE_ANSWER = 0.5
# Entropy below this part of the base's: the model has become sure of everything.
_CERTAIN = 0.1
_FEWEST_ANSWERS = 20


class Fidelity(BaseModel, frozen=True, extra="forbid"):
    """How far a candidate's answers are from the base's, over every answer of a task: each text, or each next token."""

    answers: int = Field(description="texts or tokens that both models answered")
    kl_mean: float | None = Field(description="mean KL(base || candidate), in nats; None for a regression")
    kl_median: float | None = Field(description="its median")
    kl_p99: float | None = Field(description="99 of 100 answers are at most so far from the base's")
    top1_agreement: float | None = Field(description="share of equal most likely answers, in [0, 1]")
    cosine: float | None = Field(
        description="mean cosine of the texts' embeddings (last hidden states averaged over the text); None where "
        "widths differ or the model has none"
    )
    entropy_base: float | None = Field(description="mean entropy of the base's answers, in nats")
    entropy: float | None = Field(description="mean entropy of the candidate's answers, in nats")
    most_frequent: float | None = Field(description="share of the candidate's most frequent answer, in [0, 1]")
    collapse: str | None = Field(default=None, description="in words, if the candidate no longer answers at all")


class FidelityMeter:
    """Compares a candidate with the base batch by batch; keeps one number an answer, never the logits.

    Example:
        >>> import llmcompress.testing as lt
        >>> from llmcompress.evaluation.tasks import TextClassification
        >>> from llmcompress.evaluation.tasks.forward import advance
        >>> task, tokenizer = TextClassification([("good", 1), ("bad", 0)]), lt.tiny_tokenizer()
        >>> runs = {name: task.start(lt.tiny_model("bert"), tokenizer, batch_size=2) for name in ("base", "same")}
        >>> meter, latest = FidelityMeter(runs["base"], runs["same"]), {}
        >>> def observe(name, batch, outputs):
        ...     latest[name] = outputs
        ...     if name == "same":
        ...         meter.update(batch, latest["base"], outputs)
        >>> advance(runs, title="", progress=False, observer=observe)
        >>> found = meter.result()
        >>> found.answers, round(found.kl_mean, 9), found.top1_agreement
        (2, 0.0, 1.0)
    """

    def __init__(self, base: Run, candidate: Run) -> None:
        self._base, self._candidate = base, candidate
        self._kl: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        self._agree = self._answers = 0
        self._entropies = [0.0, 0.0]
        self._counts: list[torch.Tensor | None] = [None, None]
        self._cosines: list[float] = []

    def update(
        self,
        batch: Batch,
        base: Any,
        candidate: Any,
        embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Compare the outputs of both models for one batch, and the texts' embeddings if they are there."""
        ours, theirs = self._base.answers(batch, base), self._candidate.answers(batch, candidate)
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            rows = max(1, _MOST_NUMBERS // ours.shape[-1])
            for a, b in zip(ours.split(rows), theirs.split(rows), strict=True):
                self._distributions(a, b.to(a.device))
        elif ours is None and theirs is None:
            self._answers += len(batch.rows)
        if embeddings is not None and embeddings[0].shape == embeddings[1].shape:
            first, second = (one.float().cpu() for one in embeddings)
            self._cosines += F.cosine_similarity(first, second).tolist()

    def result(self) -> Fidelity:
        """Return what was found over all batches."""
        cosine = math.fsum(self._cosines) / len(self._cosines) if self._cosines else None
        if not self._kl:
            none = dict.fromkeys(
                ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "entropy_base", "entropy", "most_frequent")
            )
            return Fidelity(answers=self._answers, cosine=cosine, **none)
        kl = np.concatenate(self._kl).astype(float)
        entropies = [total / self._answers for total in self._entropies]
        base_share, share = (float(counts.max() / counts.sum()) for counts in self._counts if counts is not None)
        return Fidelity(
            answers=self._answers,
            kl_mean=float(kl.mean()),
            kl_median=float(np.median(kl)),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=self._agree / self._answers,
            cosine=cosine,
            entropy_base=entropies[0],
            entropy=entropies[1],
            most_frequent=share,
            collapse=self._collapse(base_share, share, *entropies),
        )

    def _distributions(self, base: torch.Tensor, candidate: torch.Tensor) -> None:
        ours, theirs = base.float().log_softmax(-1), candidate.float().log_softmax(-1)
        p, q = ours.exp(), theirs.exp()
        self._kl.append(divergence(ours, theirs).cpu().numpy())
        best = [one.argmax(-1) for one in (ours, theirs)]
        self._agree += int((best[0] == best[1]).sum())
        self._answers += len(p)
        for number, (log, share) in enumerate(((ours, p), (theirs, q))):
            self._entropies[number] -= float((share * log).nansum())
            found = torch.bincount(best[number], minlength=log.shape[-1])
            before = self._counts[number]
            if before is not None:
                # Where classes are positions in a text, a batch of longer texts has more of them.
                width = max(len(before), len(found))
                found = F.pad(before, (0, width - len(before))) + F.pad(found, (0, width - len(found)))
            self._counts[number] = found

    def _collapse(self, base_share: float, share: float, base_entropy: float, entropy: float) -> str | None:
        if self._answers < _FEWEST_ANSWERS:
            return None
        if share > _ONE_ANSWER and base_share < share / 2:
            return f"collapse: one answer is given to {share:.0%} of the questions, by the base to {base_share:.0%}"
        if entropy < _CERTAIN * base_entropy and self._agree < 0.5 * self._answers:
            return (
                f"collapse: the model is sure of answers that are not the base's (entropy {entropy:.2g} nats, the "
                f"base's {base_entropy:.2g}; {self._agree / self._answers:.0%} of the answers agree)"
            )
        return None


@contextmanager
def embeddings_of(models: Mapping[str, PreTrainedModel]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dict that, after each forward pass, holds each model's last hidden states, by name.

    A model whose body puts out none (or that is its own body) is left out.
    """
    found: dict[str, torch.Tensor] = {}
    hooks = []

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, outputs: Any) -> None:
            hidden = getattr(outputs, "last_hidden_state", None)
            if hidden is not None:
                found[name] = hidden

        return hook

    for name, model in models.items():
        if model.base_model is not model:
            hooks.append(model.base_model.register_forward_hook(keep(name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def text_embeddings(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average hidden states (rows, tokens, width) over the tokens of each text, whose `mask` is (rows, tokens)."""
    weights = mask.to(hidden.device).unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
