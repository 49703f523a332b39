"""Base against candidates, side by side: quality, size and speed, measured alike and paired."""

from __future__ import annotations

import datetime
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from .checkpoint import METADATA_FILE, read_metadata
from .claims import check_non_inferior, check_smaller, check_speedup, chosen
from .data import find_tokenizer
from .errors import CheckpointError, ConfigError, MissingInputError, did_you_mean
from .evaluation.cost import Shape, measure_costs, plan_costs
from .evaluation.evaluate import Evaluation, as_tasks, load_model
from .evaluation.fidelity import Fidelity
from .evaluation.generation_latency import GenerationSpeedup, generation_speedup
from .evaluation.latency import Speedup, speedup
from .evaluation.machine import Machine, machine
from .evaluation.scoring import Scored, score_models
from .evaluation.statistics import Flips, PairedTest, flips
from .evaluation.tasks import Task, TaskScore
from .places import told_if_unwritable
from .result import Report

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN_CHARACTERS = 400


class Change(BaseModel, frozen=True, extra="forbid"):
    """A candidate against the base. Ratios are base over candidate: 4 is four times smaller, or faster."""

    tests: tuple[tuple[PairedTest, ...], ...] = Field(
        description="for each task, every metric against the base's, on the same examples"
    )
    flips: tuple[Flips | None, ...] = Field(
        description="for each task, what changed by example; None without right/wrong"
    )
    fidelity: tuple[Fidelity | None, ...] = Field(
        description="for each task, how closely the base's answers are kept; None where the two were asked differently"
    )
    smaller_on_disk: float
    smaller_in_memory: float
    fewer_weights: float = Field(description="ratio of the weights that are not zero")
    faster: tuple[Speedup, ...] = Field(description="one entry a shape at which latency was measured")
    generation: tuple[GenerationSpeedup, ...] = Field(
        default=(), description="one entry a (prompt, new) pair at which generation was measured"
    )


