"""The verb `sweep`."""

from __future__ import annotations

import json as encoding
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import (
    DataSplit,
    Html,
    Json,
    Model,
    Progress,
    Seed,
    Settings,
    Split,
    StepData,
    TaskData,
    Threads,
    TokenizerFolder,
    check_endings,
    make_task,
    name_places,
    read_data,
    read_tokenizer,
    tell,
)


def sweep(
    model: Model,
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="[NAME=]recipe in YAML")],
    task: Annotated[str, typer.Option(metavar="NAME", help="that all are compared on: `llmcompress tasks`")],
    task_data: TaskData,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="stages and models; a second sweep there goes on")],
    data: StepData = None,
    data_split: DataSplit = "train",
    split: Split = "test",
    settings: Settings = None,
    tokenizer: TokenizerFolder = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="recipes worked on at once")] = 1,
    on: Annotated[str, typer.Option(metavar="WHERE", help="processes of this machine, or ray")] = "processes",
    orders: Annotated[bool, typer.Option("--orders", help="one recipe: try its steps in every order allowed")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    latency: Annotated[bool, typer.Option(help="time the models")] = True,
    progress: Progress = True,
    html: Html = None,
    json: Json = None,
) -> None:
    """Run many recipes from one model, what they share once, and compare what they made.

    llmcompress sweep my-classifier recipes/*.yaml --data train.csv --task text_classification --task-data test.csv
    --out sweep --html sweep.html
    """
    check_endings({".json": json, ".html": html})
    from ..evaluation.inference import threads_set_to
    from ..pipeline import Pipeline
    from ..sweeping.sweep import orders as run_orders
    from ..sweeping.sweep import sweep as run

    places = name_places(recipes, "recipe", lambda place: place.stem)
    chains = {name: Pipeline.from_yaml(place) for name, place in places.items()}
    if orders and len(chains) > 1:
        raise ConfigError(f"--orders must have one recipe, got {len(chains)}: {', '.join(chains)}.")
    asked = make_task(task, task_data, split, settings)
    shared: dict[str, Any] = {
        "data": read_data(data, data_split),
        "tokenizer": read_tokenizer(tokenizer),
        "seed": seed,
        "folder": out,
        "workers": workers,
        "on": on,
        "threads": threads,
        "latency": latency,
        "progress": progress,
    }
    with threads_set_to(threads):
        if orders:
            (chain,) = chains.values()
            found = run_orders(model, chain, asked, **shared)
        else:
            found = run(model, chains, asked, **shared)
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
