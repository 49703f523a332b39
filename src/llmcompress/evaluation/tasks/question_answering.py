"""Extractive question answering: which stretch of a text answers the question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...data import load_rows, longest_input
from ...errors import ConfigError, UnsupportedModelError
from ...questions import Question, read_questions
from ...registry import tasks
from .forward import Batch, ForwardTask, Run, by_length, pad_rows, padding_of
from .squad import exact_match, f1
from .task import ExampleResult, TaskScore, check_positive, check_vocabulary, not_finite, unfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What the SQuAD script of BERT takes for a window; a model with room for less gets less.
_WINDOW = 384


@dataclass(frozen=True)
class Excerpt:
    """A question with as much of its context as the model reads at once.

    Attributes:
        example: number of its question.
        tokens: `input_ids` and what else the tokenizer gave.
        spans: for each token of the context here, where its text starts and ends in the context.
        first: index of the first of these tokens.
    """

    example: int
    tokens: dict[str, list[int]]
    spans: tuple[tuple[int, int], ...]
    first: int


@tasks.register("question_answering")
@dataclass(frozen=True, eq=False, kw_only=True)
class QuestionAnswering(ForwardTask):
    """Extractive question answering, as SQuAD does it.

    A context that is longer than a window is read in several, which overlap; the answer is the stretch with the highest
    sum of start and end logit over all of them (the shortest of equals). Exact match and F1 are those of SQuAD's
    official script 2.0 (Rajpurkar et al. 2018, https://arxiv.org/abs/1806.03822), in [0, 1]; they are 1.1's too, but
    for answers of which its normalisation leaves nothing.

    If some questions of the data have no answer, a model may decline any: it does where the logits of the first token
    (CLS), the least of all windows, are above those of the best stretch. Else it always answers.

    Questions on one context are not independent: they are one group in the statistics.

    Attributes:
        window: tokens the model reads at once, question and special tokens included; None takes 384, or what the
            model can if that is less.
        stride: tokens of the context from the start of one window to that of the next, at most; less where the
            question leaves no room for so many.
        max_answer_tokens: the longest answer.

    Raises:
        MissingInputError: there is no data, or a row has no answers (an empty list is one that says: unanswerable).
        ConfigError: a setting is out of range, a row has no question or context, or a question fills its window.
        UnsupportedModelError: the model gives no start and end logits.

    Example:
        >>> import llmcompress.testing as lt
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> sizes = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = BertForQuestionAnswering(BertConfig(**sizes, intermediate_size=16)).eval()
        >>> task = QuestionAnswering([("Who sat?", "The cat sat on the mat.", ["The cat"])], max_answer_tokens=8)
        >>> score = task.evaluate(model, lt.tiny_tokenizer(), progress=False)
        >>> sorted(score.metrics), len(score.examples[0].prediction) <= 8
        (['exact_match', 'f1'], True)
    """

    window: int | None = None
    stride: int = 128
    max_answer_tokens: int = 30

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    unit: ClassVar[str] = "window"
    metric_names: ClassVar[Sequence[str] | None] = ("f1", "exact_match")

    def __post_init__(self) -> None:
        check_positive("QuestionAnswering.window", self.window, least=2)
        check_positive("QuestionAnswering.stride", self.stride, optional=False)
        check_positive("QuestionAnswering.max_answer_tokens", self.max_answer_tokens, optional=False)
        super().__post_init__()

    @cached_property
    def examples(self) -> Sequence[Question]:
        """The questions."""
        name = "QuestionAnswering.data"
        return read_questions(load_rows(self.data, split=self.split, name=name), name)

    @cached_property
    def groups(self) -> list[int] | None:
        """For each question the number of its context; None where no two share one."""
        number: dict[str, int] = {}
        found = [number.setdefault(question.context, len(number)) for question in self.examples]
        return found if len(number) < len(found) else None

    @cached_property
    def unanswerable(self) -> int:
        """How many questions have no answer in their context."""
        return sum(not question.answers for question in self.examples)

    def shown(self, index: int) -> str:
        """The question and its context."""
        question = self.examples[index]
        return f"{question.question} | {question.context}"

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not point at a start and an end."""
        if not any("ForQuestionAnswering" in cls.__name__ for cls in type(model).__mro__):
            raise unfit(self, model, "a model with a question answering head", "evaluate it with TextGeneration")

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Tokenise question and context and cut the context into windows; see `ForwardTask.start`."""
        self.check(model)
        window = self._window(model, tokenizer)
        excerpts = self._excerpts(tokenizer, window)
        check_vocabulary([excerpt.tokens["input_ids"] for excerpt in excerpts], model, tokenizer)
        pad, _ = padding_of(model, tokenizer)
        batches = []
        for rows in by_length([len(excerpt.tokens["input_ids"]) for excerpt in excerpts], batch_size):
            # Padded on the right, whatever the tokenizer does to texts it is to continue: positions stay as they are.
            inputs = pad_rows([excerpts[i].tokens for i in rows], pad)
            scored = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            scored[:, 0] = self.unanswerable > 0
            for row, excerpt in enumerate(excerpts[i] for i in rows):
                scored[row, excerpt.first : excerpt.first + len(excerpt.spans)] = True
            batches.append(Batch(rows, inputs, scored))
        protocol: dict[str, str | int | float | bool | None] = {
            "contexts": len({question.context for question in self.examples}),
            "unanswerable": self.unanswerable,
            "no_answer": "where the logits of the first token exceed those of the best answer"
            if self.unanswerable
            else "never given: every question has an answer",
            "window": window,
            "stride": self.stride,
            "windows": len(excerpts),
            "max_answer_tokens": self.max_answer_tokens,
            "normalisation": "SQuAD 2.0",
            "batch_size": batch_size,
        }
        return _Pointing(self, model, batches, excerpts, protocol)

    def _window(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        most = longest_input(model, tokenizer)
        if self.window is not None and most is not None and self.window > most:
            raise ConfigError(
                f"QuestionAnswering.window must be at most {most} for {type(model).__name__}, got {self.window}."
            )
        return self.window or min(_WINDOW, most or _WINDOW)

    def _excerpts(self, tokenizer: PreTrainedTokenizerBase, window: int) -> list[Excerpt]:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"QuestionAnswering needs a fast tokenizer, which knows where in the text a token is, got "
                f"{type(tokenizer).__name__}; load it with AutoTokenizer."
            )
        encoded = tokenizer(
            [question.question for question in self.examples],
            [question.context for question in self.examples],
            return_offsets_mapping=True,
            padding=False,
            truncation=False,
            verbose=False,
        )
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded]
        excerpts = []
        for index in range(len(self.examples)):
            context = [at for at, part in enumerate(encoded.sequence_ids(index)) if part == 1]
            if not context:
                raise ConfigError(f"QuestionAnswering.data[{index}] must have a context of a token at least, got none.")
            begin, end = context[0], context[-1] + 1
            ids, offsets = encoded["input_ids"][index], encoded["offset_mapping"][index]
            room = window - (len(ids) - len(context))
            if room < 1:
                raise ConfigError(
                    f"QuestionAnswering.window must leave room for the context, got {window}: the question of "
                    f"data[{index}] and the special tokens are {len(ids) - len(context)}; raise it, or drop the row."
                )
            if self.unanswerable:
                _check_null(tokenizer, ids[0])
            for start in range(begin, end, min(self.stride, room)):
                stop = min(start + room, end)
                tokens = {key: [*(row := encoded[key][index])[:begin], *row[start:stop], *row[end:]] for key in keys}
                spans = tuple((int(a), int(b)) for a, b in offsets[start:stop])
                excerpts.append(Excerpt(index, tokens, spans, begin))
                if stop == end:
                    break
        return excerpts


def _check_null(tokenizer: PreTrainedTokenizerBase, first: int) -> None:
    if first not in [mark for mark in (tokenizer.cls_token_id, tokenizer.bos_token_id) if mark is not None]:
        raise UnsupportedModelError(
            "QuestionAnswering.data has unanswerable questions, which need a tokenizer that puts CLS before a text "
            f"(its logits say that there is no answer), got {type(tokenizer).__name__} that begins with token {first}; "
            "remove the questions with an empty list of answers."
        )


class _Pointing(Run):
    def __init__(
        self,
        task: QuestionAnswering,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        excerpts: Sequence[Excerpt],
        protocol: dict[str, str | int | float | bool | None],
    ) -> None:
        super().__init__(model, batches)
        self._task, self._excerpts, self._protocol = task, excerpts, protocol
        count = len(task.examples)
        self._best = [-math.inf] * count
        self._null = [math.inf] * count
        self._texts = [""] * count

    def read(self, batch: Batch, outputs: Any) -> None:
        starts, ends = self._logits(batch, outputs)
        assert batch.scored is not None
        good = (torch.isfinite(starts + ends) | ~batch.scored).all(1).tolist()
        if not all(good):
            bad = min(self._excerpts[row].example for row, fine in zip(batch.rows, good, strict=True) if not fine)
            raise not_finite(self.model, f"example {bad} of the data")
        nulls = (starts + ends)[:, 0].tolist()
        context = batch.scored.clone()
        context[:, 0] &= self._task.unanswerable == 0
        found = best_spans(
            starts.masked_fill(~context, -math.inf), ends.masked_fill(~context, -math.inf), self._task.max_answer_tokens
        )
        for row, null, value, first, last in zip(batch.rows, nulls, *found, strict=True):
            excerpt = self._excerpts[row]
            i = excerpt.example
            self._null[i] = min(self._null[i], null)
            if value > self._best[i]:
                self._best[i] = value
                begin, end = excerpt.spans[first - excerpt.first][0], excerpt.spans[last - excerpt.first][1]
                self._texts[i] = self._task.examples[i].context[begin:end].strip()

    def score(self) -> TaskScore:
        groups = self._task.groups
        results = []
        for index, question in enumerate(self._task.examples):
            declined = self._task.unanswerable > 0 and self._null[index] > self._best[index]
            given = "" if declined else self._texts[index]
            results.append(
                ExampleResult(
                    values={"f1": f1(given, question.answers), "exact_match": exact_match(given, question.answers)},
                    label=question.answers[0] if question.answers else "",
                    prediction=given,
                    group=groups[index] if groups else None,
                )
            )
        warnings = []
        texts = {result.prediction for result in results}
        if len(results) > 1 and len(texts) == 1 and len({result.label for result in results}) > 1:
            warnings.append(f"collapse: every question was given {texts.pop()!r:.80}")
        return self._task.score(results, primary="f1", protocol=self._protocol, warnings=warnings)

    def answers(self, batch: Batch, outputs: Any) -> torch.Tensor | None:
        # Where an answer starts and where it ends are two distributions over the tokens it may be made of.
        both = torch.cat(self._logits(batch, outputs))
        assert batch.scored is not None
        return both.masked_fill(~batch.scored.repeat(2, 1), -math.inf)

    def _logits(self, batch: Batch, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        expected = tuple(batch.inputs["input_ids"].shape)
        starts, ends = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
        if starts is None or ends is None or not tuple(starts.shape) == tuple(ends.shape) == expected:
            raise UnsupportedModelError(
                f"QuestionAnswering needs start_logits and end_logits of shape {expected}, got none such from "
                f"{type(self.model).__name__}; load it with AutoModelForQuestionAnswering."
            )
        return starts.float().cpu(), ends.float().cpu()


def best_spans(starts: torch.Tensor, ends: torch.Tensor, longest: int) -> tuple[list[float], list[int], list[int]]:
    """Find in each row the stretch with the highest start + end logit; of equals the shortest.

    Args:
        starts: logits of shape (rows, tokens), -inf where no answer may be.
        ends: logits of the same shape.
        longest: tokens a stretch may have.

    Returns:
        The sums, the first tokens, and the last tokens.

    Example:
        >>> best_spans(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[2.0, 5.0, 1.0]]), 2)
        ([6.0], [0], [1])
    """
    rows, tokens = starts.shape
    best = torch.full((rows,), -math.inf)
    first, last = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    for more in range(min(longest, tokens)):
        value, at = (starts[:, : tokens - more] + ends[:, more:]).max(1)
        better = value > best
        best, first, last = (
            torch.where(better, new, old) for new, old in ((value, best), (at, first), (at + more, last))
        )
    return best.tolist(), first.tolist(), last.tolist()