class Entry(BaseModel, frozen=True, extra="forbid"):
    """One model of a comparison."""

    name: str = Field(description="the name the caller gave it")
    evaluation: Evaluation
    change: Change | None = Field(description="against the base; None for the base itself")
    report: Report | None = Field(default=None, description="the run that made it, stage by stage, where it is known")


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """Several models on one task, with every number's protocol: the one document that all renderings are made from.

    `print(comparison)` is a table, as is a notebook cell; `to_markdown`, `to_json`, `to_csv` and `save` write it.
    """

    format_version: Literal[1] = 1
    created: str = Field(description="time of the measurement, UTC, ISO 8601")
    entries: tuple[Entry, ...] = Field(description="the base first, then the candidates in the caller's order")
    inputs: tuple[tuple[str, ...], ...] = Field(
        default=(), description="for each task, the examples as a person reads them, cut short; empty texts for windows"
    )
    machine: Machine

    @property
    def base(self) -> Entry:
        """The model that the others are compared with."""
        return self.entries[0]

    @property
    def candidates(self) -> tuple[Entry, ...]:
        """The others."""
        return self.entries[1:]

    def test(self, name: str, metric: str) -> PairedTest:
        """Return the paired test of `metric` (of the first task that has it) for candidate `name`.

        Raises:
            ConfigError: there is no such candidate, or no such metric was tested.
        """
        change = self[name].change
        found = {test.metric: test for tests in reversed(change.tests) for test in tests} if change else {}
        if metric not in found:
            hint = did_you_mean(metric, found) or "."
            raise ConfigError(
                f"metric must be one that was compared with the base, got {metric!r} for {name!r}{hint} "
                f"There is: {', '.join(found) or 'none'}."
            )
        return found[metric]

    def assert_non_inferior(self, metric: str, *, margin: float, candidate: str | None = None) -> None:
        """Refuse candidates that may have lost more than `margin` of a metric: the far end of the interval counts.

        Args:
            metric: its name, of any task.
            margin: 0.01 is one point of a metric in [0, 1], and a perplexity that is 1 % higher; above 0.
            candidate: one of them; None checks all.

        Raises:
            ClaimError: (an `AssertionError`) with the numbers.
            ConfigError: no such metric or candidate, or a margin that is not a number above 0.
        """
        for entry in chosen(self, candidate):
            kinds = {name: kind for score in reversed(entry.evaluation.scores) for name, kind in score.kinds.items()}
            test = self.test(entry.name, metric)
            check_non_inferior(entry, test, margin=margin, lower_is_better=kinds[metric].lower_is_better)

    def assert_speedup(self, factor: float, *, candidate: str | None = None, shape: Shape | None = None) -> None:
        """Refuse candidates that are not proven `factor` times as fast as the base: the interval's lower end counts.

        Args:
            factor: 1.5 is one and a half times the base's speed.
            candidate: one of them; None checks all.
            shape: (rows, tokens) at which latency was measured; None takes the first.

        Raises:
            ClaimError: (an `AssertionError`) with the numbers.
            ConfigError: latency was not measured at this shape, or `factor` is not a number above 0.
        """
        for entry in chosen(self, candidate):
            assert entry.change is not None
            found = {(one.batch_size, one.tokens): one for one in entry.change.faster}
            # A list is what JSON and YAML make of a pair.
            asked = tuple(shape) if isinstance(shape, list) else shape
            wanted = asked if asked is not None else next(iter(found), None)
            if wanted is None or wanted not in list(found):
                raise ConfigError(
                    f"shape must be one at which latency was measured, got {shape}; there is: "
                    f"{', '.join(map(str, found)) or 'none, compare with latency=True'}."
                )
            check_speedup(entry, found[wanted], factor)

    def assert_smaller(self, factor: float, *, candidate: str | None = None) -> None:
        """Refuse candidates whose files are not at least `factor` times smaller than the base's.

        Raises:
            ClaimError: (an `AssertionError`) with the numbers.
            ConfigError: `factor` is not a number above 0.
        """
        for entry in chosen(self, candidate):
            check_smaller(entry, factor)

    def __getitem__(self, name: str) -> Entry:
        found = {entry.name: entry for entry in self.entries}
        if name not in found:
            hint = did_you_mean(name, found) or "."
            raise ConfigError(f"the comparison has no model {name!r}{hint} It has: {', '.join(found)}.")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts and lists: what `to_json` writes."""
        from .report.schema import document

        return document(self)

    def to_json(self) -> str:
        """Return it as JSON, every example included; `from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of what `to_json` writes; it is published as `docs/comparison.schema.json`."""
        from .report.schema import json_schema

        return json_schema()

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: `text` is something else, or a newer version of the library wrote it.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise CheckpointError(f"this is no comparison of format 1: {where}: {first['msg']}.") from error

    def to_markdown(self) -> str:
        """Return headlines, table, notes and protocol in Markdown."""
        from .report.text import to_markdown

        return to_markdown(self)

    def to_csv(self) -> str:
        """Return all numbers as CSV, one row a model; the columns are those of `to_dataframe`."""
        from .report.frame import to_csv

        return to_csv(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return all numbers as a data frame, one row a model: metrics, changes, p-values, sizes, times, ratios.

        Raises:
            MissingInputError: pandas is not installed.
        """
        from .report.frame import to_dataframe

        return to_dataframe(self)

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page.

        Raises:
            MissingInputError: jinja2 is not installed (`pip install llmcompress[report]`).
        """
        from .report.html import to_html

        return to_html(self)

    def save(self, path: str | Path) -> Path:
        """Write the report; the ending of `path` says which: `.html`, `.md`, `.json` or `.csv`.

        The file is there in whole or as it was before, whatever happens meanwhile.

        Raises:
            ConfigError: another ending.
            CheckpointError: the file cannot be written.
        """
        path = Path(path)
        writers = {".html": self.to_html, ".md": self.to_markdown, ".json": self.to_json, ".csv": self.to_csv}
        if path.suffix.lower() not in writers:
            raise ConfigError(f"save() must have a path ending in {', '.join(writers)}, got {path.name!r}.")
        text = writers[path.suffix.lower()]()
        draft = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
        with told_if_unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_text(text, encoding="utf-8")
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        return path

    def __str__(self) -> str:
        from .report.text import to_terminal

        return to_terminal(self)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(repr(entry.name) for entry in self.entries)})"

    def __rich__(self) -> Any:
        from .report.text import to_rich

        return to_rich(self)

    def _repr_html_(self) -> str:
        from .report.text import to_notebook

        return to_notebook(self)


def compare(
    models: Mapping[str, Any],
    task: Task | Sequence[Task],
    *,
    base: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    latency: bool | Sequence[Shape] = True,
    generation: bool | Sequence[Shape] | None = None,
    memory: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure several models on the same examples and the same machine, and compare each with the base.

    Speed is measured with all models taking turns, so that the machine's drift cancels in the ratios.

    Args:
        models: by name: a model, a folder or hub name, or anything with a `.model`, such as a `Result`. All are in
            memory at once while latency is measured.
        task: one task, or several.
        base: name of the model the others are compared with; None takes the first.
        tokenizer: for models that bring none; a `Result` and a folder bring their own.
        batch_size: examples a batch, at most.
        latency: whether to time the forward pass, or the (rows, tokens) shapes at which to; the first is
            the headline's.
        generation: whether to time generation, or the (prompt, new) tokens at which to; None does so where latency is
            measured and all models generate.
        memory: whether to measure peak memory, each model in a fresh process (some seconds each).
        threads: intra-op threads of torch while models are timed; None leaves them.
        progress: whether bars are shown.

    Raises:
        MissingInputError: there is no model, no data, or no tokenizer.
        ConfigError: `models` is no dict or two of its names are one, `base` is no name in it, or a setting is out of
            range.
        UnsupportedModelError: a model's head does not fit a task, or it cannot generate.

    Example:
        >>> import llmcompress as lc
        >>> import llmcompress.testing as lt
        >>> models = {"base": lt.tiny_model("bert"), "other seed": lt.tiny_model("bert", seed=1)}
        >>> task = lc.TextClassification([("good", 1), ("bad", 0)])
        >>> found = lc.compare(models, task, tokenizer=lt.tiny_tokenizer(), latency=[(1, 8)], progress=False)
        >>> found.base.name, [entry.name for entry in found.candidates], found["other seed"].change.smaller_on_disk
        ('base', ['other seed'], 1.0)
    """
    if not isinstance(models, Mapping):
        raise ConfigError(
            f"models must be a dict of models by name, got {models!r:.80}; pass {{'base': model, 'int8': result}}."
        )
    if not models:
        raise MissingInputError("compare() must have at least one model; pass {'base': model, 'int8': result}.")
    called: dict[str, Any] = {}
    for name in models:
        if str(name) in called:
            raise ConfigError(
                f"models must have names that differ as texts, got {called[str(name)]!r} and {name!r}; rename one."
            )
        called[str(name)] = name
    if base is not None and base not in models:
        raise ConfigError(f"base must be one of {', '.join(map(repr, models))}, got {base!r}.")
    first = base if base is not None else next(iter(models))
    sources = {str(name): models[name] for name in (first, *(name for name in models if name != first))}
    tasks = as_tasks(task)
    loaded: dict[str, PreTrainedModel] = {name: _load(name, source, tasks[0]) for name, source in sources.items()}
    own = {name: _own_tokenizer(source) or tokenizer for name, source in sources.items()}
    for name, model in loaded.items():
        for one in tasks:
            one.check(model)
            find_tokenizer(model, own[name] or one.tokenizer, who=type(one).__name__)

    plan = plan_costs(loaded, latency=latency, generation=generation, memory=memory, threads=threads)
    scored = [score_models(one, loaded, own, batch_size=batch_size, progress=progress) for one in tasks]
    costs = measure_costs(loaded, sources, plan, progress=progress)
    evaluations = {
        name: Evaluation.of(model, [found.scores[name] for found in scored], costs[name])
        for name, model in loaded.items()
    }
    return Comparison(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        entries=tuple(
            Entry(
                name=name,
                evaluation=found,
                report=_report(sources[name]),
                change=None if name == str(first) else _change(evaluations[str(first)], found, name, scored),
            )
            for name, found in evaluations.items()
        ),
        inputs=tuple(
            tuple(_shortened(one.shown(i)) for i in range(len(found.scores[str(first)].examples)))
            for one, found in zip(tasks, scored, strict=True)
        ),
        machine=machine(),
    )


def _load(name: str, source: Any, task: Task) -> PreTrainedModel:
    from transformers import PreTrainedModel

    # A Llama has a `.model` too: what is a model already is not looked into.
    if not isinstance(source, (PreTrainedModel, str, Path)):
        source = getattr(source, "model", source)
    try:
        return load_model(source, task)
    except ConfigError as error:
        raise ConfigError(f"models[{name!r}]: {error}") from None


def _report(source: Any) -> Report | None:
    """Return the account of the run that made a model: a `Result` brings it, a folder holds it."""
    if not isinstance(source, (str, Path)):
        report = getattr(source, "report", None)
        return report if isinstance(report, Report) else None
    if not (Path(source) / METADATA_FILE).is_file():
        return None
    content = read_metadata(source)
    try:
        return Report.model_validate({name: content[name] for name in Report.model_fields if name in content})
    except ValidationError:
        return None  # another version's account: what is measured here does not depend on it


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _own_tokenizer(source: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a `Result` or a folder brings; a smaller vocabulary makes it the only right one."""
    if isinstance(source, (str, Path)):
        if not (Path(source) / "tokenizer_config.json").is_file():
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source)
    return getattr(source, "tokenizer", None)


def _change(base: Evaluation, candidate: Evaluation, name: str, scored: Sequence[Scored]) -> Change:
    return Change(
        tests=tuple(found.tests[name] for found in scored),
        flips=tuple(_flips(ours, theirs) for ours, theirs in zip(base.scores, candidate.scores, strict=True)),
        fidelity=tuple(found.fidelity.get(name) for found in scored),
        smaller_on_disk=base.size.disk_bytes / candidate.size.disk_bytes,
        smaller_in_memory=base.size.memory_bytes / candidate.size.memory_bytes,
        fewer_weights=base.size.nonzero / max(candidate.size.nonzero, 1),
        faster=tuple(speedup(ours, theirs) for ours, theirs in zip(base.latency, candidate.latency, strict=True)),
        generation=tuple(
            generation_speedup(ours, theirs) for ours, theirs in zip(base.generation, candidate.generation, strict=True)
        ),
    )


def _flips(base: TaskScore, candidate: TaskScore) -> Flips | None:
    ours, theirs = base.right, candidate.right
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    same = [a.prediction == b.prediction for a, b in zip(base.examples, candidate.examples, strict=True)]
    return flips(ours, theirs, same)
