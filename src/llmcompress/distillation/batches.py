"""Examples to training batches, by the kind of head the model has: what its inputs, targets and counted positions are.

Classifiers read text (pairs) with a label each, taggers words with a tag each, readers of questions windows of their
contexts. Masked LMs read the texts one by one. Causal LMs read windows cut from all the texts joined, or a text and its
second one as what follows it. Encoder-decoder models read the text and write the pair's second text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data import Example, Span, encode, longest_input, token_stream
from ..errors import ConfigError, MissingInputError
from .heads import IGNORED, Head
from .labels import labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Neighbouring windows of a long context share this part of their length, so that few answers are cut in two.
_OVERLAP = 4


def make_rows(
    head: Head,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length: int,
    labelled: bool,
    joined: bool = True,
) -> list[Row]:
    """Tokenise the examples into unpadded training rows, each with `input_ids`, its number, and what its head needs.

    Args:
        head: from `head_of`.
        model: gives the label names and the longest input.
        tokenizer: for the texts.
        examples: at least one; those without a label get rows that no hard loss counts.
        max_length: tokens a row, cut to what the model can take.
        labelled: whether labels are wanted; language models always have them.
        joined: whether texts of a causal model are joined and cut into windows, or read one by one.

    Raises:
        MissingInputError: the texts hold fewer than two tokens, one of them none, or nothing that the head is asked.
        ConfigError: a label is not one of the model's classes, or a question leaves no room for its context.
    """
    length = row_length(model, tokenizer, max_length)
    if head == "causal_lm":
        alone = not joined or any(example.pair is not None for example in examples)
        rows = list((_one_by_one if alone else _windows)(tokenizer, examples, length))
    elif head == "seq2seq_lm":
        rows = _pairs(tokenizer, examples, length)
    elif head == "masked_lm":
        rows = list(_texts(tokenizer, examples, length))
    else:
        labels = labels_of(head, model, examples) if labelled else [None] * len(examples)
        if head == "token_classification":
            rows = list(_tagged(tokenizer, examples, labels, length))
        elif head == "question_answering":
            rows = list(_excerpts(tokenizer, examples, labels, length))
        else:
            rows = [dict(row) for row in encode(examples, tokenizer, max_length=length)]
            missing = {"regression": float("nan"), "multi_label": [IGNORED] * model.config.num_labels}
            for row, label in zip(rows, labels, strict=True):
                row["labels"] = missing.get(head, IGNORED) if label is None else label
            _refuse_empty(rows, "text", "input_ids")
    if not rows:
        raise MissingInputError(
            f"KnowledgeDistillation needs data with something to ask the {head} head of {type(model).__name__} about, "
            f"and data[0] to data[{len(examples) - 1}] have nothing: they are empty, too short, or all tagged "
            f"{IGNORED}; pass other rows."
        )
    return [{**row, "row": number} for number, row in enumerate(rows)]


def row_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> int:
    """Return how many tokens a row may have: `max_length`, or what `model` can take if that is less."""
    longest = longest_input(model, tokenizer)
    return max_length if longest is None else min(max_length, longest)


def collate(head: Head, rows: Sequence[Row], *, pad: int, decoder_start: int | None = None) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest of them and make tensors of them.

    Args:
        head: from `head_of`.
        rows: from `make_rows`.
        pad: the token id that pads inputs.
        decoder_start: first token of an encoder-decoder's decoder.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` if the rows have them, `decoder_input_ids` for a seq2seq model,
        `labels` (`IGNORED` where padded or missing), `counted` for heads that answer at some tokens only, and `row`,
        the numbers of the rows.
    """
    fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED, "counted": 0, "row": 0}
    batch = {
        key: padded([row[key] for row in rows], fills[key])
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


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with: that of the model, of the tokenizer, or any, since padding is masked."""
    pads = (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((pad for pad in pads if pad is not None), 0)


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


def _one_by_one(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int) -> Iterator[Row]:
    """Read each text by itself, in several rows if it is long; behind a first text its second one is what counts."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for example in examples:
        first = _without_end(tokenizer(example.text, verbose=False)["input_ids"], tokenizer)
        if example.pair is None:
            whole = first + end
            parts = [(whole[at : at + length], 0) for at in range(0, len(whole), length)]
        else:
            second = list(tokenizer(example.pair, add_special_tokens=False, verbose=False)["input_ids"]) + end
            answer = second[: length - 1]
            # A long first text loses its start.
            prompt = first[-(length - len(answer)) :]
            parts = [(prompt + answer, len(prompt))]
        for ids, asked in parts:
            if len(ids) >= 2:
                labels = [IGNORED] * asked + ids[asked:]
                yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _without_end(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids)


def _pairs(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int) -> list[Row]:
    sources = encode([Example(example.text) for example in examples], tokenizer, max_length=length)
    # Without a target the teacher is asked about the text itself; no hard loss is taken there.
    written = [example.text if example.pair is None else example.pair for example in examples]
    targets = encode([Example(text) for text in written], tokenizer, max_length=length)
    rows = [{**source, "labels": target["input_ids"]} for source, target in zip(sources, targets, strict=True)]
    _refuse_empty(rows, "text", "input_ids")
    _refuse_empty(rows, "text_pair", "labels")
    return rows


def _refuse_empty(rows: Sequence[Row], column: str, key: str) -> None:
    """Refuse rows, one an example, of whose text no token is left."""
    for index, row in enumerate(rows):
        if not row[key]:
            raise MissingInputError(
                f"KnowledgeDistillation needs a {column} of at least one token in each row, and that of data[{index}] "
                f"has none; fill it in, or remove the row."
            )


def _texts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], length: int) -> Iterator[Row]:
    """Cut long texts into several rows; what may be masked is `counted`, and the labels are the tokens."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    texts = [text for example in examples for text in (example.text, example.pair) if text is not None]
    encoded = _cut(tokenizer, texts, length)
    for number in range(len(encoded["input_ids"])):
        row = _inputs(encoded, number)
        maskable = [int(token not in special) for token in row["input_ids"]]
        if any(maskable):
            yield {**row, "counted": maskable, "labels": list(row["input_ids"])}


def _tagged(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], tags: Sequence[Any], length: int
) -> Iterator[Row]:
    """The first piece of each word answers for it; sentences that are too long become several rows."""
    words = [list(example.words) if example.words is not None else example.text.split() for example in examples]
    encoded = _cut(tokenizer, words, length, is_split_into_words=True)
    seen: set[tuple[int, int]] = set()
    for number, sentence in enumerate(encoded["overflow_to_sample_mapping"]):
        row, word_of = _inputs(encoded, number), encoded.word_ids(number)
        counted = [0] * len(word_of)
        for place, word in enumerate(word_of):
            if word is not None and (sentence, word) not in seen:
                seen.add((sentence, word))
                counted[place] = 1
        of = tags[sentence]
        labels = [
            of[word] if first and of is not None else IGNORED for first, word in zip(counted, word_of, strict=True)
        ]
        # A tag of IGNORED is a word that nobody is asked about.
        if of is not None:
            counted = [int(first and label != IGNORED) for first, label in zip(counted, labels, strict=True)]
        if any(counted):
            yield {**row, "counted": counted, "labels": labels}


def _excerpts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], spans: Sequence[Span | None], length: int
) -> Iterator[Row]:
    """Read each context in windows; where a window lacks the answer its first token (CLS) is the answer."""
    questions, contexts = [example.text for example in examples], [example.pair or "" for example in examples]
    encoded = _cut(tokenizer, questions, length, contexts, stride=length // _OVERLAP, return_offsets_mapping=True)
    marks = {tokenizer.cls_token_id, tokenizer.bos_token_id} - {None}
    for number, example in enumerate(encoded["overflow_to_sample_mapping"]):
        row, span = _inputs(encoded, number), spans[example]
        counted = [int(part == 1) for part in encoded.sequence_ids(number)]
        null = 0 if row["input_ids"][0] in marks else None
        places = [place for place, inside in enumerate(counted) if inside]
        if null is not None:
            counted[null] = 1
        ends = None
        if span is not None and span.end > span.start:
            offsets = encoded["offset_mapping"][number]
            held = [place for place in places if offsets[place][0] < span.end and offsets[place][1] > span.start]
            if held and offsets[held[0]][0] <= span.start and offsets[held[-1]][1] >= span.end:
                ends = [held[0], held[-1]]
        if span is not None and ends is None and null is not None:
            ends = [null, null]
        if places:
            yield {**row, "counted": counted, "labels": ends or [IGNORED, IGNORED]}


def _cut(tokenizer: PreTrainedTokenizerBase, texts: Any, length: int, pairs: Any = None, **more: Any) -> Any:
    """Tokenise, and cut what is too long into several rows, each with the special tokens."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"KnowledgeDistillation needs a fast tokenizer for this head, which cuts long texts and tells the pieces "
            f"of a word, got {type(tokenizer).__name__}; load it with AutoTokenizer."
        )
    stride = more.get("stride", 0)
    if pairs is not None:
        for index, question in enumerate(texts):
            asked = len(tokenizer(question, "", verbose=False)["input_ids"])
            if asked + stride >= length:
                raise ConfigError(
                    f"KnowledgeDistillation.max_length must leave room for the context, got {length}: the question of "
                    f"data[{index}] has {asked} tokens; raise it, or remove the row."
                )
    return tokenizer(
        texts,
        pairs,
        truncation=True if pairs is None else "only_second",
        max_length=length,
        return_overflowing_tokens=True,
        padding=False,
        verbose=False,
        **more,
    )


def _inputs(encoded: Any, number: int) -> Row:
    return {key: list(encoded[key][number]) for key in _INPUTS if key in encoded}


def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
    """Return the sequences as one tensor, filled up on the right.

    Example:
        >>> padded([[1, 2], [3]], 0).tolist()
        [[1, 2], [3, 0]]
    """
    longest = max(map(len, sequences))
    return torch.tensor([sequence + [fill] * (longest - len(sequence)) for sequence in sequences])
