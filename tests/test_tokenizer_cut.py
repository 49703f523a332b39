"""Fewer tokens, same pieces: every kind of fast tokenizer, over random texts and by hand."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    LlamaTokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

import llmcompress as lc
from llmcompress.pruning.merges import Merges
from llmcompress.pruning.token_choice import choose_tokens
from llmcompress.pruning.tokenizer_cut import FastVocabulary
from llmcompress.testing import tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
LETTERS = "abcdeé語😀."


def train(model, trainer, texts, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(texts, trainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def byte_level(texts, **fields):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        models.BPE(**fields),
        lambda **more: trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, **more),
        texts,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


def marked(texts, **mark):
    trainer = lambda **more: trainers.BpeTrainer(vocab_size=90, **mark, **more)  # noqa: E731
    return train(models.BPE(unk_token="<unk>", **mark), trainer, texts, pre_tokenizer=pre_tokenizers.Whitespace())


def byte_fallback(texts):
    """Merges over characters, and single bytes for the characters that training did not see."""
    trainer = lambda **more: trainers.BpeTrainer(vocab_size=90, **more)  # noqa: E731
    texts = [text.replace("語", "").replace("😀", "") for text in texts]
    content = json.loads(train(models.BPE(), trainer, texts, normalizer=normalizers.Replace(" ", "▁")).to_str())
    model = content["model"]
    model.update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    for byte in range(256):
        model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
    return Tokenizer.from_str(json.dumps(content))


def word_piece(texts):
    trainer = lambda **more: trainers.WordPieceTrainer(vocab_size=90, limit_alphabet=6, **more)  # noqa: E731
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    return train(models.WordPiece(unk_token="<unk>"), trainer, texts, **parts)


def unigram(texts):
    trainer = lambda **more: trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **more)  # noqa: E731
    texts = [text.replace("語", "") for text in texts]
    return train(models.Unigram(), trainer, texts, pre_tokenizer=pre_tokenizers.Metaspace())


def words(texts):
    trainer = lambda **more: trainers.WordLevelTrainer(vocab_size=30, **more)  # noqa: E731
    return train(models.WordLevel(unk_token="<unk>"), trainer, texts, pre_tokenizer=pre_tokenizers.Whitespace())


KINDS = {
    "byte-level": byte_level,
    "byte-level, whole words first": lambda texts: byte_level(texts, ignore_merges=True),
    "word ends marked": lambda texts: marked(texts, end_of_word_suffix="</w>"),
    "continuations marked": lambda texts: marked(texts, continuing_subword_prefix="##"),
    "byte fallback": byte_fallback,
    "WordPiece": word_piece,
    "Unigram": unigram,
    "WordLevel": words,
}


def wrap(backend):
    """Return the tokenizer as transformers has it, with a template and with tokens added behind the vocabulary."""
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_tokens(["<new>", AddedToken("<other>", special=True)])
    return tokenizer


def choose(tokenizer, texts, *, keep=None, alphabet="none", named=(), multiple=1):
    examples = [lc.Example(text) for text in texts]
    return choose_tokens(examples, tokenizer, keep=keep, alphabet=alphabet, named=named, multiple=multiple)


sentences = st.lists(st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=4).map(" ".join))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    others=sentences,
    alphabet=st.sampled_from(["all", "seen", "none"]),
    multiple=st.sampled_from([1, 8]),
)
def test_every_text_of_the_corpus_is_split_as_before(kind, seed, others, alphabet, multiple):
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(LETTERS, k=draw.randint(1, 6))) for _ in range(30)]
    training = [" ".join(draw.choices(lexicon, k=5)) for _ in range(40)]
    tokenizer = wrap(KINDS[kind](training))
    corpus = [*training[:3], *others, "a<new> b"]
    before = [tokenizer.tokenize(text) for text in corpus]
    found = choose(tokenizer, corpus, alphabet=alphabet, named=[5], multiple=multiple)
    new = found.tokenizer
    assert [new.tokenize(text) for text in corpus] == before
    assert [tokenizer.tokenize(text) for text in corpus] == before
    assert new.convert_ids_to_tokens(range(len(new))) == tokenizer.convert_ids_to_tokens(found.kept)
    assert len(new) == len(found.kept) <= len(tokenizer)
    if multiple > 1 and len(new) < len(tokenizer) and kind == "WordLevel":
        assert len(new) % multiple == 0
    assert 5 in found.kept
    assert {*SPECIAL, "<new>", "<other>"} <= new.get_vocab().keys()
    assert new.decode(new(corpus[0])["input_ids"]) == tokenizer.decode(tokenizer(corpus[0])["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_with_an_alphabet_unseen_words_still_fall_into_pieces(kind):
    draw = random.Random(0)
    training = ["".join(draw.choices("abcde ", k=30)) for _ in range(40)]
    tokenizer = wrap(KINDS[kind](training))
    for keep in (None, 0.2, 5):
        found = choose(tokenizer, ["abc de"], keep=keep, alphabet="all")
        assert len(found.kept) < len(tokenizer)
        if kind != "WordLevel":
            assert tokenizer.unk_token not in found.tokenizer.tokenize("edcba bbb")
    assert found.new_length >= found.length
    bare = choose(tokenizer, ["abc de"]).tokenizer
    assert len(bare) < len(found.tokenizer) or kind == "WordLevel"


def test_the_alphabet_may_be_that_of_the_texts():
    tokenizer = wrap(word_piece(["abcde abcde", "edcba"]))
    sizes = {which: len(choose(tokenizer, ["abc"], alphabet=which).kept) for which in ("all", "seen", "none")}
    assert sizes["none"] < sizes["seen"] < sizes["all"]
    assert choose(tokenizer, ["abc"], alphabet="seen").tokenizer.tokenize("cab bac") == [
        piece for word in ("cab", "bac") for piece in (word[0], f"##{word[1]}", f"##{word[2]}")
    ]


def test_the_most_frequent_tokens_are_kept():
    tokenizer = wrap(words(["one two three four five six seven"] * 2))
    texts = ["six six six one one two", "seven six one"]
    found = choose(tokenizer, texts, keep=2)
    assert {"six", "one"} <= found.tokenizer.get_vocab().keys()
    assert not {"two", "seven"} & found.tokenizer.get_vocab().keys()
    assert (found.seen, found.texts, found.length) == (6, 2, 6.5)
    assert (found.unknown, found.new_unknown) == (0, pytest.approx(2 / 13))
    assert len(choose(tokenizer, texts, keep=0.5).kept) == len(found.kept)


def test_pieces_that_only_lead_to_a_token_are_kept():
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"abcd", "ab", "cd", "abcd", "bc", "abc"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c"), ("a", "bc")]
    tokenizer = wrap(Tokenizer(models.BPE(vocabulary, merges)))
    found = choose(tokenizer, ["abcd"])
    assert found.tokenizer.tokenize("abcd") == ["abcd"]
    assert {"ab", "cd"} <= found.tokenizer.get_vocab().keys()
    assert not {"bc", "abc"} & found.tokenizer.get_vocab().keys()
    # "abc" is in the table, and no text is ever split so: "ab" is made first.
    assert Merges(merges).pieces("abc") == {"a", "b", "c", "ab"}


def test_words_that_wordpiece_gives_up_on_stay_unknown():
    names = ["[UNK]", "a", "ab", "z", "##bc"]
    backend = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    texts = ["abc", "a", "zbc"]
    # Greedy: "ab" is found first and "##c" is not there. Without "ab", "a" and "##bc" would do.
    assert tokenizer.tokenize("abc") == ["[UNK]"]
    found = choose(tokenizer, texts)
    assert found.tokenizer.tokenize("abc") == ["[UNK]"]
    assert "ab" in found.tokenizer.get_vocab()


def test_unknown_characters_cost_what_they_did():
    scores = [("<unk>", 0.0), ("op", -1.0), ("px", -19.0), ("o", -19.0), ("p", -19.0), ("zz", -40.0), ("y", -2.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 0)), unk_token="<unk>")
    # An unknown character costs 10 more than the worst token: with "zz" 50, without it 29, and "op" + "x" would win.
    assert tokenizer.tokenize("opx") == ["o", "px"]
    found = choose(tokenizer, ["opx"])
    assert found.tokenizer.tokenize("opx") == ["o", "px"]
    assert found.kept == (0, 2, 3, 5)


def test_all_ids_of_the_document_move():
    tokenizer = wrap(words(["one two three four"]))
    tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.pad_token_id, pad_token="<pad>")
    new = FastVocabulary(tokenizer).keep(
        [0, 1, 2, 3, 7, *(tokenizer.added_tokens_encoder[t] for t in ("<new>", "<other>"))]
    )
    content = json.loads(new.backend_tokenizer.to_str())
    assert content["model"]["vocab"] == {**{t: i for i, t in enumerate(SPECIAL)}, tokenizer.convert_ids_to_tokens(7): 4}
    assert {entry["content"]: entry["id"] for entry in content["added_tokens"]}["<other>"] == 6
    assert new.all_special_ids == [new.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens]
    for old, moved in ((processors.BertProcessing, "sep"), (processors.RobertaProcessing, "cls")):
        backend = words(["one two three four"])
        backend.post_processor = old(("four", backend.token_to_id("four")), ("one", backend.token_to_id("one")))
        other = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        cut = choose(other, ["two"]).tokenizer
        assert cut.convert_ids_to_tokens(cut("two")["input_ids"]) == other.convert_ids_to_tokens(
            other("two")["input_ids"]
        )
        assert moved in json.loads(cut.backend_tokenizer.to_str())["post_processor"]


def of_vocabulary(content, first):
    """Return the vocabulary of a trained tokenizer behind the special tokens of another one."""
    vocabulary = content["vocab"]
    if isinstance(vocabulary, list):
        return [*((token, 0.0) for token in first), *(tuple(entry) for entry in vocabulary if entry[0] not in SPECIAL)]
    names = [*first, *(token for token in sorted(vocabulary, key=vocabulary.get) if token not in (*SPECIAL, *first))]
    return {token: index for index, token in enumerate(names)}


def of_class(cls, texts):
    roberta = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    kinds = {BertTokenizer: word_piece, RobertaTokenizer: byte_level, NllbTokenizer: byte_level}
    kinds |= {LlamaTokenizer: byte_fallback}
    first = {BertTokenizer: ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], LlamaTokenizer: ["<unk>", "<s>", "</s>"]}
    first |= {T5Tokenizer: ["<pad>", "</s>", "<unk>"], XLMRobertaTokenizer: roberta[:4], MBartTokenizer: roberta[:4]}
    content = json.loads(kinds.get(cls, unigram)(texts).to_str())["model"]
    more = {"merges": [tuple(merge) for merge in content["merges"]]} if "merges" in content else {}
    return cls(vocab=of_vocabulary(content, first.get(cls, roberta)), **more)


@pytest.mark.parametrize(
    "cls",
    [BertTokenizer, RobertaTokenizer, LlamaTokenizer, NllbTokenizer, T5Tokenizer, XLMRobertaTokenizer, MBartTokenizer],
)
def test_tokenizers_of_their_own_class_come_back_from_a_folder(cls, tmp_path):
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices(LETTERS, k=4)) for _ in range(6)) for _ in range(60)]
    tokenizer = of_class(cls, texts)
    tokenizer.model_max_length = 77
    tokenizer.add_tokens(["<new>"])
    corpus = [*texts[:5], "a<new>b"]
    new = choose(tokenizer, corpus, alphabet="seen").tokenizer
    assert type(new) is cls
    assert len(new) < len(tokenizer)
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in corpus:
        ids = tokenizer(text)["input_ids"]
        assert again.convert_ids_to_tokens(again(text)["input_ids"]) == tokenizer.convert_ids_to_tokens(ids)
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(ids)
    assert again.model_max_length == new.model_max_length == 77
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert new.name_or_path == tokenizer.name_or_path


def test_what_cannot_be_cut_is_refused():
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

    with pytest.raises(lc.UnsupportedModelError, match=r"must be a fast tokenizer .* got ByT5Tokenizer; load it"):
        FastVocabulary(ByT5Tokenizer())
    random_splits = wrap(marked(["a b ab"], end_of_word_suffix="</w>"))
    random_splits.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(lc.UnsupportedModelError, match=r"got BPE dropout 0\.1"):
        FastVocabulary(random_splits)
    with pytest.raises(lc.MissingInputError, match="all that were passed are empty"):
        choose(tiny_tokenizer(), ["", ""])
