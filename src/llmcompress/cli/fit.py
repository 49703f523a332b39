"""The verb `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .options import (
    PRINTED,
    DataSplit,
    Json,
    Model,
    Progress,
    Seed,
    Settings,
    Split,
    TaskData,
    Threads,
    TokenizerFolder,
    check_endings,
    check_folder,
    make_task,
    read_data,
    read_tokenizer,
    tell,
)

_NOT_MET = 1


def fit(
    model: Model,
    task: Annotated[str, typer.Option(metavar="NAME", help="what it must still be good at: `llmcompress tasks`")],
    task_data: TaskData,
    data: Annotated[str, typer.Option(metavar="DATA", help="what is trained with: a file or hub data set")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="where the model goes, and recipe.yaml")],
    size: Annotated[str | None, typer.Option(metavar="BYTES", help="at most so big on disk: '12 MB'")] = None,
    latency: Annotated[str | None, typer.Option(metavar="TIME", help="a pass takes at most so long: '3 ms'")] = None,
    speedup: Annotated[float | None, typer.Option(metavar="X", help="at least so many times faster")] = None,
    max_drop: Annotated[float, typer.Option(metavar="LOSS", help="of the task's metric, in its own unit")] = 0.01,
    budget: Annotated[str, typer.Option(metavar="TIME", help="for all of it: '10 min'")] = "10 min",
    shape: Annotated[str, typer.Option(metavar="ROWSxTOKENS", help="at which time is measured")] = "1x128",
    data_split: DataSplit = "train",
    split: Split = "test",
    settings: Settings = None,
    tokenizer: TokenizerFolder = None,
    seed: Seed = 0,
    threads: Threads = None,
    progress: Progress = True,
    json: Json = None,
) -> None:
    """Find the steps that make a model so small or so fast, and lose least; 1 if it cannot be, with the nearest.

    llmcompress fit my-classifier --size "12 MB" --max-drop 0.01 --data train.csv --task text_classification
    --task-data test.csv --out small
    """
    check_endings({".json": json})
    from ..evaluation.inference import threads_set_to
    from ..fitting.fit import fit as run

    check_folder(out)
    if json not in (None, PRINTED) and json.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--json {json} must not be inside of --out {out}, which is written as a whole.")
    asked = make_task(task, task_data, split, settings)
    with threads_set_to(threads):
        found = run(
            model,
            asked,
            read_data(data, data_split),
            size=size,
            latency=latency,
            speedup=speedup,
            max_drop=max_drop,
            budget=budget,
            shape=_shape(shape),
            tokenizer=read_tokenizer(tokenizer),
            seed=seed,
            progress=progress,
        )
    found.save_pretrained(out)
    tell(f"{found}\nwrote {out}", found.to_json(), json)
    if not found.met:
        raise typer.Exit(_NOT_MET)


def _shape(given: str) -> tuple[int, int]:
    """Read rows and tokens.

    >>> _shape("8x128")
    (8, 128)
    """
    rows, _, tokens = given.partition("x")
    if not rows.isdecimal() or not tokens.isdecimal():
        raise ConfigError(f"--shape must be ROWSxTOKENS such as 1x128, got {given!r}.")
    return int(rows), int(tokens)
