"""Where other models come from, students and teachers alike: a folder, a name on the hub, or a model in memory.

What a model is can be asked before its weights are read (`empty_of`), and without reading them into a model at all
(`digest_of`), so that everything that cannot work is refused before any work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import transformers
from transformers.models.auto import modeling_auto

from ..anatomy.digest import config_content, model_digest
from ..anatomy.empty import empty_of_class
from ..errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class InMemory:
    """A model that the caller holds, as a field of a step: two are equal where they are the same object.

    A recipe cannot hold it; there it is a dict of its class and the hash of its weights, which no step can be made of.
    The hash is taken anew each time, since the caller may have changed the weights.

    Args:
        model: any transformers model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def digest(self) -> str:
        """The hash of config and weights."""
        return model_digest(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMemory) and self.model is other.model

    def __hash__(self) -> int:
        return id(self.model)

    def __repr__(self) -> str:
        return f"<{type(self.model).__name__} in memory>"


def told(field: Any) -> Any:
    """Return what a recipe says of a field that may hold models: their names, or what they were in memory."""
    if isinstance(field, InMemory):
        return {"in_memory": type(field.model).__name__, "sha256": field.digest}
    if isinstance(field, Mapping) and (held := [source for source in field if isinstance(source, InMemory)]):
        names = " and ".join(type(source.model).__name__ for source in held)
        weighted = [{"source": told(source), "weight": weight} for source, weight in field.items()]
        return {"in_memory": names, "weighted": weighted}
    return [told(entry) for entry in field] if isinstance(field, (list, tuple)) else field


Source: TypeAlias = str | InMemory


def read_source(value: Any, field: str) -> Source:
    """Return a model's source from what the user gave.

    Args:
        value: a folder, a name on the hub, or a model.
        field: whose value it is, for messages.

    Raises:
        ConfigError: it is none of these, or what a recipe tells of a model in memory.
    """
    if isinstance(value, InMemory):
        return value
    if isinstance(value, transformers.PreTrainedModel):
        return InMemory(value)
    if isinstance(value, Mapping) and "in_memory" in value:
        raise ConfigError(
            f"{field} was a {value['in_memory']} in memory when the recipe was written, which no recipe can hold; pass "
            f"the model again, or a folder that it was saved to."
        )
    if isinstance(value, (str, os.PathLike)) and str(value).strip():
        return os.fspath(value)
    raise ConfigError(f"{field} must be a folder, a name on the hub or a transformers model, got {value!r:.80}.")


def config_of(source: Source, field: str) -> PreTrainedConfig:
    """Return the config of a model; no weight is read.

    Raises:
        ConfigError: there is no such folder or name.
    """
    if isinstance(source, InMemory):
        return source.model.config
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field} must be a folder with a model, or a name on the hub, got {source!r}: {error}"
        ) from error


def empty_of(source: Source, field: str) -> PreTrainedModel:
    """Return the model without weights, of the class that it was saved as; one in memory as it is.

    Raises:
        ConfigError: there is no such folder or name, or it names no class of transformers.
    """
    if isinstance(source, InMemory):
        return source.model
    config = config_of(source, field)
    return empty_of_class(_saved_class(config, field, source), config)


def load_source(source: Source, field: str) -> PreTrainedModel:
    """Return the model in eval mode, of the class that it was saved as and in the dtype that it was saved in.

    Raises:
        ConfigError: there is no such folder or name.
        UnsupportedModelError: its weights do not fill it.
    """
    if isinstance(source, InMemory):
        return source.model
    cls = _saved_class(config_of(source, field), field, source)
    model, missing = _load(cls, source, field, dtype="auto")
    if missing:
        raise UnsupportedModelError(
            f"{field}={source!r} has no weights for {', '.join(missing[:4])} of {cls.__name__}; it must be trained for "
            f"this task."
        )
    return model


def load_with_head(source: str, field: str, *, like: PreTrainedModel) -> tuple[PreTrainedModel, list[str]]:
    """Load the body that a folder or hub name holds under the kind of head that `like` has, in float32.

    Labels are those of `like`. A head that the folder does not have is drawn at random.

    Returns:
        The model in eval mode, and the parameters that were drawn.
    """
    auto = auto_class(like)
    kept = ("id2label", "label2id", "problem_type") if auto.__name__ in LABELLED else ()
    return _load(auto, source, field, dtype="float32", **{name: getattr(like.config, name) for name in kept})


def auto_class(model: PreTrainedModel) -> Any:
    """Return the auto class of transformers that loads models with this one's kind of head.

    Raises:
        UnsupportedModelError: there is none.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> auto_class(tiny_model("gpt2")).__name__
        'AutoModelForCausalLM'
    """
    for name, mapping in _HEADS.items():
        classes = getattr(modeling_auto, mapping).values()
        if any(type(model).__name__ in ((entry,) if isinstance(entry, str) else entry) for entry in classes):
            return getattr(transformers, name)
    raise UnsupportedModelError(
        f"another model with the head of {type(model).__name__} must be loaded by one of {', '.join(_HEADS)}, and none "
        f"of them knows it; pass the student as a model."
    )


def digest_of(source: Source, field: str) -> str:
    """Return a hash of config and weights; of a folder it is read from the files, without making a model of them.

    The same model has one hash in memory and another as a folder.
    """
    if isinstance(source, InMemory):
        return source.digest
    digest = hashlib.sha256(config_content(config_of(source, field)).encode())
    files = sorted(_local(source).glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{field} must be a model in safetensors files, and {source!r} has none; save it again.")
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside a model, or None where there is none."""
    name = source.model.config._name_or_path if isinstance(source, InMemory) else source
    try:
        folder = _local(name)
    except OSError:
        return None
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return transformers.AutoTokenizer.from_pretrained(folder)


LABELLED = frozenset({"AutoModelForSequenceClassification", "AutoModelForTokenClassification"})
"""The heads whose outputs are the labels that a config names."""

_CHUNK = 1 << 20


def reads_alike(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Tell whether two tokenizers know the same tokens by the same ids.

    Example:
        >>> from llmcompress.testing import tiny_tokenizer
        >>> reads_alike(tiny_tokenizer(), tiny_tokenizer())
        True
    """
    return first is second or first.get_vocab() == second.get_vocab()


# Kinds of heads that distillation knows, and where transformers lists the classes that have them.
_HEADS = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


def _saved_class(config: PreTrainedConfig, field: str, source: str) -> Any:
    names = config.architectures or ()
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ConfigError(f"{field} must name a class of transformers in config.json, and {source!r} has {names!r}.")
    return cls


def _load(cls: Any, source: str, field: str, **how: Any) -> tuple[PreTrainedModel, list[str]]:
    try:
        with _silent():
            model, info = cls.from_pretrained(source, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{field}={source!r} cannot be loaded by {cls.__name__}: {type(error).__name__}: {error}"
        ) from error
    return model.eval(), sorted(info["missing_keys"])


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers' report of missing weights and its bar off the terminal; who loads tells what matters."""
    verbosity, shown = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()


def _local(name: str) -> Path:
    """Return the folder in which the files of a model lie.

    Raises:
        OSError: there is none.
    """
    if not name:
        raise FileNotFoundError("a model that was never saved has no folder")
    if Path(name).is_dir():
        return Path(name)
    return Path(transformers.utils.cached_file(name, "config.json")).parent
