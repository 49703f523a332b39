"""The command line: `llmcompress VERB`, or `python -m llmcompress VERB`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import ClaimError, CompressionError, ConfigError

_CLAIM_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="llmcompress",
    help="Compress Hugging Face models, and prove what it cost and gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder or hub name")]
_TaskName = Annotated[
    str, typer.Option("--task", metavar="NAME", help="text_classification, language_modeling, ...: `llmcompress tasks`")
]
_Data = Annotated[
    str, typer.Option("--data", metavar="DATA", help=".csv, .tsv, .jsonl, .json or .txt file, or hub data set")
]
_Split = Annotated[str, typer.Option(metavar="NAME", help="split of a hub data set")]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="setting of the task, such as window=256; may be repeated"),
]
_Tokenizer = Annotated[str | None, typer.Option(metavar="FOLDER", help="tokenizer, where the model's folder has none")]
_BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="examples a batch, at most")]
_Latency = Annotated[bool, typer.Option(help="time the forward pass")]
_Memory = Annotated[bool, typer.Option("--memory", help="measure peak memory in a fresh process")]
_Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="threads of torch; else torch's own choice")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 for a failed claim, 2 for bad input, 130 for Ctrl-C."""
    from rich.console import Console
    from rich.markup import escape

    problems = Console(stderr=True)
    try:
        status = typer.main.get_command(app).main(args=argv, prog_name="llmcompress", standalone_mode=False)
    except ClaimError as error:
        problems.print(f"[bold red]failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return _CLAIM_FAILED
    except CompressionError as error:
        problems.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return _BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except Exception as error:
        # Usage errors: newer releases of typer have a click of their own, older ones raise click's.
        if not hasattr(error, "show"):
            raise
        error.show()
        return int(getattr(error, "exit_code", _BAD_INPUT))
    if status == _INTERRUPTED:  # which newer releases of typer return
        problems.print("\n[yellow]interrupted; nothing half-written[/]", highlight=False)
    return status if isinstance(status, int) else 0


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(f"llmcompress {__version__}")


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="folder or hub name; else the MiniLM encoder from PyPI")] = None,
    train: Annotated[str | None, typer.Option(help=".csv, .tsv, .jsonl file or hub data set, with labels")] = None,
    test: Annotated[str | None, typer.Option(help="the same, to measure on")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="more texts, without labels, to distil with")] = None,
    out: Annotated[Path, typer.Option(help="where report and model go")] = Path("demo-output"),
    cache: Annotated[Path | None, typer.Option(help="where trained stages are kept; else the user's cache")] = None,
    threads: _Threads = None,
    seed: Annotated[int, typer.Option(help="seeds data and training")] = 0,
    train_examples: Annotated[int | None, typer.Option(min=1, help="docstrings a package to train with")] = None,
    test_examples: Annotated[int | None, typer.Option(min=1, help="docstrings a package to measure on")] = None,
    unlabelled_examples: Annotated[int | None, typer.Option(min=0, help="docstrings a package to distil with")] = None,
    teacher_epochs: Annotated[float | None, typer.Option(help="passes over the data to fine-tune the teacher")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the data of each distillation")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="tokens a text is cut to")] = None,
) -> None:
    """Fine-tune, compress, compare and save a small model; no network, under 8 minutes on 2 cores.

    With --model, --train and --test it does the same on a model and data of yours.
    """
    from .demo.job import run

    asked: dict[str, Any] = {
        "train_examples": train_examples,
        "test_examples": test_examples,
        "unlabelled_examples": unlabelled_examples,
        "teacher_epochs": teacher_epochs,
        "epochs": epochs,
        "max_length": max_length,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    places: dict[str, Any] = {"train": train, "test": test, "unlabelled": unlabelled, "out": out, "cache": cache}
    run(model=model, **places, threads=threads, seed=seed, **given)


@app.command()
def support(
    architectures: Annotated[
        list[str] | None, typer.Argument(metavar="[ARCHITECTURE]...", help="patterns; all")
    ] = None,
    strategy: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="which strategies; all")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="causal-lm, classification, ...; all")
    ] = None,
    out: Annotated[Path, typer.Option(help="finished entries; a second run continues")] = Path("support.jsonl"),
    page: Annotated[Path | None, typer.Option(help="write the whole matrix as a Markdown page")] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="processes side by side")] = 2,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="for one strategy on one model")] = 120.0,
    retry: Annotated[
        list[str] | None, typer.Option(metavar="STATUS", help="try again what was failed, refused...")
    ] = None,
) -> None:
    """Try each strategy on a tiny model of every architecture in transformers; 1 if any result is wrong.

    llmcompress support llama 'qwen*' --task causal-lm
    """
    from .support.matrix import choose_jobs, run
    from .support.page import page as rendered
    from .support.page import totals

    jobs = choose_jobs(architectures or (), strategy or (), task or ())
    entries = run(jobs, out, workers=workers, timeout=timeout, retry=retry or ())
    typer.echo(totals(entries).text())
    for entry in entries:
        if entry.status == "failed":
            typer.echo(f"failed: {entry.task} {entry.architecture} {entry.strategy}: {entry.note}")
    if page is not None:
        page.write_text(rendered(entries), encoding="utf-8")
    if any(entry.status == "failed" for entry in entries):
        raise typer.Exit(_CLAIM_FAILED)


