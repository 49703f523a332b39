"""Examples to training batches, by the kind of head the model has: what its inputs, targets and counted positions are.

Classifiers read text (pairs) with a label each. Causal LMs read windows cut from all the texts joined. Encoder-decoder
models read the text and write the pair's second text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..data import Example, encode, longest_input, read_labels, token_stream
from ..errors import MissingInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Head = Literal["classification", "regression", "causal_lm", "seq2seq_lm"]
Row = dict[str, Any]

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""


def head_of(model: PreTrainedModel) -> Head:
    """Return which kind of head the model has.

    Raises:
        UnsupportedModelError: none of those that can be distilled.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> head_of(tiny_model("bert")), head_of(tiny_model("llama")), head_of(tiny_model("t5"))
        ('classification', 'causal_lm', 'seq2seq_lm')
    """
    config = model.config
    if model.can_generate() and model.get_output_embeddings() is not None:
        return "seq2seq_lm" if config.is_encoder_decoder else "causal_lm"
    if getattr(model, "loss_type", None) == "ForSequenceClassification" and not config.is_encoder_decoder:
        kind = getattr(config, "problem_type", None)
        if kind != "multi_label_classification":
            return "regression" if config.num_labels == 1 or kind == "regression" else "classification"
    raise UnsupportedModelError(
        f"KnowledgeDistillation works on models with a single-label classification, regression, causal or seq2seq "
        f"language-model head, got {type(model).__name__}; load it with AutoModelForSequenceClassification, "
        f"AutoModelForCausalLM or AutoModelForSeq2SeqLM."
    )


def make_rows(
    head: Head,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    labelled: bool,
) -> list[Row]:
    """Tokenise the examples into unpadded training rows, each with `input_ids` and what its head needs.

    Args:
        head: from `head_of`.
        model: gives the label names and the longest input.
        tokenizer: for the texts.
        examples: at least one.
        max_length: tokens a row, cut to what the model can take.
        labelled: whether labels (for seq2seq: target texts) are wanted.

    Raises:
        MissingInputError: labels are wanted and missing, or the texts hold fewer than two tokens.
        ConfigError: a label is not one of the model's classes.
    """
    longest = longest_input(model, tokenizer)
    length = min(max_length, longest) if longest is not None else max_length
    if labelled:
        check_labels(head, model, examples)
    if head == "causal_lm":
        return _windows(tokenizer, examples, length)
    if head == "seq2seq_lm":
        return _pairs(tokenizer, examples, length)
    rows: list[Row] = [dict(row) for row in encode(examples, tokenizer, max_length=length)]
    if labelled:
        for row, label in zip(rows, _read_labels(head, model, examples), strict=True):
            row["labels"] = label
    return rows


def check_labels(head: Head, model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Refuse examples that have no target for the hard loss of this head; the tokens of a causal LM are theirs.

    Raises:
        MissingInputError: an example has no label (for seq2seq: no second text).
        ConfigError: a label is not one of the model's classes, or for regression no number.
    """
    if head in {"classification", "regression"}:
        _read_labels(head, model, examples)
    elif head == "seq2seq_lm":
        bare = next((index for index, example in enumerate(examples) if example.pair is None), None)
        if bare is not None:
            raise MissingInputError(
                f"KnowledgeDistillation needs target texts for the hard loss of {type(model).__name__}, and "
                f"data[{bare}] has none; pass rows with 'text' and 'text_pair', or alpha=1.0 to learn from the teacher "
                f"alone."
            )


def _read_labels(head: Head, model: PreTrainedModel, examples: Sequence[Example]) -> list[int | float]:
    """Return the label of each example as the head wants it: a class index, or for regression a real number."""
    bare = next((index for index, example in enumerate(examples) if example.label is None), None)
    if bare is not None:
        raise MissingInputError(
            f"KnowledgeDistillation needs labels for its hard loss, and data[{bare}] has none; pass (text, label) "
            f"pairs, or alpha=1.0 to learn from the teacher alone."
        )
    return read_labels(model, examples, regression=head == "regression")


def collate(head: Head, rows: Sequence[Row], *, pad: int, decoder_start: int | None = None) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest of them and make tensors of them.

    Args:
        head: from `head_of`.
        rows: from `make_rows`.
        pad: the token id that pads inputs.
        decoder_start: first token of an encoder-decoder's decoder.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` if the rows have them, `decoder_input_ids` for a seq2seq model,
        and `labels` if the rows have them (language models always do; `IGNORED` where padded).
    """
    fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
    batch = {
        key: _padded([row[key] for row in rows], fills[key])
        if isinstance(rows[0][key], list)
        else torch.tensor([row[key] for row in rows])
        for key in rows[0]
        if key in fills
    }
    if head == "seq2seq_lm":
        shifted = batch["labels"].roll(1, dims=-1).masked_fill(batch["labels"].roll(1, dims=-1) == IGNORED, pad)
        shifted[:, 0] = decoder_start
        batch["decoder_input_ids"] = shifted
    return batch


def _windows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int) -> list[Row]:
    """Cut the joined texts into windows; each begins with BOS if the tokenizer puts one before a text by itself."""
    stream = token_stream(examples, tokenizer)
    start = list(tokenizer(examples[0].text)["input_ids"][:1])
    prefix = start if start and start[0] == tokenizer.bos_token_id else []
    step = max(length - len(prefix), 1)
    windows = [prefix + stream[at : at + step] for at in range(0, len(stream), step)]
    # The last window may be a stub of one token, which predicts nothing.
    windows = [window for window in windows if len(window) >= 2]
    if not windows:
        raise MissingInputError("KnowledgeDistillation needs texts of at least two tokens in all; pass more data.")
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)} for ids in windows]


def _pairs(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int) -> list[Row]:
    sources = encode([Example(example.text) for example in examples], tokenizer, max_length=length)
    # Without a target the teacher is asked about the text itself; no hard loss is taken there.
    targets = encode([Example(example.pair or example.text) for example in examples], tokenizer, max_length=length)
    return [
        {**source, "labels": target["input_ids"]}
        for source, target in zip(sources, targets, strict=True)
        if target["input_ids"]
    ]


def _padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [fill] * (longest - len(sequence)) for sequence in sequences])
