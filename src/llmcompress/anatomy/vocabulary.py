"""Keep some of a model's tokens: which rows of which tensors they are, and every token id that a config names.

Which tensors have a vocabulary axis is found by trial, not by a table of model names: the model's class is built
without memory (on the meta device) from a config with another vocabulary size, and what changed its shape has the axis:
the embedding, the head, the head's bias, whatever the architecture calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..compressor import Cut
from ..errors import UnsupportedModelError
from .sizes import Shapes, Values, adopt_config, build, shapes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of config fields that hold token ids and do not say so by "token_id".
_NAMED_IDS = ("pad_index", "bos_index", "eos_index", "unk_index", "mask_index")
# Tokens that a model shall not write, or may: a token that is gone needs no rule.
_RULES = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")


@dataclass(frozen=True)
class VocabularyChange:
    """What `keep_tokens` would change.

    Attributes:
        embedding: path of the input embedding.
        axes: the axis of the vocabulary, by state-dict name of each tensor that has one; tied tensors under each name.
        of: rows before the cut.
        values: config attributes with their new values: the size, and every token id.
        shapes: of all tensors after the cut, by state-dict name.
    """

    embedding: str
    axes: dict[str, int]
    of: int
    values: Values
    shapes: Shapes


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows an embedding needs for all tokens; more than there are tokens, where their ids have holes.

    Example:
        >>> from llmcompress.testing import tiny_tokenizer
        >>> rows_needed(tiny_tokenizer())
        128
    """
    return 1 + max(tokenizer.get_vocab().values())


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many tokens the input embedding has a row for; it may be padded beyond the tokenizer's tokens.

    Raises:
        UnsupportedModelError: the model reads no token ids through one embedding.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> vocabulary_size(tiny_model("gpt2"))
        128
    """
    return _embedding(model)[1].num_embeddings


def plan_vocabulary(model: PreTrainedModel, kept: Sequence[int]) -> VocabularyChange:
    """Find out which tensors and config fields change if only the tokens `kept` (ascending ids) stay.

    Reads no weight and changes nothing.

    Raises:
        UnsupportedModelError: no config field sets the size of the vocabulary.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> change = plan_vocabulary(tiny_model("llama"), range(100))
        >>> change.values["vocab_size"], change.axes
        (100, {'model.embed_tokens.weight': 0, 'lm_head.weight': 0})
    """
    path, table = _embedding(model)
    old, new = table.num_embeddings, len(kept)
    sizes = {
        name: new
        for name, value in _fields(model.config)
        if type(value) is int and value == old and "vocab" in name.rpartition(".")[2]
    }
    places = {token: index for index, token in enumerate(kept)}
    ids = {name: moved for name, value in _fields(model.config) if (moved := _moved(name, value, places, old)) != value}
    before = shapes_of(model)
    # Sizes that no config tells, of an earlier step, differ between the model and whatever its config builds.
    own, reference = build(model, {}), build(model, {**sizes, **ids})
    told, tells = ({} if one is None else shapes_of(one) for one in (own, reference))
    after: Shapes = {}
    if sizes and told.keys() == tells.keys() == before.keys():
        after = {
            name: tuple(
                size if now == then else then for size, now, then in zip(shape, told[name], tells[name], strict=True)
            )
            for name, shape in before.items()
        }
    changed = [name for name in before if before[name] != after.get(name)]
    axes = {name: _axis(before[name], after[name], old, new) for name in changed if name in after}
    if f"{path}.weight" not in axes or after.keys() != before.keys() or None in axes.values():
        raise UnsupportedModelError(
            f"the vocabulary of {type(model).__name__} must be set by a field of its config; {old} stands in "
            f"{', '.join(sizes) or 'none of its vocabulary fields'}, and {new} there does not give a model whose only "
            f"difference is {path} with {new} rows and what goes with it."
        )
    found = {name: axis for name, axis in axes.items() if axis is not None}
    return VocabularyChange(path, found, old, {**sizes, **ids}, after)


def keep_tokens(model: PreTrainedModel, kept: Sequence[int]) -> Cut:
    """Drop all tokens but `kept` (ascending ids) from `model`, in place; ties, config and generation config follow.

    Returns:
        The cut, for `context.history`.

    Raises:
        UnsupportedModelError: as `plan_vocabulary`; the model is unchanged then.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> keep_tokens(model, (0, 2, 3, 7)).of
        128
        >>> model.config.eos_token_id, model.lm_head.weight is model.model.embed_tokens.weight
        (2, True)
    """
    change = plan_vocabulary(model, kept)
    index = torch.tensor(kept)
    places = {name: name.rpartition(".") for name in change.axes}
    old = {name: getattr(model.get_submodule(path), attribute) for name, (path, _, attribute) in places.items()}
    # Tied tensors are one and the same object, and so is what they become.
    new = {id(old[name]): _rows(old[name], axis, index) for name, axis in change.axes.items()}
    for name, (path, _, attribute) in places.items():
        setattr(model.get_submodule(path), attribute, new[id(old[name])])
    adopt_config(model, change.values)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        ids = {token: place for place, token in enumerate(kept)}
        for name, value in list(vars(generation).items()):
            setattr(generation, name, _moved(name, value, ids, change.of))
    return Cut(path=change.embedding, axis="vocabulary", kept=tuple(kept), of=change.of)


def named_tokens(model: PreTrainedModel) -> set[int]:
    """Return the token ids that must stay whatever the texts hold: those that the configs name.

    Where positions are counted from the padding token's id (RoBERTa and its kin), that id must not move: all tokens
    before it stay as well.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> sorted(named_tokens(tiny_model("llama")))
        [0, 2, 3]
    """
    size = vocabulary_size(model)
    fields = [*_fields(model.config), *vars(getattr(model, "generation_config", None) or model.config).items()]
    found = {token for name, value in fields if _is_id(name) for token in _integers(value) if 0 <= token < size}
    table = _embedding(model)[1]
    if table.padding_idx is not None:
        found.add(table.padding_idx)
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if type(padding) is int and own and all(size not in tensor.shape for tensor in own):
            found.update(range(min(padding + 1, size)))
    return found


def _embedding(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    try:
        table: Any = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    path = next((path for path, module in model.named_modules() if module is table), None)
    if path is None or not isinstance(table, nn.Embedding):
        raise UnsupportedModelError(
            f"{type(model).__name__} must read token ids through one embedding, got {type(table).__name__}; its "
            f"vocabulary cannot be pruned."
        )
    return path, table


def _rows(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    rows = tensor.detach().index_select(axis, index.to(tensor.device)).contiguous()
    return nn.Parameter(rows, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows


def _axis(before: tuple[int, ...], after: tuple[int, ...], old: int, new: int) -> int | None:
    """Return the one axis that goes from `old` to `new`, or None where the shapes differ otherwise."""
    differ = [axis for axis, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
    fits = len(before) == len(after) and len(differ) == 1
    return differ[0] if fits and (before[differ[0]], after[differ[0]]) == (old, new) else None


def _fields(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _fields(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield f"{prefix}{name}", value


def _is_id(path: str) -> bool:
    name = path.rpartition(".")[2]
    return "token_id" in name or name.endswith("token_index") or name in _NAMED_IDS or name == "forced_decoder_ids"


def _integers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            # Forced decoder ids are pairs of a place and a token.
            yield from _integers(entry[1:] if isinstance(entry, (list, tuple)) else entry)


def _moved(path: str, value: Any, places: Mapping[int, int], of: int) -> Any:
    """Return the value of a config field in the new numbering, or as it is where it holds no token ids."""
    name = path.rpartition(".")[2]

    def move(token: int) -> int:
        # What lies outside the vocabulary (-1 for none, defaults of a bigger one) names no token before and after.
        return places[token] if 0 <= token < of else token

    if value is None:
        return None
    if name in _RULES:
        return _rules(value, places)
    if name == "forced_decoder_ids":
        return [[place, None if token is None else move(token)] for place, token in value]
    if not _is_id(path):
        return value
    if type(value) is int:
        return move(value)
    if isinstance(value, (list, tuple)) and all(type(token) is int for token in value):
        return type(value)(move(token) for token in value)
    return value


def _rules(value: Any, places: Mapping[int, int]) -> Any:
    """Return suppressed tokens, bad words and biases in the new numbering, without those that no longer can occur."""
    known: Callable[[Sequence[int]], bool] = lambda words: all(token in places for token in words)  # noqa: E731
    if isinstance(value, Mapping):
        return {tuple(places[token] for token in words): bias for words, bias in value.items() if known(words)}
    if all(type(entry) is int for entry in value):
        return [places[token] for token in value if token in places]
    if all(len(entry) == 2 and isinstance(entry[0], (list, tuple)) and type(entry[1]) is float for entry in value):
        return [[[places[token] for token in words], bias] for words, bias in value if known(words)]
    return [[places[token] for token in words] for words in value if known(words)]