@app.command()
def tasks() -> None:
    """List the tasks, each with its settings."""
    from dataclasses import fields

    from .registry import tasks as known

    for name in known.list():
        task: Any = known.get(name)
        settings = [field.name for field in fields(task) if field.name not in {"data", "split", "tokenizer", "_"}]
        typer.echo(f"{name}: {(task.__doc__ or '').strip().splitlines()[0]}")
        typer.echo(f"    settings: {', '.join(settings) or 'none'}")


@app.command()
def evaluate(
    model: _Model,
    task: _TaskName,
    data: _Data,
    split: _Split = "test",
    settings: _Settings = None,
    tokenizer: _Tokenizer = None,
    batch_size: _BatchSize = 32,
    latency: _Latency = True,
    memory: _Memory = False,
    threads: _Threads = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="also write everything as JSON")] = None,
) -> None:
    """Measure the quality, size and speed of a model."""
    from .evaluation.evaluate import evaluate as measure
    from .evaluation.inference import threads_set_to

    _check_endings({".json": json})
    asked = _make_task(task, data, split, settings)
    with threads_set_to(threads):
        found = measure(
            model, asked, tokenizer=_tokenizer(tokenizer), batch_size=batch_size, latency=latency, memory=memory
        )
    typer.echo(str(found))
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(found.to_json(), encoding="utf-8")


@app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="[NAME=]folder or hub name")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE...", help="[NAME=]folder or hub name")],
    task: _TaskName,
    data: _Data,
    split: _Split = "test",
    settings: _Settings = None,
    tokenizer: _Tokenizer = None,
    batch_size: _BatchSize = 32,
    latency: _Latency = True,
    memory: _Memory = False,
    threads: _Threads = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write the report as one HTML page")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="write it in Markdown")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="write everything as JSON")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="write one row a model as CSV")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="exit with 1 if it holds for a candidate: 'accuracy_drop>0.01'"),
    ] = None,
) -> None:
    """Measure base and candidates side by side, and compare each candidate with the base."""
    from .claims import Condition
    from .comparison import compare as measure
    from .evaluation.inference import threads_set_to

    conditions = [Condition.parse(text) for text in fail_if or ()]
    places = {".html": html, ".md": markdown, ".json": json, ".csv": csv}
    _check_endings(places)
    asked = _make_task(task, data, split, settings)
    with threads_set_to(threads):
        found = measure(
            _named([base, *candidates]),
            asked,
            tokenizer=_tokenizer(tokenizer),
            batch_size=batch_size,
            latency=latency,
            memory=memory,
        )
    typer.echo(str(found))
    for place in places.values():
        if place is not None:
            typer.echo(f"wrote {found.save(place)}")
    failed = [
        f"{entry.name}: {condition} holds, it is {condition.value(found, entry):.4g}"
        for entry in found.candidates
        for condition in conditions
        if condition.holds(found, entry)
    ]
    if failed:
        raise ClaimError("; ".join(failed) + ".")


def _make_task(name: str, data: str, split: str, settings: Sequence[str] | None) -> Any:
    from dataclasses import fields

    import yaml

    from .errors import did_you_mean
    from .registry import tasks as known

    task: Any = known.get(name)
    allowed = {field.name for field in fields(task)} - {"data", "split", "tokenizer"}
    given: dict[str, Any] = {"split": split}
    for text in settings or ():
        field, equals, value = text.partition("=")
        if not equals or field not in allowed:
            raise ConfigError(
                f"--set must be FIELD=VALUE with a field of {name}, got {text!r}{did_you_mean(field, allowed) or '.'} "
                f"It has: {', '.join(sorted(allowed))}."
            )
        try:
            given[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {field} must be a YAML value, got {value!r}.") from error
    return task(data, **given)


def _tokenizer(folder: str | None) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    from .errors import CheckpointError

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--tokenizer {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Name models by what stands before `=`, else by the last part of their path.

    >>> _named(["models/bert", "small=out/model"])
    {'bert': 'models/bert', 'small': 'out/model'}
    """
    named: dict[str, str] = {}
    for source in sources:
        name, equals, folder = source.partition("=")
        if not equals or Path(source).exists():
            name, folder = Path(source).name or source, source
        if name in named:
            raise ConfigError(
                f"every model must have a name of its own, got {name!r} twice; write NAME={folder} for one of them."
            )
        named[name] = folder
    return named


def _check_endings(places: dict[str, Path | None]) -> None:
    for ending, place in places.items():
        if place is not None and place.suffix.lower() != ending:
            raise ConfigError(f"the file must end in {ending}, got {str(place)!r}.")
