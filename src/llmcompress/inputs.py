"""What a run is given, held against what its steps need, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .anatomy.module_sizes import quantized_by
from .compressor import Compressor
from .data import Example, find_tokenizer, load_examples
from .errors import ConfigError, MissingInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation.tasks import Task


def refuse_other_kinds(who: str, model: Any, task: Any, seed: Any) -> None:
    """Refuse arguments of another kind than the caller documents.

    Raises:
        ConfigError: naming the argument.
    """
    import transformers

    from .evaluation.tasks import Task

    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"{who}() must have a transformers model, a folder or a name on the hub as model, got {model!r:.80}."
        )
    if task is not None and not isinstance(task, Task):
        raise ConfigError(f"{who}() must have a task such as lc.TextClassification(data), got task={task!r:.80}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"{who}() must have a whole number as seed, got {seed!r:.80}.")


def refuse_quantized(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are no longer float.

    Raises:
        UnsupportedModelError: naming the method that it is quantized by.
    """
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
    """
    examples = load_examples(data) if data is not None else None
    for step in steps:
        who = type(step).__name__
        if "data" in step.needs and examples is None:
            raise MissingInputError(f"{who} needs data; pass data=[...], for instance 128 texts and a tokenizer.")
        if "labels" in step.needs and examples is not None:
            bare = next((index for index, example in enumerate(examples) if example.label is None), None)
            if bare is not None:
                raise MissingInputError(f"{who} needs labels, and data[{bare}] has none; pass (text, label) pairs.")
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
