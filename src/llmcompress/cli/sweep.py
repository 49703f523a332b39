"""The verb `sweep`."""

from __future__ import annotations

import json as encoding
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import (
    Json,
    Model,
    Seed,
    Settings,
    Split,
    Threads,
    TokenizerFolder,
    check_endings,
    make_task,
    read_tokenizer,
    tell,
)


def sweep(
    model: Model,
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="[NAME=]recipe in YAML")],
    task: Annotated[str, typer.Option(metavar="NAME", help="that all are compared on: `llmcompress tasks`")],
    task_data: Annotated[str, typer.Option(metavar="DATA", help="what --task is scored on: a file or hub data set")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="stages and models; a second sweep there goes on")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="what steps calibrate on or train with: a file or hub data set")
    ] = None,
    data_split: Annotated[str, typer.Option(metavar="NAME", help="split of --data, if it is a hub data set")] = "train",
    split: Split = "test",
    settings: Settings = None,
    tokenizer: TokenizerFolder = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="recipes worked on at once")] = 1,
    on: Annotated[str, typer.Option(metavar="WHERE", help="processes of this machine, or ray")] = "processes",
    orders: Annotated[bool, typer.Option("--orders", help="one recipe: try its steps in every order allowed")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    latency: Annotated[bool, typer.Option(help="time the models")] = True,
    progress: Annotated[bool, typer.Option(help="show progress bars")] = True,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write the comparison as one HTML page")] = None,
    json: Json = None,
) -> None:
    """Run many recipes from one model, what they share once, and compare what they made.

    llmcompress sweep my-classifier recipes/*.yaml --data train.csv --task text_classification --task-data test.csv
    --out sweep --html sweep.html
    """
    check_endings({".json": json, ".html": html})
    from ..data import load_examples
    from ..evaluation.inference import threads_set_to
    from ..pipeline import Pipeline
    from ..sweeping.sweep import orders as run_orders
    from ..sweeping.sweep import sweep as run

    chains = {name: Pipeline.from_yaml(place) for name, place in _named(recipes).items()}
    if orders and len(chains) > 1:
        raise ConfigError(f"--orders must have one recipe, got {len(chains)}: {', '.join(chains)}.")
    asked = make_task(task, task_data, split, settings)
    where: Any = on
    shared: dict[str, Any] = {
        "data": None if data is None else load_examples(data, split=data_split),
        "tokenizer": read_tokenizer(tokenizer),
        "seed": seed,
        "folder": out,
        "workers": workers,
        "threads": threads,
        "latency": latency,
        "progress": progress,
    }
    with threads_set_to(threads):
        if orders:
            (chain,) = chains.values()
            found = run_orders(model, chain.steps, asked, **shared)
        else:
            found = run(model, chains, asked, on=where, **shared)
    document = {
        "comparison": found.comparison.to_dict(),
        "folders": {name: str(folder) for name, folder in found.folders.items()},
        "failed": dict(found.failed),
        "front": found.front(),
    }
    text = str(found)
    if html is not None:
        text += f"\nwrote {found.comparison.save(html)}"
    tell(text, encoding.dumps(document, indent=2), json)


def _named(recipes: Sequence[str]) -> dict[str, Path]:
    """Name recipes by what stands before `=`, else by their files.

    >>> sorted(_named(["recipes/int8.yaml", "small=other.yaml"]))
    ['int8', 'small']
    """
    named: dict[str, Path] = {}
    for recipe in recipes:
        name, equals, place = recipe.partition("=")
        if not equals or Path(recipe).exists():
            name, place = Path(recipe).stem, recipe
        if name in named:
            raise ConfigError(
                f"every recipe must have a name of its own, got {name!r} twice; write NAME={place} for one of them."
            )
        named[name] = Path(place)
    return named
