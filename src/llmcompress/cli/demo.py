"""The verb `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Threads


def demo(
    model: Annotated[str | None, typer.Option(help="folder or hub name; else the MiniLM encoder from PyPI")] = None,
    train: Annotated[str | None, typer.Option(help=".csv, .tsv, .jsonl file or hub data set, with labels")] = None,
    test: Annotated[str | None, typer.Option(help="the same, to measure on")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="more texts, without labels, to distil with")] = None,
    out: Annotated[Path, typer.Option(help="where report and model go")] = Path("demo-output"),
    cache: Annotated[Path | None, typer.Option(help="where trained stages are kept; else the user's cache")] = None,
    threads: Threads = None,
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
    from ..demo.job import run

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
