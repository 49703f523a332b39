"""The verb `compress`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, GateError
from .options import (
    DataSplit,
    Json,
    Model,
    Progress,
    Recipe,
    Seed,
    Settings,
    Split,
    StepData,
    Threads,
    TokenizerFolder,
    check_endings,
    check_folder,
    make_task,
    read_data,
    read_tokenizer,
    tell,
)

if TYPE_CHECKING:
    from ..gates import Gate


class OnFail(str, Enum):
    """The choices of `--on-fail`: those of `lc.compress`."""

    rollback = "rollback"
    stop = "stop"
    warn = "warn"


def compress(
    model: Model,
    recipe: Recipe,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="where the compressed model goes")],
    data: StepData = None,
    data_split: DataSplit = "train",
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
    max_drop: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=NUMBER", help="gate: what each stage may lose of it, accuracy=0.01; repeatable"),
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(metavar="RATIO", help="gate: perplexity over the base's, such as 1.05")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(metavar="SHARE", help="gate: answers that are the base's, such as 0.95")
    ] = None,
    on_fail: Annotated[
        OnFail, typer.Option(help="at a failed gate: keep the stage before it, write nothing, or go on and tell")
    ] = OnFail.rollback,
    progress: Progress = True,
    json: Json = None,
) -> None:
    """Compress a model by a recipe, and write a folder that plain `from_pretrained` loads.

    llmcompress compress my-classifier --recipe recipes/bert-cpu-serving.yaml --out small

    llmcompress compress my-llama --recipe recipes/llama-gptq-4bit.yaml --data train.txt --out small
    --task language_modeling --task-data test.txt --set window=256 --max-perplexity-ratio 1.05 --resume stages

    A stage that fails a gate gives status 1, but with --on-fail warn.
    """
    check_endings({".json": json})
    if (task is None) != (task_data is None):
        raise ConfigError("compress must have --task NAME and --task-data DATA together, or neither; got one of them.")
    if task is None and settings:
        raise ConfigError(f"--set {settings[0]} is a setting of a task; pass --task NAME --task-data DATA, or drop it.")
    from ..evaluation.inference import threads_set_to
    from ..gates import failures
    from ..pipeline import Pipeline
    from ..pipeline import compress as run

    gates = _gates(max_drop or (), max_perplexity_ratio, min_agreement)
    if gates and task is None:
        raise ConfigError("a gate needs a task to measure on; pass --task NAME --task-data DATA.")
    if on_fail is not OnFail.rollback and not gates:
        raise ConfigError(
            f"--on-fail {on_fail.value} needs a gate that can fail; pass --max-drop, --max-perplexity-ratio or "
            "--min-agreement, or drop it."
        )
    chain = Pipeline.from_yaml(recipe)
    check_folder(out)
    for name, place in (("--resume", resume), ("--json", json)):
        if place is not None and place.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{name} {place} must not be inside of --out {out}, which is written as a whole.")
    asked = None if task is None or task_data is None else make_task(task, task_data, split, settings)
    examples = read_data(data, data_split)
    with threads_set_to(threads):
        result = run(
            model,
            chain.steps,
            recover=chain.recover,
            data=examples,
            tokenizer=read_tokenizer(tokenizer),
            task=asked,
            gates=gates,
            on_fail=on_fail.value,
            seed=seed,
            resume_dir=resume,
            progress=progress,
        )
    result.save_pretrained(out)
    tell(f"{result}\nwrote {out}", result.report.model_dump_json(indent=2), json)
    undone = result.report.rolled_back
    if undone is not None:
        raise GateError(f"{undone.step['name']}: {failures(undone.verdicts)}; {out} holds the stage before it.")


def _gates(max_drop: Sequence[str], max_perplexity_ratio: float | None, min_agreement: float | None) -> list[Gate]:
    from ..gates import MaxDrop, MaxPerplexityRatio, MinAgreement

    found: list[Gate] = []
    for text in max_drop:
        metric, equals, number = text.partition("=")
        if not equals:
            raise ConfigError(f"--max-drop must be METRIC=NUMBER, such as accuracy=0.01, got {text!r}.")
        found.append(MaxDrop(metric=metric, drop=number))
    if max_perplexity_ratio is not None:
        found.append(MaxPerplexityRatio(ratio=max_perplexity_ratio))
    if min_agreement is not None:
        found.append(MinAgreement(share=min_agreement))
    return found
