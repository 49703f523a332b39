"""The verb `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .options import (
    Json,
    Model,
    Recipe,
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


def compress(
    model: Model,
    recipe: Recipe,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="where the compressed model goes")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="what steps calibrate on or train with: a file or hub data set")
    ] = None,
    data_split: Annotated[str, typer.Option(metavar="NAME", help="split of --data, if it is a hub data set")] = "train",
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="scored before and after every step: `llmcompress tasks`")
    ] = None,
    task_data: Annotated[
        str | None, typer.Option(metavar="DATA", help="what --task is scored on: a file or hub data set")
    ] = None,
    split: Split = "test",
    settings: Settings = None,
    tokenizer: TokenizerFolder = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="keeps finished stages; the same command goes on behind them")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    progress: Annotated[bool, typer.Option(help="show progress bars")] = True,
    json: Json = None,
) -> None:
    """Compress a model by a recipe, and write a folder that plain `from_pretrained` loads.

    llmcompress compress my-classifier --recipe recipes/bert-cpu-serving.yaml --out small

    llmcompress compress my-llama --recipe recipes/llama-gptq-4bit.yaml --data train.txt --out small
    --task language_modeling --task-data test.txt --set window=256 --resume stages
    """
    check_endings({".json": json})
    if (task is None) != (task_data is None):
        raise ConfigError("compress must have --task NAME and --task-data DATA together, or neither; got one of them.")
    from ..checkpoint import refuse_foreign
    from ..data import load_examples
    from ..evaluation.inference import threads_set_to
    from ..pipeline import Pipeline
    from ..pipeline import compress as run

    chain = Pipeline.from_yaml(recipe)
    refuse_foreign(out)  # now, and not when hours of work are to be written
    asked = None if task is None or task_data is None else make_task(task, task_data, split, settings)
    examples = None if data is None else load_examples(data, split=data_split)
    with threads_set_to(threads):
        result = run(
            model,
            chain.steps,
            recover=chain.recover,
            data=examples,
            tokenizer=read_tokenizer(tokenizer),
            task=asked,
            seed=seed,
            resume_dir=resume,
            progress=progress,
        )
    result.save_pretrained(out)
    tell(f"{result}\nwrote {out}", result.report.model_dump_json(indent=2), json)
