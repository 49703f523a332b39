"""What a run is given, held against what its steps need, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .anatomy.module_sizes import quantized_by
from .class_labels import by_class_names
from .compressor import Compressor
from .data import LABELLED, Example, find_tokenizer, load_examples
from .errors import ConfigError, MissingInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation.tasks import Task


def check_model(model: Any, field: str = "model") -> None:
    """Refuse what is neither a model nor a place where one is; `field` is what the message calls it.

    Raises:
        ConfigError: naming what it is.
    """
    from transformers import PreTrainedModel

    if isinstance(model, (PreTrainedModel, str, Path)):
        return
    # What torch and peft wrap models in, and where these are inside.
    inside = next(
        (name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), PreTrainedModel)), ""
    )
    way = f"pass model.{inside}" if inside else ""
    if hasattr(model, "merge_and_unload"):
        way = "pass model.merge_and_unload()"
    what = f"a {type(model).__name__}; {way}" if way else f"{model!r:.80}"
    raise ConfigError(f"{field} must be a transformers model, a folder or a hub name, got {what}.")


def check_task(task: Any, field: str) -> None:
    """Refuse what is no task.

    Raises:
        ConfigError: naming what it is.
    """
    from .evaluation.tasks import Task

    if not isinstance(task, Task):
        raise ConfigError(f"{field} must be a Task, got {task!r:.80}; for instance TextClassification('test.csv').")


def check_seed(seed: Any, field: str = "seed") -> None:
    """Refuse what no random state can be drawn from.

    Raises:
        ConfigError: naming what it is.
    """
    # numpy takes no more than 32 bits.
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ConfigError(f"{field} must be an integer in [0, 2**32), got {seed!r:.80}.")


def refuse_unready(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are no longer float, or are not all in it.

    Raises:
        UnsupportedModelError: naming the method that it is quantized by, or its adapters.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters of peft ({', '.join(model.peft_config)}), and save_pretrained "
            f"writes them alone; merge them first: PeftModel.from_pretrained(base, folder).merge_and_unload()."
        )
    method = quantized_by(model)
    if method is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is already quantized ({method}); start from the float model and put quantization "
            f"last."
        )


def check_inputs(
    model: PreTrainedModel,
    steps: Sequence[Compressor],
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task | None,
    inplace: bool,
) -> tuple[list[Example] | None, PreTrainedTokenizerBase | None]:
    """Collect what the steps need, or say which step misses what.

    Raises:
        MissingInputError: data, labels, the teacher or a tokenizer is needed and missing.
        ConfigError: the data's names of classes are only in part the model's.
    """
    if tokenizer is not None:
        tokenizer = find_tokenizer(model, tokenizer, who="tokenizer")
    examples = by_class_names(load_examples(data), model) if data is not None else None
    for step in steps:
        who = type(step).__name__
        if "data" in step.needs and examples is None:
            raise MissingInputError(f"{who} needs data; pass data=[...], for instance 128 texts and a tokenizer.")
        if "labels" in step.needs and examples is not None:
            bare = next((index for index, example in enumerate(examples) if example.label is None), None)
            if bare is not None:
                raise MissingInputError(f"{who} needs labels, and data[{bare}] has none; pass {LABELLED}.")
        if "teacher" in step.needs and inplace:
            raise MissingInputError(
                f"{who} needs the original as teacher, which inplace=True overwrites; drop inplace."
            )
        if "tokenizer" in step.needs:
            tokenizer = find_tokenizer(model, tokenizer, who=who)
    if task is not None and getattr(task, "tokenizer", None) is None:
        tokenizer = find_tokenizer(model, tokenizer, who=type(task).__name__)
    if tokenizer is None:
        # Nobody needs it now, but the saved folder is more useful with the tokenizer in it.
        try:
            tokenizer = find_tokenizer(model, who="save_pretrained")
        except MissingInputError:
            tokenizer = None
    return examples, tokenizer
