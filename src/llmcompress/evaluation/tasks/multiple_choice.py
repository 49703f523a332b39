"""Which of several answers a language model finds most likely."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...data import load_rows, longest_input
from ...errors import ConfigError
from ...registry import tasks
from .choices import Question, letters, read_question
from .forward import Batch, ForwardTask, Run, by_length, pad_rows, padding_of
from .task import ExampleResult, TaskScore, check_causal, check_string, check_vocabulary, not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits of one batch stay below this many numbers (128 MiB in float32), whatever the batch size asked for.
_MOST_LOGITS = 2**25


@dataclass(frozen=True)
class _Option:
    """One choice of one question as tokens.

    Attributes:
        inputs: context and continuation without its last token.
        continuation: the tokens whose likelihood counts.
    """

    inputs: tuple[int, ...]
    continuation: tuple[int, ...]


@tasks.register("multiple_choice")
@dataclass(frozen=True, eq=False, kw_only=True)
class MultipleChoice(ForwardTask):
    """Multiple choice by log-likelihood: the model answers with the choice it finds most likely after the question.

    The context is `template` with the question in it; each choice follows behind `delimiter`. Both are tokenised, cut
    from the left where they are too long for the model, and scored as the Language Model Evaluation Harness does
    (https://github.com/EleutherAI/lm-evaluation-harness, 0.4), so that the numbers are the same as its own.

    A row has a question (`question`, `question_stem`, `query`, `goal`, `ctx` or `prompt`), its choices (`choices`,
    `options` or `endings`: a list, or the hub's `{"text": [...], "label": [...]}`; or `sol1` and `sol2`) and the right
    one (`answer`, `answerKey`, `label` or `gold`: its label, its letter, its index from 0, or its text). An answer that
    can be read in two ways, such as "2" of the choices "1", "2", "3", is refused; an integer is always an index, unless
    it is one of the labels.

    Metrics: `accuracy`, by the log-likelihood of the whole choice (lm-eval's acc); `accuracy_norm`, by the
    log-likelihood divided by the choice's characters (its acc_norm), so that long choices are not at a disadvantage.

    Attributes:
        template: the context, with `{question}` in it.
        delimiter: stands between context and choice.

    Raises:
        MissingInputError: there is no data, or a question has no answer.
        ConfigError: a row has no question or fewer than two choices, the answer is none of them, or a choice leaves
            no token; the template has no place for the question.
        UnsupportedModelError: the model is no causal language model.

    Example:
        >>> import llmcompress.testing as lt
        >>> task = MultipleChoice([{"question": "2 + 2?", "choices": ["three", "four"], "answer": "B"}])
        >>> score = task.evaluate(lt.tiny_model("llama"), lt.tiny_tokenizer(), progress=False)
        >>> sorted(score.metrics), score.examples[0].label
        (['accuracy', 'accuracy_norm'], 1)
    """

    template: str = "Question: {question}\nAnswer:"
    delimiter: str = " "

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    unit: ClassVar[str] = "choice"
    metric_names: ClassVar[Sequence[str] | None] = ("accuracy", "accuracy_norm")

    def __post_init__(self) -> None:
        check_string("MultipleChoice.delimiter", self.delimiter)
        try:
            kept = "\0" in self.template.format(question="\0")
        except (LookupError, ValueError, AttributeError):
            kept = False
        if not kept:
            raise ConfigError(
                "MultipleChoice.template must have the one field {question} (braces that are meant as such are "
                f"doubled), got {self.template!r}."
            )
        super().__post_init__()

    @cached_property
    def examples(self) -> Sequence[Question]:
        """The questions."""
        name = "MultipleChoice.data"
        rows = load_rows(self.data, split=self.split, name=name)
        return [read_question(row, f"{name}[{index}]") for index, row in enumerate(rows)]

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not predict the next token."""
        check_causal(self, model)

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Tokenise every choice behind its question; see `ForwardTask.start`."""
        self.check(model)
        limit = longest_input(model)
        pairs = [
            (self.template.format(question=example.question), self.delimiter + choice)
            for example in self.examples
            for choice in example.choices
        ]
        encoded = encode_pairs(pairs, tokenizer)
        check_vocabulary([[*context, *continuation] for context, continuation in encoded], model, tokenizer)
        options: list[_Option] = []
        truncated = 0
        for number, (context, continuation) in enumerate(encoded):
            if not context or not continuation or len(continuation) > (limit or math.inf):
                raise ConfigError(
                    f"MultipleChoice.data must have choices of 1 to {limit or 'many'} tokens behind a question of at "
                    f"least one, got {len(continuation)} for {pairs[number][1]!r:.80} behind {len(context)} for "
                    f"{pairs[number][0]!r:.80}."
                )
            tokens = (*context, *continuation)
            truncated += limit is not None and len(tokens) > limit + 1
            options.append(_Option(tokens[-(limit or len(tokens)) - 1 : -1], tuple(continuation)))
        # Choices of one token each ask for the very same logits: their question goes through the model once.
        asked = list(dict.fromkeys((option.inputs, len(option.continuation)) for option in options))
        batches = _batches(asked, model, tokenizer, batch_size)
        protocol: dict[str, str | int | float | bool | None] = {
            "choices": len(options),
            "template": self.template,
            "delimiter": self.delimiter,
            "special_tokens": "as the tokenizer puts them before a text",
            "max_length": limit,
            "truncated": truncated,
            "forward_rows": len(asked),
            "batch_size": batch_size,
            "padding": "to the longest of the batch, on the right, choices sorted by length",
        }
        run = ChoiceRun(self, model, batches, options, asked, protocol)
        ids, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        if ids[-len(bare) :] != bare:
            run.warnings.append(
                f"the tokenizer ends every text with token {ids[-1]}, which lm-eval's way of splitting takes for "
                "a part of the choice: make it add no special tokens behind a text"
            )
        return run

    def shown(self, index: int) -> str:
        """Question number `index` and its choices."""
        example = self.examples[index]
        names = letters(len(example.choices))
        choices = (f"({name}) {choice}" for name, choice in zip(names, example.choices, strict=True))
        return f"{example.question} {' '.join(choices)}"


class ChoiceRun(Run):
    """One model on its way through the choices.

    Attributes:
        loglikelihoods: of each choice of each question, in nats, once all batches were read.
        warnings: what a reader of the score should know.
    """

    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def __init__(
        self,
        task: MultipleChoice,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        choices: Sequence[_Option],
        asked: Sequence[tuple[tuple[int, ...], int]],
        protocol: dict[str, str | int | float | bool | None],
    ) -> None:
        super().__init__(model, batches)
        self.warnings: list[str] = []
        self._task, self._protocol, self._choices = task, protocol, choices
        self.loglikelihoods = [[math.nan] * len(example.choices) for example in task.examples]
        place_of = [(i, k) for i, example in enumerate(task.examples) for k in range(len(example.choices))]
        numbers = {key: number for number, key in enumerate(asked)}
        # For each row that goes through the model, the choices that are read from it.
        self._read: list[list[tuple[int, int, _Option]]] = [[] for _ in asked]
        for option, place in zip(choices, place_of, strict=True):
            self._read[numbers[option.inputs, len(option.continuation)]].append((*place, option))

    def read(self, batch: Batch, outputs: Any) -> None:
        """Keep the log-likelihoods; see `Run.read`."""
        assert batch.scored is not None
        for row, logits, scored in zip(batch.rows, outputs.logits, batch.scored, strict=True):
            log_probabilities = logits[scored.to(logits.device)].float().log_softmax(-1)
            for question, choice, option in self._read[row]:
                found = log_probabilities[range(len(option.continuation)), list(option.continuation)]
                value = float(found.double().sum())
                if not math.isfinite(value):
                    raise not_finite(self.model, f"choice {choice} of example {question} of the data")
                self.loglikelihoods[question][choice] = value

    def score(self) -> TaskScore:
        """Return accuracy, raw and by length; see `Run.score`."""
        results = []
        for example, values in zip(self._task.examples, self.loglikelihoods, strict=True):
            norms = [value / max(len(choice), 1) for value, choice in zip(values, example.choices, strict=True)]
            given, given_norm = (max(range(len(found)), key=found.__getitem__) for found in (values, norms))
            best = max(values)
            results.append(
                ExampleResult(
                    values={
                        "accuracy": float(given == example.answer),
                        "accuracy_norm": float(given_norm == example.answer),
                    },
                    label=example.answer,
                    prediction=given,
                    confidence=1 / math.fsum(math.exp(value - best) for value in values),
                )
            )
        truncated, warnings = self._protocol["truncated"], list(self.warnings)
        if truncated:
            limit = self._protocol["max_length"]
            warnings.append(
                f"{truncated} of {len(self._choices)} questions with a choice lost their beginning: {limit} "
                "tokens are the most that the model can take"
            )
        return self._task.score(results, primary="accuracy", protocol=self._protocol, warnings=warnings)


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Tokenise contexts and what continues them as lm-eval does (`TemplateLM._encode_pair`, `HFLM.tok_encode`).

    Spaces at the end of a context belong to the continuation. Context and continuation are tokenised as one text, whose
    tokens beyond as many as the context has by itself are the continuation's. An empty context is the BOS token, or
    else EOS.

    Raises:
        ConfigError: a context is empty, and the tokenizer has neither token.

    Example:
        >>> import llmcompress.testing as lt
        >>> [(context, continuation)] = encode_pairs([("2 + 2 = ", "4")], lt.tiny_tokenizer())
        >>> [lt.tiny_tokenizer().decode(tokens).replace(" ", "") for tokens in (context, continuation)]
        ['2+2=', '4']
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begins = None if prefix is None else tokenizer.decode(prefix)

    def tokens(texts: Sequence[str]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for special in (True, False):
            # A text that spells out its BOS token gets no second one.
            kept = [text for text in dict.fromkeys(texts) if (begins is None or not text.startswith(begins)) == special]
            if kept:
                ids = tokenizer(kept, add_special_tokens=special, verbose=False)["input_ids"]
                found.update(zip(kept, ids, strict=True))
        return found

    whole, alone = tokens([a + b for a, b in moved if a]), tokens([a for a, _ in moved if a])
    encoded = []
    for context, continuation in moved:
        if context:
            encoded.append((alone[context], whole[context + continuation][len(alone[context]) :]))
            continue
        if prefix is None:
            raise ConfigError(
                "MultipleChoice.template must not be empty for a tokenizer that has neither BOS nor EOS token."
            )
        ids = tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        encoded.append((ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids))
    return encoded


def _batches(
    asked: Sequence[tuple[tuple[int, ...], int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[Batch]:
    pad, _ = padding_of(model, tokenizer)
    # The logits of the questions themselves are of no use: models that can leave them out do.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    most_tokens = None if keeps else _MOST_LOGITS // model.config.get_text_config().vocab_size
    batches = []
    for rows in by_length([len(inputs) for inputs, _ in asked], batch_size, most_tokens=most_tokens):
        encoded = [{"input_ids": asked[row][0], "attention_mask": [1] * len(asked[row][0])} for row in rows]
        inputs = pad_rows(encoded, pad)
        scored = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for number, row in enumerate(rows):
            tokens, length = asked[row]
            scored[number, len(tokens) - length : len(tokens)] = True
        if keeps:
            inputs["logits_to_keep"] = scored.any(0).nonzero()[:, 0]
            scored = scored[:, inputs["logits_to_keep"]]
        batches.append(Batch(rows, inputs, scored))
    return batches
