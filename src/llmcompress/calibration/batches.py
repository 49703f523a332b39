"""Calibration texts as batches in which nothing is padded."""

from __future__ import annotations

import inspect
import random
from typing import TYPE_CHECKING

import torch

from ..class_labels import read_labels
from ..compressor import Action
from ..data import Example, encode, find_tokenizer, longest_input
from ..errors import ConfigError, MissingInputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..compressor import Context

# What a batch holds at most; enough to keep the matrix products busy, and small beside the weights.
_TOKENS = 2048
# Below this no statistic of the inputs means anything.
_FEWEST_TOKENS = 32

_Row = dict[str, list[int] | list[int | float]]


def calibration_batches(
    model: PreTrainedModel, context: Context, *, who: str, samples: int, max_length: int, labels: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Tokenise the texts of `context.data` and batch rows of equal length together, so that no padding exists.

    Where there are more than `samples` texts, that many are drawn with `context.seed`. Each row is one text, cut to
    `max_length` and to the model's longest input; for an encoder-decoder the second text of a pair (or the text
    itself) goes to the decoder, shifted right as in training. Batches hold at most 2,048 tokens (or one row).

    Args:
        model: the model that the batches are for.
        context: its `data`, `tokenizer` and `seed` are used; it is told where texts were empty, or few.
        who: the strategy's name, for messages.
        samples: how many texts to take at most, at least 1.
        max_length: how many tokens of a text to take at most, at least 1.
        labels: whether a classifier's batches bring the labels of their texts, where each text has one.

    Returns:
        Dicts of `input_ids`, `attention_mask` (ones), and where the model takes them `token_type_ids` and
        `decoder_input_ids`, each of shape (rows, tokens), on the model's device; longest rows first. `labels` has shape
        (rows,).

    Raises:
        MissingInputError: there are no texts, no tokenizer, or fewer than 32 tokens in all.
        ConfigError: the tokenizer gives an id that the model does not know; a label is none of the model's.
        UnsupportedModelError: the model does not read token ids.

    Example:
        >>> from llmcompress.compressor import Context
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("bert")
        >>> context = Context(data=tiny_data(model), tokenizer=tiny_tokenizer())
        >>> batches = calibration_batches(model, context, who="example", samples=8, max_length=15)
        >>> [tuple(batch["input_ids"].shape) for batch in batches]
        [(8, 15)]
    """
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{who} calibrates on texts, and {type(model).__name__} reads {model.main_input_name}."
        )
    if not context.data:
        raise MissingInputError(f"{who} needs data; pass data=[...], for instance 128 texts and a tokenizer.")
    tokenizer = find_tokenizer(model, context.tokenizer, who=who)
    limit = min(max_length, longest_input(model, tokenizer) or max_length)
    examples = _draw(context.data, samples, context.seed)
    rows = _rows(model, tokenizer, examples, limit)
    if labels:
        _add_labels(model, rows, examples)
    full = [row for row in rows if all(row.values())]
    _check_ids(model, full, who)
    tokens = sum(len(row["input_ids"]) for row in full)
    if tokens < _FEWEST_TOKENS:
        raise MissingInputError(
            f"{who}: calibration texts too short: {len(rows)} texts have {tokens} tokens in all, and at least "
            f"{_FEWEST_TOKENS} are needed; pass more or longer texts, for instance 128 of 512 tokens"
            f"{f', or a larger max_length than {max_length}' if max_length < _FEWEST_TOKENS else ''}."
        )
    if len(full) < len(rows):
        context.tell(Action(path="", reason=f"{len(rows) - len(full)} of {len(rows)} calibration texts have no token"))
    width = model.get_input_embeddings().weight.shape[-1]
    if tokens < width:
        remark = f"calibrated on {tokens} tokens, fewer than the {width} features of the model; more texts serve better"
        context.tell(Action(path="", reason=remark))
    return [_batch(group, model.device) for group in _groups(full)]


def _draw(data: Sequence[Example], samples: int, seed: int) -> list[Example]:
    if len(data) <= samples:
        return list(data)
    return [data[index] for index in sorted(random.Random(seed).sample(range(len(data)), samples))]


def _rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], limit: int
) -> list[_Row]:
    paired = model.config.is_encoder_decoder
    sources = [Example(example.text) for example in examples] if paired else examples
    keys = {"input_ids", "attention_mask"}
    # Models without segments may still accept the argument and give it another meaning (GPT-2 adds token embeddings).
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        keys |= {"token_type_ids"} & set(inspect.signature(model.forward).parameters)
    rows: list[_Row] = [
        {key: value for key, value in row.items() if key in keys}
        for row in encode(sources, tokenizer, max_length=limit)
    ]
    if paired:
        targets = encode([Example(example.pair or example.text) for example in examples], tokenizer, max_length=limit)
        start = _decoder_start(model)
        for row, target in zip(rows, targets, strict=True):
            row["decoder_input_ids"] = [start, *target["input_ids"][:-1]]
    return rows


def _add_labels(model: PreTrainedModel, rows: list[_Row], examples: list[Example]) -> None:
    kind = getattr(model.config, "problem_type", None)
    if getattr(model, "loss_type", None) != "ForSequenceClassification" or kind == "multi_label_classification":
        return
    if all(example.label is not None for example in examples):
        regression = model.config.num_labels == 1 or kind == "regression"
        for row, label in zip(rows, read_labels(model, examples, regression=regression), strict=True):
            row["labels"] = [label]


def _decoder_start(model: PreTrainedModel) -> int:
    config = model.config
    named = [getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad")]
    return next((int(token) for token in named if token is not None), 0)


def _check_ids(model: PreTrainedModel, rows: list[_Row], who: str) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    highest = max((max(row["input_ids"]) for row in rows), default=0)
    if highest >= known:
        raise ConfigError(
            f"{who}: the tokenizer gives token {highest}, and {type(model).__name__} knows {known}; "
            f"pass the model's own tokenizer."
        )


def _groups(rows: list[_Row]) -> list[list[_Row]]:
    by_length: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        by_length.setdefault((len(row["input_ids"]), len(row.get("decoder_input_ids", ()))), []).append(row)
    groups = []
    for lengths in sorted(by_length, reverse=True):
        size = max(_TOKENS // max(lengths), 1)
        same = by_length[lengths]
        groups += [same[at : at + size] for at in range(0, len(same), size)]
    return groups


def _batch(rows: list[_Row], device: torch.device) -> dict[str, torch.Tensor]:
    batch = {key: torch.tensor([row[key] for row in rows], device=device) for key in rows[0]}
    return {key: tensor.flatten() if key == "labels" else tensor for key, tensor in batch.items()}
