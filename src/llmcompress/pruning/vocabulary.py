"""Vocabulary pruning: tokens that the user's texts never hold leave the embedding, the head and the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, field_validator

from ..anatomy.probe import probe_outputs, refuse_nonfinite_outputs, relative_error
from ..anatomy.sizes import Shapes, shapes_of
from ..anatomy.surgery import ties
from ..anatomy.vocabulary import keep_tokens, named_tokens, plan_vocabulary, vocabulary_size
from ..compressor import Action, Compressor, Context, Need, Outline
from ..data import Example, load_examples, longest_input
from ..errors import ConfigError, MissingInputError, UnsupportedModelError, VerificationError
from ..registry import register
from .token_choice import Choice, choose_tokens
from .tokenizer_cut import Alphabet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Texts, and tokens of each, on which the cut model is compared with the whole one.
_PROBE_ROWS, _PROBE_TOKENS = 4, 32
# A matrix product with fewer columns may add in another order; hidden states are the same bit for bit.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@register("vocabulary_pruning")
class VocabularyPruning(Compressor):
    """Drop the tokens that the texts never hold from the embedding, the head and the fast tokenizer together.

    Multilingual and general vocabularies are mostly unused on one kind of text, and in small models they are half of
    the bytes (Load What You Need, Abdaoui et al., arXiv 2010.05609; Ushio et al., arXiv 2305.15020). The texts are
    tokenised, and whatever is seen stays, with all it is built from: special and added tokens, those that the config
    names, and the pieces that byte-pair merges go through. Without `keep` each text of the corpus is proven to be split
    as before, and the model to give the same outputs on it (up to the logits of tokens that are gone), or nothing is
    returned. `Result.tokenizer` is the tokenizer to use from then on, in later steps too; distillation translates the
    token ids for its teacher, who has the old vocabulary.

    A language model then chooses among fewer tokens: its perplexity falls a little by that alone.

    Args:
        corpus: texts that decide: a file or data set that `load_examples` takes, or a tuple of texts; None takes the
            run's data. All that the model will be asked should be like them.
        keep: None keeps all tokens seen; an integer so many of them, the most frequent; a float in (0, 1] that share
            of them. Tokens that cannot go and `alphabet` come on top. Texts then fall into more pieces, which the
            report counts.
        alphabet: what unseen words are built from: "all" keeps every byte of a byte-level tokenizer and every single
            character of others, "seen" only the characters that occur in the texts (bytes: all), "none" keeps none.
            A vocabulary of whole words has no alphabet.
        round_to: the new size is a multiple of this, which kernels like; filled up with the tokens of lowest id that
            would have gone, never with empty rows.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model, tiny_tokenizer
        >>> step = lc.VocabularyPruning(corpus=("a cat sat", "on a mat"))
        >>> result = lc.compress(tiny_model("llama"), step, tokenizer=tiny_tokenizer(), progress=False)
        >>> result.model.config.vocab_size, len(result.tokenizer), result.tokenizer.tokenize("a cat")
        (16, 16, ['a', ' ', 'c', 'a', 't'])
    """

    corpus: str | tuple[str, ...] | None = Field(None, description="texts, or where they are; None: the run's data")
    keep: int | float | None = Field(None, description="how many of the tokens seen stay, or which share; None: all")
    alphabet: Alphabet = Field("all", description="single bytes or characters that stay unseen: all, seen or none")
    round_to: int = Field(8, ge=1, le=1024, description="the new size is a multiple of this")

    @field_validator("keep", mode="before")
    @classmethod
    def _count_or_share(cls, keep: object) -> object:
        if keep is None or (type(keep) is int and keep >= 1) or (type(keep) is float and 0 < keep <= 1):
            return keep
        raise ConfigError(
            f"VocabularyPruning.keep must be None, a number of tokens (an int of at least 1) or a share (a float in "
            f"(0, 1]), got {keep!r}."
        )

    @field_validator("corpus")
    @classmethod
    def _some_texts(cls, corpus: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if corpus is not None and not any(corpus):
            raise ConfigError(
                f"VocabularyPruning.corpus must hold at least one text, or name a file, got {corpus!r}; pass None to "
                f"take the run's data."
            )
        return corpus

    @property
    def needs(self) -> frozenset[Need]:
        """A tokenizer, and the run's data unless there is a corpus."""
        return frozenset({"tokenizer"}) if self.corpus is not None else frozenset({"data", "tokenizer"})

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Name each tensor with its old and new number of rows. Reads no weight; tokenises the texts.

        Raises:
            MissingInputError: no texts, or no tokenizer.
            UnsupportedModelError: the tokenizer is not fast, or has more tokens than the model; the config cannot tell
                another vocabulary.
        """
        chosen = self._choose(model, context)
        if len(chosen.kept) == vocabulary_size(model):
            return [Action(path="", reason=self._why_none(chosen))]
        change = plan_vocabulary(model, chosen.kept)
        does = f"{change.of} -> {len(chosen.kept)} tokens"
        tied = {name: group[0] for group in ties(model) for name in group[1:]}
        actions = [
            Action(path=name, does=does, reason=f"tied to {tied[name]}" if name in tied else None)
            for name in change.axes
        ]
        actions.append(Action(path="", reason=_told(chosen)))
        if len(chosen.kept) % self.round_to:
            few = f"{len(chosen.kept)} is no multiple of round_to={self.round_to}: the tokenizer has no more tokens"
            actions.append(Action(path="", reason=few))
        if model.get_output_embeddings() is not None:
            reason = "the model chooses among fewer tokens: perplexities before and after are not of the same choice"
            actions.append(Action(path="", reason=reason))
        return actions

    def predicted_shapes(self, model: PreTrainedModel, context: Context) -> Shapes:
        """Return the shape that each tensor of the state dict will have. Reads no weight; tokenises the texts.

        Example:
            >>> from llmcompress.testing import tiny_model, tiny_tokenizer
            >>> context = Context(tokenizer=tiny_tokenizer())
            >>> step = VocabularyPruning(corpus=("a cat sat",), round_to=1)
            >>> step.predicted_shapes(tiny_model("llama"), context)["model.embed_tokens.weight"]
            (9, 64)
        """
        chosen = self._choose(model, context)
        if len(chosen.kept) == vocabulary_size(model):
            return shapes_of(model)
        return plan_vocabulary(model, chosen.kept).shapes

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Choose, cut tokenizer and model, and prove that the model does on the texts what it did."""
        chosen = self._choose(model, context)
        if len(chosen.kept) == vocabulary_size(model):
            return model
        change = plan_vocabulary(model, chosen.kept)
        old = torch.tensor(chosen.kept, device=model.device)
        rows = _probes(model, chosen, self._texts(context))
        before = [probe_outputs(model, {name: old[ids] for name, ids in row.items()}) for row in rows]
        for outputs in before:
            refuse_nonfinite_outputs(model, outputs)
        cut = keep_tokens(model, chosen.kept)
        if shapes_of(model) != change.shapes:
            raise VerificationError(
                f"VocabularyPruning: the pruned {type(model).__name__} has other shapes than predicted; the result is "
                f"withheld. Please report this model."
            )
        for row, expected in zip(rows, before, strict=True):
            _prove(model, probe_outputs(model, row), expected, old)
        context.history.append(cut)
        context.replace_tokenizer(chosen.tokenizer)
        return model

    def outline(self, model: PreTrainedModel, context: Context) -> Outline:
        """Count the tokens of the texts, and drop the rows of all others."""
        chosen = self._choose(model, context)
        if len(chosen.kept) < vocabulary_size(model):
            context.history.append(keep_tokens(model, chosen.kept))
            context.replace_tokenizer(chosen.tokenizer)
        return Outline(model)

    def _choose(self, model: PreTrainedModel, context: Context) -> Choice:
        tokenizer = context.tokenizer
        if tokenizer is None:
            raise MissingInputError(
                "VocabularyPruning needs a tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)."
            )
        size, highest = vocabulary_size(model), max(tokenizer.get_vocab().values())
        if highest >= size:
            raise UnsupportedModelError(
                f"{type(model).__name__} must have a row for each token of its tokenizer, got {size} rows and the "
                f"token id {highest}; pass the model's own tokenizer, or call model.resize_token_embeddings first."
            )
        return choose_tokens(
            self._texts(context),
            tokenizer,
            keep=self.keep,
            alphabet=self.alphabet,
            named=named_tokens(model),
            multiple=self.round_to,
        )

    def _why_none(self, chosen: Choice) -> str:
        if chosen.seen < len(chosen.kept) and self.round_to > 1:
            return (
                f"all {len(chosen.kept)} tokens stay: {chosen.seen} are seen in the texts, others cannot go, and "
                f"round_to={self.round_to} fills up the rest; a lower one may let some go"
            )
        return f"all {len(chosen.kept)} tokens are seen in the texts, or cannot go"

    def _texts(self, context: Context) -> list[Example]:
        if self.corpus is not None:
            source = list(self.corpus) if isinstance(self.corpus, tuple) else self.corpus
            return load_examples(source, name="VocabularyPruning.corpus")
        if not context.data:
            raise MissingInputError(
                "VocabularyPruning needs data; pass data=[...] with texts like those the model shall read, or corpus=."
            )
        return list(context.data)


