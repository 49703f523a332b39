"""The verb `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, Model, Recipe, Seed, TokenizerFolder, check_endings, read_tokenizer, tell


def plan(
    model: Model,
    recipe: Recipe,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="what the steps will be given: a file or hub data set")
    ] = None,
    data_split: Annotated[str, typer.Option(metavar="NAME", help="split of --data, if it is a hub data set")] = "train",
    tokenizer: TokenizerFolder = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Tell what a recipe would do to a model, and how big the result would be; no weight is read.

    llmcompress plan my-llama --recipe recipes/llama-gptq-4bit.yaml --data train.txt
    """
    check_endings({".json": json})
    from ..data import load_examples
    from ..pipeline import Pipeline
    from ..planning.plan import plan as look_ahead

    chain = Pipeline.from_yaml(recipe)
    found = look_ahead(
        model,
        chain.steps,
        recover=chain.recover,
        data=None if data is None else load_examples(data, split=data_split),
        tokenizer=read_tokenizer(tokenizer),
        seed=seed,
    )
    tell(str(found), found.model_dump_json(indent=2), json)
