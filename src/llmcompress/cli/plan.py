"""The verb `plan`."""

from __future__ import annotations

from .options import (
    DataSplit,
    Json,
    Model,
    Recipe,
    Seed,
    StepData,
    TokenizerFolder,
    check_endings,
    read_data,
    read_tokenizer,
    tell,
)


def plan(
    model: Model,
    recipe: Recipe,
    data: StepData = None,
    data_split: DataSplit = "train",
    tokenizer: TokenizerFolder = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Tell what a recipe would do to a model, and how big the result would be; no weight is read.

    llmcompress plan my-llama --recipe recipes/llama-gptq-4bit.yaml --data train.txt
    """
    check_endings({".json": json})
    from ..pipeline import Pipeline
    from ..planning.plan import plan as look_ahead

    chain = Pipeline.from_yaml(recipe)
    found = look_ahead(
        model,
        chain.steps,
        recover=chain.recover,
        data=read_data(data, data_split),
        tokenizer=read_tokenizer(tokenizer),
        seed=seed,
    )
    tell(str(found), found.model_dump_json(indent=2), json)
