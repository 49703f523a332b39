"""Texts that a model writes: summaries, translations, answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from ...data import load_rows
from ...errors import ConfigError
from ...registry import tasks
from ..resampling import Floats, Metrics
from .decoding import Decoding, Writer, Written
from .overlap import bleu, chrf, rouge, rouge_scorer
from .prompts import PLACE, Prompt, read_prompts
from .repetition import collapse_warnings
from .task import ExampleResult, MetricKind, Task, TaskScore, check_positive, means, unfit

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Measure = Literal["rouge", "bleu", "chrf", "exact_match"]


@tasks.register("text_generation")
@dataclass(frozen=True, eq=False, kw_only=True)
class TextGeneration(Task):
    """Text that a decoder or an encoder-decoder writes after a prompt, compared with references.

    Decoding is greedy, or by beams: nothing is drawn, so that two models differ by nothing but themselves. What else
    the model's own `generation_config` asks for (a forced first token, a repetition penalty) is kept, and told in the
    protocol. Prompts are sorted by length and padded on the left for decoders. One that leaves no room for
    `max_new_tokens` is cut: of a decoder's prompt the end is kept, of an encoder's the beginning.

    Metrics: `rouge1`, `rouge2`, `rougeL` (mean F-measure, by rouge-score), `bleu` and `chrf` (of all texts together, in
    [0, 100], by sacrebleu; its signature is in the protocol), `exact_match` (equal to a reference but for white space
    around it), and `tokens`, the mean length. The first of `measures` stands for the task, ROUGE-L of ROUGE.

    Attributes:
        measures: which metrics: `"rouge"`, `"bleu"`, `"chrf"`, `"exact_match"`.
        template: the prompt, with `{column}` where the text of that column goes; `{prompt}` is the column that has the
            name of one (prompt, source, dialogue, article, document, question, ...).
        reference: name of the column with the reference or references; None finds it (reference, target, summary,
            highlights, answer, ...).
        max_new_tokens: the longest text, in tokens.
        max_prompt_tokens: the longest prompt, in tokens; None takes what the model can.
        num_beams: beams; 1 is greedy.
        stop: a text ends before the first of these strings.
        stemmer: whether ROUGE compares the stems of English words.
        bleu_tokenize: how BLEU cuts words; "13a" is for languages with blanks between words, "zh", "ja-mecab", "char"
            are for others.

    Raises:
        MissingInputError: there is no data, a row has no reference, or rouge-score or sacrebleu is not installed.
        ConfigError: a setting is out of range, or a row lacks a column.
        UnsupportedModelError: the model does not generate.

    Example:
        >>> import llmcompress.testing as lt
        >>> task = TextGeneration([("one, two, ", "three")], measures=("rouge", "exact_match"), max_new_tokens=4)
        >>> score = task.evaluate(lt.tiny_model("llama"), lt.tiny_tokenizer(), progress=False)
        >>> score.primary, sorted(score.metrics)
        ('rougeL', ['exact_match', 'rouge1', 'rouge2', 'rougeL', 'tokens'])
    """

    measures: Sequence[Measure] = ("rouge", "bleu", "chrf", "exact_match")
    template: str = "{prompt}"
    reference: str | None = None
    max_new_tokens: int = 64
    max_prompt_tokens: int | None = None
    num_beams: int = 1
    stop: Sequence[str] = ()
    stemmer: bool = True
    bleu_tokenize: str = "13a"

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric_names: ClassVar[Sequence[str] | None] = (
        "rouge1",
        "rouge2",
        "rougeL",
        "bleu",
        "chrf",
        "exact_match",
        "tokens",
    )
    kinds: ClassVar[Mapping[str, MetricKind]] = {
        "bleu": MetricKind(scale="difference"),
        "chrf": MetricKind(scale="difference"),
        "tokens": MetricKind(scale="difference"),
    }

    def __post_init__(self) -> None:
        known = get_args(Measure)
        if isinstance(self.measures, str) or not self.measures or not set(self.measures) <= set(known):
            raise ConfigError(f"TextGeneration.measures must be some of {known}, got {self.measures!r}.")
        for name in ("max_new_tokens", "max_prompt_tokens", "num_beams"):
            check_positive(f"TextGeneration.{name}", getattr(self, name), optional=name == "max_prompt_tokens")
        many = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        if not many or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"TextGeneration.stop must be strings such as ['\\n'], got {self.stop!r}.")
        if not isinstance(self.stemmer, bool):
            raise ConfigError(f"TextGeneration.stemmer must be True or False, got {self.stemmer!r}.")
        if not isinstance(self.template, str) or not PLACE.search(self.template):
            raise ConfigError(f"TextGeneration.template must name a column such as {{prompt}}, got {self.template!r}.")
        super().__post_init__()
        # A package that is missing is told now, not after hours of generating.
        self._corpus([""], [("a",)])
        _ = self._scorer

    @cached_property
    def examples(self) -> Sequence[Prompt]:
        """The prompts with their references."""
        name = "TextGeneration.data"
        rows = load_rows(self.data, split=self.split, name=name)
        return read_prompts(rows, name, template=self.template, reference=self.reference)

    def shown(self, index: int) -> str:
        """The prompt."""
        return self.examples[index].prompt

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that does not generate."""
        if not model.can_generate():
            raise unfit(self, model, "a model that generates text", "evaluate it with another task")

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, progress: bool = True
    ) -> TaskScore:
        """Generate a text for every prompt and compare it with the references; see `Task.evaluate`."""
        check_positive("batch_size", batch_size, optional=False)
        self.check(model)
        decoding = Decoding(self.max_new_tokens, self.max_prompt_tokens, self.num_beams, tuple(self.stop))
        prompts = [example.prompt for example in self.examples]
        writer = Writer("TextGeneration", model, tokenizer, decoding, prompts)
        written = writer.write(batch_size=batch_size, progress=progress, title=self.name)
        results = [self._result(index, text) for index, text in enumerate(written)]
        unended = sum(not text.complete for text in written)
        protocol: dict[str, str | int | float | bool | None] = {
            "template": self.template,
            **writer.protocol,
            "texts_cut_at_max_new_tokens": unended,
            "batch_size": batch_size,
            **self._corpus([text.text for text in written], self._references)[1],
        }
        if self._scorer is not None:
            stems = "with" if self.stemmer else "without"
            protocol["rouge"] = f"rouge-score {version('rouge-score')}, F-measure, {stems} stemmer"
        first = [references[0] for references in self._references]
        warnings = collapse_warnings([text.text for text in written], first, sum(text.loops for text in written))
        foreign = sum(not re.search("[a-z0-9]", text.lower()) for text in first)
        if self._scorer is not None and foreign:
            warnings.append(f"rouge-score reads the letters a-z and digits only: {foreign} references have none")
        if writer.cut_prompts:
            limit = writer.protocol["max_prompt_tokens"]
            warnings.append(f"{writer.cut_prompts} of {len(results)} prompts were cut to {limit} tokens")
        return self.score(results, primary=_PRIMARY[self.measures[0]], protocol=protocol, warnings=warnings)

    def metrics(self, results: Sequence[ExampleResult]) -> Metrics:
        """ROUGE, BLEU, chrF, exact match and mean length; see `Task.metrics`."""
        corpus, _ = self._corpus([str(result.prediction) for result in results], self._references)
        mean = means(results)

        def metrics(counts: Floats) -> dict[str, Floats]:
            found = mean(counts)
            for one in corpus:
                found.update(one(counts))
            return found

        return metrics

    @property
    def _references(self) -> list[tuple[str, ...]]:
        return [example.references for example in self.examples]

    @cached_property
    def _scorer(self) -> RougeScorer | None:
        return rouge_scorer(stemmer=self.stemmer) if "rouge" in self.measures else None

    def _result(self, index: int, written: Written) -> ExampleResult:
        references = self.examples[index].references
        values = {} if self._scorer is None else rouge(self._scorer, written.text, references)
        if "exact_match" in self.measures:
            values["exact_match"] = float(written.text in [reference.strip() for reference in references])
        values["tokens"] = float(written.tokens)
        return ExampleResult(values=values, label=references[0], prediction=written.text)

    def _corpus(
        self, texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[list[Metrics], dict[str, str]]:
        """Return the metrics that only all texts together have, and the signatures of these."""
        found, signatures = [], {}
        if "bleu" in self.measures:
            metric, signatures["bleu"] = bleu(texts, references, tokenize=self.bleu_tokenize)
            found.append(metric)
        if "chrf" in self.measures:
            metric, signatures["chrf"] = chrf(texts, references)
            found.append(metric)
        return found, signatures


_PRIMARY = {"rouge": "rougeL", "bleu": "bleu", "chrf": "chrf", "exact_match": "exact_match"}
