"""How well a masked language model predicts each token of a text from all the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import torch

from ...data import encode
from ...errors import ConfigError, UnsupportedModelError
from ...registry import tasks
from ..resampling import Floats, Metrics
from .forward import Batch, ForwardTask, Run, by_length, pad_rows, padding_of
from .task import (
    ExampleResult,
    MetricKind,
    TaskScore,
    check_positive,
    check_vocabulary,
    length_limit,
    means,
    not_finite,
    unfit,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits of one batch stay below this many numbers (128 MiB in float32), whatever the batch size asked for.
_MOST_LOGITS = 2**25
# The exponential of more is no number.
_MOST_NLL = 700.0


@tasks.register("masked_language_modeling")
@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedLanguageModeling(ForwardTask):
    """Pseudo-log-likelihood of texts under a masked language model (Salazar et al. 2020, arXiv 1910.14659).

    Every token of a text is masked in turn, in a copy of its own, and scored by what the model expects there. Special
    tokens are never masked. A text of n tokens costs n forward passes of its length; `max_positions` caps them.

    Metrics: `nll`, in nats a masked token, over all texts; `pseudo_perplexity`, its exponential. Neither is comparable
    between tokenizers, nor with the perplexity of a causal model.

    Attributes:
        max_length: tokens a text is cut to, special tokens included; None takes the most that the model can.
        max_positions: tokens masked a text, at most: evenly spaced, from the first to the last; None masks all.

    Raises:
        MissingInputError: there is no data.
        ConfigError: a text has no token to mask; the tokenizer has no mask token; a setting is out of range.
        UnsupportedModelError: the model is no masked language model.

    Example:
        >>> import llmcompress.testing as lt
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model, tokenizer = BertForMaskedLM(BertConfig(**sizes, intermediate_size=64)), lt.tiny_tokenizer()
        >>> tokenizer.mask_token = "<extra_0>"
        >>> task = MaskedLanguageModeling(["the cat sat on the mat", "no rain"], max_positions=8)
        >>> score = task.evaluate(model, tokenizer, progress=False)
        >>> score.primary, score.protocol["tokens_masked"], [example.weight for example in score.examples]
        ('pseudo_perplexity', 15, [8.0, 7.0])
    """

    max_length: int | None = None
    max_positions: int | None = None

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    unit: ClassVar[str] = "mask"
    metric_names: ClassVar[Sequence[str] | None] = ("pseudo_perplexity", "nll")
    kinds: ClassVar[Mapping[str, MetricKind]] = {
        "pseudo_perplexity": MetricKind(scale="ratio", lower_is_better=True),
        "nll": MetricKind(scale="difference", lower_is_better=True),
    }

    def __post_init__(self) -> None:
        check_positive("MaskedLanguageModeling.max_length", self.max_length)
        check_positive("MaskedLanguageModeling.max_positions", self.max_positions)
        super().__post_init__()

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not predict masked tokens."""
        if not any(cls.__name__.endswith("ForMaskedLM") for cls in type(model).__mro__):
            raise unfit(self, model, "a masked language model", "evaluate a causal one with LanguageModeling")

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Tokenise the texts and choose the tokens to mask; see `ForwardTask.start`."""
        self.check(model)
        mask = tokenizer.mask_token_id
        if mask is None:
            raise ConfigError(
                f"MaskedLanguageModeling.tokenizer must have a mask token, got {type(tokenizer).__name__} without one; "
                "pass the tokenizer that the model was trained with."
            )
        pair = any(example.pair is not None for example in self.examples)
        limit = length_limit(self, self.max_length, model, tokenizer, pair=pair)
        texts = encode(self.examples, tokenizer, max_length=limit)
        check_vocabulary([[mask], *(text["input_ids"] for text in texts)], model, tokenizer)
        # An unknown token stands for a word of the text; the other special ones do not.
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        copies: list[tuple[int, int]] = []
        for index, text in enumerate(texts):
            places = [place for place, token in enumerate(text["input_ids"]) if token not in special]
            if not places:
                raise ConfigError(
                    f"MaskedLanguageModeling.data[{index}] must have a token to mask, got none; remove it."
                )
            copies += [(index, places[chosen]) for chosen in _evenly_spaced(len(places), self.max_positions)]
        pad, _ = padding_of(model, tokenizer)
        most_tokens = _MOST_LOGITS // model.config.get_text_config().vocab_size
        lengths = [len(texts[index]["input_ids"]) for index, _ in copies]
        batches = _Masked(texts, copies, list(by_length(lengths, batch_size, most_tokens=most_tokens)), mask, pad)
        # Only a text that fills the limit can have been cut: only those are tokenised again, in full.
        full = [example for example, text in zip(self.examples, texts, strict=True) if len(text["input_ids"]) == limit]
        whole = encode(full, tokenizer)
        protocol = {
            "texts": len(texts),
            "tokens_masked": len(copies),
            "max_positions": self.max_positions,
            "positions": "all" if self.max_positions is None else "evenly spaced, from the first to the last",
            "special_tokens": "not masked",
            "mask_token": mask,
            "max_length": limit,
            "truncated": sum(len(text["input_ids"]) > (limit or 0) for text in whole),
            "batch_size": batch_size,
            "padding": f"to the longest of the batch, token {pad}, copies sorted by length",
        }
        return _Unmasking(self, model, batches, texts, copies, protocol)

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """Pseudo-perplexity and NLL a token; see `Task.metrics`."""
        mean = means(results)

        def metrics(counts: Floats) -> dict[str, Floats]:
            found = mean(counts)
            return {"pseudo_perplexity": np.exp(np.minimum(found["nll"], _MOST_NLL)), **found}

        return metrics


class _Masked(Sequence[Batch]):
    """Batches of copies, each with one token masked, made when they are asked for: all at once would not fit."""

    def __init__(
        self,
        texts: Sequence[Mapping[str, list[int]]],
        copies: Sequence[tuple[int, int]],
        rows: Sequence[tuple[int, ...]],
        mask: int,
        pad: int,
    ) -> None:
        self._texts, self._copies, self._rows, self._mask, self._pad = texts, copies, rows, mask, pad

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return _Masked(self._texts, self._copies, self._rows[index], self._mask, self._pad)
        rows = self._rows[index]
        # Padding stands behind the text whatever the tokenizer's side: positions must not move.
        inputs = pad_rows([self._texts[self._copies[row][0]] for row in rows], self._pad)
        scored = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        scored[range(len(rows)), [self._copies[row][1] for row in rows]] = True
        inputs["input_ids"][scored] = self._mask
        return Batch(rows, inputs, scored)


class _Unmasking(Run):
    def __init__(
        self,
        task: MaskedLanguageModeling,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        texts: Sequence[Mapping[str, list[int]]],
        copies: Sequence[tuple[int, int]],
        protocol: dict[str, str | int | float | bool | None],
    ) -> None:
        super().__init__(model, batches)
        self._task, self._texts, self._copies, self._protocol = task, texts, copies, protocol
        self._nll: list[list[float]] = [[] for _ in texts]

    def read(self, batch: Batch, outputs: Any) -> None:
        assert batch.scored is not None
        if outputs.logits.shape[:2] != batch.scored.shape:
            raise UnsupportedModelError(
                f"MaskedLanguageModeling needs logits for every token, of shape {tuple(batch.scored.shape)} and the "
                f"vocabulary, got {tuple(outputs.logits.shape)} from {type(self.model).__name__}."
            )
        logits = outputs.logits[batch.scored.to(outputs.logits.device)].float()
        asked = [self._texts[index]["input_ids"][place] for index, place in (self._copies[row] for row in batch.rows)]
        nll = -logits.log_softmax(-1)[range(len(asked)), asked]
        if not nll.isfinite().all():
            bad = (self._copies[row] for row, good in zip(batch.rows, nll.isfinite().tolist(), strict=True) if not good)
            index, place = min(bad)
            raise not_finite(self.model, f"example {index} of the data, token {place}")
        for row, value in zip(batch.rows, nll.tolist(), strict=True):
            self._nll[self._copies[row][0]].append(value)

    def score(self) -> TaskScore:
        results = [
            ExampleResult(values={"nll": math.fsum(values) / len(values)}, weight=len(values)) for values in self._nll
        ]
        warnings = []
        truncated = self._protocol["truncated"]
        if truncated:
            warnings.append(f"{truncated} of {len(results)} texts were cut to {self._protocol['max_length']} tokens")
        if math.fsum(map(math.fsum, self._nll)) > _MOST_NLL * len(self._copies):
            warnings.append("collapse: the pseudo-perplexity is beyond what a number can hold")
        return self._task.score(results, primary="pseudo_perplexity", protocol=self._protocol, warnings=warnings)


def _evenly_spaced(count: int, most: int | None) -> list[int]:
    """Choose at most `most` of `count` places, evenly spaced, the first and the last among them."""
    if most is None or most >= count:
        return list(range(count))
    if most == 1:
        return [count // 2]
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]