def _told(chosen: Choice) -> str:
    if chosen.length == chosen.new_length and chosen.unknown == chosen.new_unknown:
        return f"{chosen.seen} tokens are seen in {chosen.texts} texts, which are split as before"
    told = (
        f"{chosen.seen} tokens are seen in {chosen.texts} texts, which have {chosen.length:.4g} -> "
        f"{chosen.new_length:.4g} tokens on average"
    )
    if chosen.unknown != chosen.new_unknown:
        told += f", of which {chosen.unknown:.2%} -> {chosen.new_unknown:.2%} are unknown"
    return told


def _probes(model: PreTrainedModel, chosen: Choice, examples: list[Example]) -> list[dict[str, torch.Tensor]]:
    """Return token ids of the first texts, each a row of its own: with padding, rows would not be alike bit for bit."""
    texts = [example.text for example in examples[:_PROBE_ROWS]]
    longest = min(_PROBE_TOKENS, longest_input(model, chosen.tokenizer) or _PROBE_TOKENS)
    encoded = chosen.tokenizer(texts, truncation=True, max_length=longest, verbose=False)["input_ids"]
    rows = [torch.tensor([ids], device=model.device) for ids in encoded if ids]
    names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, row) for row in rows]


def _prove(model: PreTrainedModel, after: torch.Tensor, before: torch.Tensor, kept: torch.Tensor) -> None:
    if after.shape == before.shape:
        same = torch.equal(after, before)
    else:
        before = before[..., kept]
        same = after.shape == before.shape and relative_error(after, before) <= _TOLERANCE.get(model.dtype, 1e-5)
    if not same:
        raise VerificationError(
            f"VocabularyPruning: the pruned {type(model).__name__} does not give the outputs it gave before on the "
            f"same texts; the result is withheld. Something in it depends on the numbers of tokens; please report it."
        )
