"""How well a model predicts running text: negative log-likelihood, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional as F

from ...data import longest_input, token_stream
from ...errors import ConfigError, MissingInputError
from ...registry import tasks
from ..resampling import Floats, Metrics
from .forward import Batch, ForwardTask, Run
from .task import (
    ExampleResult,
    MetricKind,
    TaskScore,
    check_causal,
    check_positive,
    check_string,
    check_vocabulary,
    means,
    not_finite,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits of one batch stay below this many numbers (128 MiB in float32), whatever the batch size asked for: a
# comparison holds those of the base while each candidate runs.
_MOST_LOGITS = 2**25
# The exponential of more is no number.
_MOST_NLL = 700.0


@dataclass(frozen=True)
class Window:
    """A stretch of the token stream that goes through the model at once.

    Attributes:
        start: index of its first token in the stream.
        end: index behind its last token.
        new: index of its first token that no earlier window has scored.
    """

    start: int
    end: int
    new: int


@tasks.register("language_modeling")
@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModeling(ForwardTask):
    """Negative log-likelihood of a running text under a causal language model.

    The texts are joined, tokenised once, and cut into windows. A window may overlap the one before it; then only its
    new tokens are scored, with the overlap as context. The first token of a window that has neither overlap nor BOS
    has no context and is not scored. The rest at the end of the text is a shorter window.

    Metrics: `nll` in nats a token; `perplexity`, its exponential; `bits_per_byte`, which is
    nll / ln 2 * (tokens / UTF-8 bytes of the whole text), comparable between tokenizers.

    Attributes:
        window: tokens a window, BOS included, at least 2; at most what the model can take.
        stride: tokens from the start of one window to that of the next; None sets windows side by side. A smaller
            stride gives every token more context, and costs more time.
        bos: whether a window begins with the tokenizer's BOS token: `"auto"` if the tokenizer itself puts it before a
            text, `"always"`, or `"never"`.
        join: what is put between two texts.
        max_windows: score only so many, from the beginning.

    Raises:
        MissingInputError: there is no data, or fewer than two tokens of it.
        ConfigError: a setting is out of range, or the window too long for the model.
        UnsupportedModelError: the model is no causal language model.

    Example:
        >>> import llmcompress.testing as lt
        >>> task = LanguageModeling(["the cat sat on the mat"] * 9, window=32, stride=16)
        >>> score = task.evaluate(lt.tiny_model("llama"), lt.tiny_tokenizer(), progress=False)
        >>> score.protocol["tokens_scored"], round(math.log(score.metrics["perplexity"]) - score.metrics["nll"], 6)
        (205, 0.0)
    """

    window: int = 512
    stride: int | None = None
    bos: Literal["auto", "always", "never"] = "auto"
    join: str = "\n\n"
    max_windows: int | None = None

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    unit: ClassVar[str] = "window"
    metric_names: ClassVar[Sequence[str] | None] = ("perplexity", "nll", "bits_per_byte")
    kinds: ClassVar[Mapping[str, MetricKind]] = {
        "perplexity": MetricKind(scale="ratio", lower_is_better=True),
        "nll": MetricKind(scale="difference", lower_is_better=True),
        "bits_per_byte": MetricKind(scale="difference", lower_is_better=True),
    }

    def __post_init__(self) -> None:
        check_positive("LanguageModeling.window", self.window, least=2, optional=False)
        check_positive("LanguageModeling.stride", self.stride)
        check_positive("LanguageModeling.max_windows", self.max_windows)
        if self.stride is not None and self.stride > self.window:
            raise ConfigError(
                f"LanguageModeling.stride must be at most the window ({self.window}), got {self.stride}: tokens "
                "between two windows would never be scored."
            )
        check_string("LanguageModeling.join", self.join)
        if self.bos not in ("auto", "always", "never"):
            raise ConfigError(f"LanguageModeling.bos must be 'auto', 'always' or 'never', got {self.bos!r}.")
        super().__post_init__()

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not predict the next token."""
        check_causal(self, model)
        most = longest_input(model)
        if most is not None and self.window > most:
            raise ConfigError(
                f"LanguageModeling.window must be at most {most} for {type(model).__name__}, got {self.window}."
            )

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Tokenise the text as one stream and cut it into windows; see `ForwardTask.start`."""
        self.check(model)
        bos = self._bos(tokenizer)
        stream = token_stream(self.examples, tokenizer, join=self.join)
        if len(stream) + (bos is not None) < 2:
            raise MissingInputError(
                f"LanguageModeling.data must hold at least two tokens of text, got {len(stream)}; pass more text."
            )
        check_vocabulary([stream], model, tokenizer)
        content = self.window - (bos is not None)
        stride = min(self.stride or content, content)
        windows = cut_windows(len(stream), content, stride, least=1 if bos is not None else 2)[: self.max_windows]
        rows = max(1, min(batch_size, _MOST_LOGITS // (self.window * model.config.get_text_config().vocab_size)))
        tokens, batches = torch.tensor(stream), []
        for numbers in _equal_lengths(windows, rows):
            ids = torch.stack([tokens[windows[i].start : windows[i].end] for i in numbers])
            if bos is not None:
                ids = torch.cat([torch.full((len(numbers), 1), bos), ids], dim=1)
            # Position p of the logits predicts token p + 1 of the ids: the last one predicts nothing that is known.
            scored = torch.zeros_like(ids, dtype=torch.bool)
            for row, i in enumerate(numbers):
                scored[row, -1 - (windows[i].end - _first_scored(windows[i], bos)) : -1] = True
            batches.append(Batch(tuple(numbers), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, scored))
        text_bytes = len(self.join.join(example.text for example in self.examples).encode())
        protocol = {
            "texts": len(self.examples),
            "join": self.join,
            "text_bytes": text_bytes,
            "tokens": len(stream),
            "tokens_scored": sum(int(batch.scored.sum()) for batch in batches if batch.scored is not None),
            "windows": len(windows),
            "window": self.window,
            "stride": stride,
            "bos": "none" if bos is None else f"token {bos} before every window, not scored",
            "batch_size": rows,
        }
        return _Predicting(self, model, batches, windows, len(stream) / text_bytes, protocol)

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """Perplexity, NLL a token and bits a byte; see `Task.metrics`."""
        mean = means(results)

        def metrics(counts: Floats) -> dict[str, Floats]:
            found = mean(counts)
            return {"perplexity": np.exp(np.minimum(found["nll"], _MOST_NLL)), **found}

        return metrics

    def shown(self, index: int) -> str:
        """Nothing: a window is a stretch of all texts joined."""
        return ""

    def _bos(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        token = tokenizer.bos_token_id
        if self.bos == "never" or (self.bos == "auto" and token is None):
            return None
        if token is None:
            raise ConfigError("LanguageModeling.bos='always' needs a tokenizer with a BOS token; this one names none.")
        adds = self.bos == "always" or tokenizer("a")["input_ids"][:1] == [token]
        return token if adds else None


class _Predicting(Run):
    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def __init__(
        self,
        task: LanguageModeling,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        windows: Sequence[Window],
        tokens_per_byte: float,
        protocol: dict[str, str | int | float | bool | None],
    ) -> None:
        super().__init__(model, batches)
        self._task, self._windows, self._protocol = task, windows, protocol
        self._tokens_per_byte = tokens_per_byte
        self._found: list[tuple[float, int]] = []

    def read(self, batch: Batch, outputs: Any) -> None:
        assert batch.scored is not None
        ids = batch.inputs["input_ids"].to(outputs.logits.device)
        nll = F.cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        for i, row, scored in zip(batch.rows, nll, batch.scored, strict=True):
            value, tokens = float(row[scored[:-1]].double().sum()), int(scored.sum())
            if not math.isfinite(value):
                window = self._windows[i]
                raise not_finite(self.model, f"window {i} (tokens {window.start} to {window.end} of the text)")
            self._found.append((value, tokens))

    def score(self) -> TaskScore:
        results = [
            ExampleResult(
                values={
                    "nll": nll / tokens,
                    "bits_per_byte": nll / tokens / math.log(2) * self._tokens_per_byte,
                },
                weight=tokens,
            )
            for nll, tokens in self._found
        ]
        warnings = []
        if math.fsum(nll for nll, _ in self._found) > _MOST_NLL * sum(tokens for _, tokens in self._found):
            warnings.append("collapse: the perplexity is beyond what a number can hold")
        return self._task.score(results, primary="perplexity", protocol=self._protocol, warnings=warnings)


def cut_windows(tokens: int, length: int, stride: int, *, least: int = 2) -> list[Window]:
    """Cut `tokens` tokens into windows of `length` that begin every `stride` tokens; the last may be shorter.

    Args:
        tokens: of the whole text, at least `least`.
        length: of a window, at least `least`.
        stride: from one window to the next.
        least: tokens of which one can be scored: two where the first one has nothing before it, one behind a BOS.

    Example:
        >>> [(window.start, window.end, window.new) for window in cut_windows(10, 4, 3)]
        [(0, 4, 0), (3, 7, 4), (6, 10, 7)]
        >>> [(window.start, window.end) for window in cut_windows(5, 2, 2, least=1)]
        [(0, 2), (2, 4), (4, 5)]
    """
    windows: list[Window] = []
    for start in range(0, tokens, stride):
        scored = windows[-1].end if windows else 0
        end = min(start + length, tokens)
        if end > scored and end - start >= least:
            windows.append(Window(start, end, scored))
        if end == tokens:
            break
    return windows


def _first_scored(window: Window, bos: int | None) -> int:
    """Index of the first token of `window` that is new and has something before it."""
    return max(window.new, window.start + (bos is None))


def _equal_lengths(windows: Sequence[Window], rows: int) -> Iterator[list[int]]:
    """Batch windows of one length, by their numbers: all but the last are, so that nothing is ever padded."""
    batch: list[int] = []
    for number, window in enumerate(windows):
        first = windows[batch[0]] if batch else window
        if batch and (len(batch) == rows or window.end - window.start != first.end - first.start):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
