"""The verbs `evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ClaimError, ConfigError, did_you_mean
from .options import (
    PRINTED,
    BatchSize,
    Data,
    Html,
    Json,
    Model,
    Settings,
    Split,
    TaskName,
    Threads,
    TokenizerFolder,
    check_endings,
    make_task,
    name_places,
    read_tokenizer,
    tell,
)

if TYPE_CHECKING:
    from ..claims import Condition
    from ..evaluation.tasks import Task

_Latency = Annotated[bool, typer.Option(help="time the forward pass")]
_Memory = Annotated[bool, typer.Option("--memory", help="measure peak memory in a fresh process")]


def evaluate(
    model: Model,
    task: TaskName,
    data: Data,
    split: Split = "test",
    settings: Settings = None,
    tokenizer: TokenizerFolder = None,
    batch_size: BatchSize = 32,
    latency: _Latency = True,
    memory: _Memory = False,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure the quality, size and speed of a model.

    llmcompress evaluate my-classifier --task text_classification --data test.csv
    """
    from ..evaluation.evaluate import evaluate as measure
    from ..evaluation.inference import threads_set_to

    check_endings({".json": json})
    asked = make_task(task, data, split, settings)
    with threads_set_to(threads):
        found = measure(
            model, asked, tokenizer=read_tokenizer(tokenizer), batch_size=batch_size, latency=latency, memory=memory
        )
    tell(str(found), found.to_json(), json)


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="[NAME=]folder or hub name")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE...", help="[NAME=]folder or hub name")],
    task: TaskName,
    data: Data,
    split: Split = "test",
    settings: Settings = None,
    tokenizer: TokenizerFolder = None,
    batch_size: BatchSize = 32,
    latency: _Latency = True,
    memory: _Memory = False,
    threads: Threads = None,
    html: Html = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="write it in Markdown")] = None,
    json: Json = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="write one row a model as CSV")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="exit with 1 if it holds for a candidate: 'accuracy_drop>0.01'"),
    ] = None,
) -> None:
    """Measure base and candidates side by side, and compare each candidate with the base.

    llmcompress compare fp32 int8 --task text_classification --data test.csv --fail-if 'accuracy_drop>0.01'
    """
    from ..claims import Condition
    from ..comparison import compare as measure
    from ..evaluation.inference import threads_set_to

    conditions = [Condition.parse(text) for text in fail_if or ()]
    places = {".html": html, ".md": markdown, ".json": json, ".csv": csv}
    check_endings(places)
    asked = make_task(task, data, split, settings)
    _check_numbers(conditions, asked, latency)
    with threads_set_to(threads):
        found = measure(
            name_places([base, *candidates], "model", lambda place: place.name),
            asked,
            tokenizer=read_tokenizer(tokenizer),
            batch_size=batch_size,
            latency=latency,
            memory=memory,
        )
    typer.echo(found.to_json() if json == PRINTED else str(found))
    for place in places.values():
        if place is not None and place != PRINTED:
            typer.echo(f"wrote {found.save(place)}", err=json == PRINTED)
    failed = [
        condition.told(found, entry)
        for entry in found.candidates
        for condition in conditions
        if condition.holds(found, entry)
    ]
    if failed:
        raise ClaimError("; ".join(failed) + ".")


def _check_numbers(conditions: Sequence[Condition], task: Task, latency: bool) -> None:
    """Refuse conditions on numbers that the comparison cannot have, before anything is measured."""
    from ..evaluation.tasks import ForwardTask

    for condition in conditions:
        if condition.name == "speedup" and not latency:
            raise ConfigError(f"--fail-if '{condition}' needs times, which --no-latency leaves out; drop one of them.")
        if task.metric_names is None:  # only the run tells them
            continue
        metrics = [f"{name}{ending}" for name in task.metric_names for ending in ("", "_drop", "_ratio")]
        known = [*metrics, "smaller", "speedup", *(("agreement", "kl") if isinstance(task, ForwardTask) else ())]
        if condition.name not in known:
            hint = did_you_mean(condition.name, known) or "."
            raise ConfigError(
                f"--fail-if must be about a number of the comparison, got {condition.name!r}{hint} "
                f"There may be: {', '.join(known)}."
            )
