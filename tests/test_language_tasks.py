"""Taggers and language models: hand-computed cases, naive loops, lm-eval's own numbers, and clear refusals."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.errors import (
    CompressionError,
    ConfigError,
    MissingInputError,
    UnknownNameError,
    UnsupportedModelError,
)
from llmcompress.evaluation.tasks import ExampleResult, LMEvalTask
from llmcompress.evaluation.tasks.choices import read_question
from llmcompress.evaluation.tasks.entities import entities, is_scheme
from llmcompress.evaluation.tasks.forward import advance
from llmcompress.evaluation.tasks.lm_eval_task import _index_of
from llmcompress.evaluation.tasks.masked_language_modeling import _evenly_spaced
from llmcompress.evaluation.tasks.multiple_choice import encode_pairs
from llmcompress.evaluation.tasks.token_classification import _stretches
from llmcompress.testing import tiny_model

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXT = "ada lovelace wrote to charles babbage in london about the engine and its notes on bernoulli"
WORDS = TEXT.split()


def score(model, task, tokenizer, **settings):
    found = task.evaluate(model, tokenizer, progress=False, **settings)
    # By these names wrong ones are refused before any work; what lm_eval measures only its run tells.
    assert task.metric_names is None or set(found.metrics) <= set(task.metric_names)
    return found


@pytest.fixture
def marking_tokenizer(tokenizer):
    """The tiny tokenizer, with <s> before and </s> behind every text."""
    from tokenizers.processors import TemplateProcessing

    template = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.mask_token = "<extra_0>"
    return tokenizer


@pytest.fixture
def bos_tokenizer(tokenizer):
    """The tiny tokenizer, with <s> before every text."""
    from tokenizers.processors import TemplateProcessing

    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


# --- token classification --------------------------------------------------------------------------------------------


def tagger(family: str = "bert", names=NAMES, **settings):
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.for_model(
        family,
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_config(config).eval()


def sentences(count: int = 12) -> list[dict]:
    chosen = random.Random(0)
    cut = [WORDS[i % 5 : i % 5 + 1 + (5 * i) % 9] for i in range(count)]
    return [{"tokens": words, "ner_tags": [chosen.choice(NAMES) for _ in words]} for words in cut]


def conlleval(tags) -> set[tuple[str, int, int]]:
    """The rules as the script of CoNLL-2000 and seqeval write them down: what ends and what starts a chunk."""
    ends = {("B", "B"), ("B", "S"), ("B", "O"), ("I", "B"), ("I", "S"), ("I", "O")}
    starts = {("E", "E"), ("E", "I"), ("S", "E"), ("S", "I"), ("O", "E"), ("O", "I")}
    found, begin, before, kind_before = set(), 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        place, kind = tag[0], tag[2:]
        other = kind != kind_before
        if before in "ES" or (before, place) in ends or (before != "O" and other):
            found.add((kind_before, begin, index - 1))
        if place in "BS" or (before, place) in starts or (place != "O" and other):
            begin = index
        before, kind_before = place, kind
    return {chunk for chunk in found if chunk[0]}


def test_entities_follow_the_rules_of_conlleval() -> None:
    assert entities(["I-PER", "I-PER", "O", "I-LOC"]) == {("PER", 0, 1), ("LOC", 3, 3)}  # I- starts one
    assert entities(["B-PER", "I-LOC", "I-LOC"]) == {("PER", 0, 0), ("LOC", 1, 2)}  # another type starts one
    assert entities(["B-PER", "B-PER", "I-PER"]) == {("PER", 0, 0), ("PER", 1, 2)}
    assert entities(["B-X", "I-X", "E-X", "I-X", "S-X", "E-X"]) == {("X", 0, 2), ("X", 3, 3), ("X", 4, 4), ("X", 5, 5)}
    assert entities(["B-per-son", "I-per-son"]) == {("per-son", 0, 1)}
    chosen = random.Random(0)
    tags = ["O", *(f"{place}-{kind}" for place in "BIES" for kind in ("PER", "LOC"))]
    for _ in range(3000):
        sequence = chosen.choices(tags, k=chosen.randrange(1, 9))
        assert entities(sequence) == conlleval(sequence), sequence


def test_f1_of_entities_by_hand() -> None:
    task = lc.TokenClassification([(["a"], ["O"])])
    first = ("B-PER", "I-PER", "O", "B-LOC"), ("B-PER", "O", "O", "B-LOC")  # 2 asked, 2 given, LOC right
    second = ("O", "B-PER"), ("B-LOC", "B-PER")  # 1 asked, 2 given, 1 right
    results = [
        ExampleResult(
            values={"accuracy": sum(map(str.__eq__, *pair)) / len(pair[0])},
            weight=len(pair[0]),
            label=pair[0],
            prediction=pair[1],
        )
        for pair in (first, second)
    ]
    found = {name: float(value[0]) for name, value in task.metrics(results)(np.ones((1, 2))).items()}
    expected = {"f1": 2 * 2 / (3 + 4), "precision": 2 / 4, "recall": 2 / 3, "accuracy": 4 / 6}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_first_piece_of_a_word_answers_whatever_the_batch(family: str, marking_tokenizer) -> None:
    model, data = tagger(family), sentences()
    alone = score(model, lc.TokenClassification(data), marking_tokenizer, batch_size=1)
    together = score(model, lc.TokenClassification(data[::-1]), marking_tokenizer, batch_size=5)
    assert [one.prediction for one in together.examples[::-1]] == [one.prediction for one in alone.examples]
    assert together.metrics == pytest.approx(alone.metrics)
    assert len({tag for one in alone.examples for tag in one.prediction}) > 1
    for row, one in zip(data, alone.examples, strict=True):
        ids = [
            2,
            *(token for word in row["tokens"] for token in marking_tokenizer.convert_tokens_to_ids(list(word))),
            3,
        ]
        firsts = np.cumsum([1, *(len(word) for word in row["tokens"])])[:-1]
        with torch.inference_mode():
            classes = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        assert one.prediction == tuple(NAMES[int(classes[place])] for place in firsts)
        assert one.label == tuple(row["ner_tags"])
    right = sum(a == b for one in alone.examples for a, b in zip(one.label, one.prediction, strict=True))
    assert alone.metrics["accuracy"] == pytest.approx(right / sum(len(row["tokens"]) for row in data))


def test_stretches_by_hand() -> None:
    # ten pieces from place 1 on, in stretches of 4 that share one: the first has it where neither gives more context
    assert _stretches(1, 11, 4, list(range(1, 11))) == [(1, 5, [1, 2, 3, 4]), (4, 8, [5, 6, 7]), (7, 11, [8, 9, 10])]
    assert _stretches(0, 3, 8, [0, 2]) == [(0, 3, [0, 2])]


def test_long_sentences_are_read_in_windows(marking_tokenizer) -> None:
    model, words = tagger(), WORDS * 3
    task = lc.TokenClassification([{"words": words, "tags": ["O"] * len(words)}, (["x"], ["O"])], max_length=20)
    run = task.start(model, marking_tokenizer, batch_size=4)
    read = [word for window in run._windows if window.sentence == 0 for word in window.answers.values()]
    assert sorted(read) == list(range(len(words)))
    for window in run._windows:
        ids = window.inputs["input_ids"]
        assert len(ids) <= 20
        assert (ids[0], ids[-1]) == (2, 3)
        for position, word in window.answers.items():
            assert (
                marking_tokenizer.convert_ids_to_tokens(ids[position])
                == (words if window.sentence == 0 else "x")[word][0]
            )
    found = score(model, task, marking_tokenizer)
    assert found.protocol["windows"] == len(run._windows) > 10
    assert score(model, task, marking_tokenizer, batch_size=1).examples == found.examples
    short = [{"words": WORDS[:3], "tags": ["O"] * 3}]
    whole, cut = (
        score(model, lc.TokenClassification(short, max_length=most), marking_tokenizer) for most in (None, 30)
    )
    assert whole.examples == cut.examples


def test_tags_by_index_by_name_and_from_a_data_set(tmp_path, tokenizer) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    # The data set counts its classes in another order than the model: the names decide.
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=NAMES[::-1]))})
    rows = Dataset.from_dict({"tokens": [["ada", "x"]], "ner_tags": [[3, 4]]}, features=features)
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps({"tokens": ["ada", "x"], "tags": ["B-PER", "O"]}))
    sources = [
        rows,
        DatasetDict({"test": rows}),
        lines,
        [{"words": ["ada", "x"], "labels": [1, 0]}],
        [(["ada", "x"], ["B-PER", "O"])],
    ]
    for source in sources:
        found = score(tagger(), lc.TokenClassification(source), tokenizer)
        assert found.examples[0].label == ("B-PER", "O")
        assert found.classes == NAMES
    assert lc.TokenClassification(sources[-1]).shown(0) == "ada x"


def test_tags_that_are_no_scheme_have_accuracy_alone(tokenizer) -> None:
    assert not is_scheme(["O", "NOUN"])
    found = score(tagger(names=("NOUN", "VERB")), lc.TokenClassification([(["a", "b"], ["NOUN", "VERB"])]), tokenizer)
    assert (found.primary, sorted(found.metrics)) == ("accuracy", ["accuracy"])


def test_a_word_without_pieces_is_outside_and_told(tokenizer) -> None:
    found = score(tagger(), lc.TokenClassification([(["ada", "", "b"], ["O", "B-PER", "O"])]), tokenizer)
    assert found.examples[0].prediction[1] == "O"
    assert found.warnings[0] == "1 words left no piece that the model could tag"


def test_token_classification_refuses_what_it_cannot_do(tokenizer) -> None:
    def refused(error, match, data, model=None):
        with pytest.raises(error, match=match):
            score(model or tagger(), lc.TokenClassification(data), tokenizer)

    refused(ConfigError, r"data\[0\] has the tag 'B-PRE'.*did you mean 'B-PER'", [(["x"], ["B-PRE"])])
    refused(ConfigError, r"data\[1\] must have tags in \[0, 5\), got 5", [(["x"], [0]), (["x"], [5])])
    refused(ConfigError, r"data\[0\] must have tags in \[0, 5\), got -100", [(["x"], [-100])])
    refused(ConfigError, r"data\[0\] must have a list of words and one tag a word", [(["x", "y"], ["O"])])
    refused(ConfigError, r"data\[0\] must have words in one of", [{"text": "x y", "tags": ["O"]}])
    refused(MissingInputError, r"data\[0\] has no tags", [{"tokens": ["x"]}])
    refused(MissingInputError, "is empty", [])
    refused(
        UnsupportedModelError,
        "head that tags tokens.*AutoModelForTokenClassification",
        [(["x"], [0])],
        tiny_model("bert"),
    )
    with pytest.raises(ConfigError, match="max_length must be at most 512"):
        score(tagger(), lc.TokenClassification([(["x"], [0])], max_length=600), tokenizer)
    model = tagger()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~")["input_ids"][0]] = math.nan
    refused(CompressionError, "NaN or infinity for example 1 of the data", [(["x"], [0]), (["a", "~"], [0, 0])], model)


def test_a_tokenizer_that_does_not_mark_words_is_told(tokenizer) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = score(tagger(), lc.TokenClassification([(["x"], [0])]), tokenizer)
    assert "add_prefix_space=True" in found.warnings[0]


# --- masked language modelling ---------------------------------------------------------------------------------------


def masked_model(family: str = "bert", **settings):
    from transformers import AutoConfig, AutoModelForMaskedLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        family, **sizes, intermediate_size=64, initializer_range=0.2, pad_token_id=0, **settings
    )
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config).eval()


TEXTS = ["the cat sat on the mat", "no rain today", "a", "one and two is three, and so on"]


@torch.inference_mode()
def naive_pll(model, tokenizer, text: str) -> list[float]:
    ids = tokenizer(text)["input_ids"]
    found = []
    for place in range(1, len(ids) - 1):
        masked = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
        found.append(-float(model(input_ids=torch.tensor([masked])).logits[0, place].log_softmax(-1)[ids[place]]))
    return found


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_pseudo_likelihood_equals_a_naive_loop(family: str, batch_size: int, marking_tokenizer) -> None:
    model = masked_model(family)
    found = score(model, lc.MaskedLanguageModeling(TEXTS), marking_tokenizer, batch_size=batch_size)
    every = [naive_pll(model, marking_tokenizer, text) for text in TEXTS]
    assert [one.weight for one in found.examples] == [len(text) for text in TEXTS]
    assert [one.values["nll"] for one in found.examples] == pytest.approx([sum(v) / len(v) for v in every], rel=1e-5)
    mean = sum(map(sum, every)) / sum(map(len, every))
    assert found.metrics["nll"] == pytest.approx(mean, rel=1e-5)
    assert found.metrics["pseudo_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.protocol["tokens_masked"] == sum(map(len, TEXTS))


def test_order_of_texts_changes_no_score(marking_tokenizer) -> None:
    model = masked_model()
    one = score(model, lc.MaskedLanguageModeling(TEXTS), marking_tokenizer).examples
    other = score(model, lc.MaskedLanguageModeling(TEXTS[::-1]), marking_tokenizer, batch_size=3).examples[::-1]
    assert [a.values["nll"] for a in one] == pytest.approx([b.values["nll"] for b in other], rel=1e-5)


def test_positions_can_be_capped(marking_tokenizer) -> None:
    assert _evenly_spaced(9, 3) == [0, 4, 8]
    assert _evenly_spaced(5, 1) == [2]
    assert _evenly_spaced(2, 3) == [0, 1]
    for count in range(2, 40):
        for most in range(2, count + 1):
            chosen = _evenly_spaced(count, most)
            assert len(set(chosen)) == most
            assert (chosen[0], chosen[-1]) == (0, count - 1)
    model = masked_model()
    found = score(model, lc.MaskedLanguageModeling(TEXTS, max_positions=3), marking_tokenizer)
    for text, one in zip(TEXTS, found.examples, strict=True):
        values = [naive_pll(model, marking_tokenizer, text)[place] for place in _evenly_spaced(len(text), 3)]
        assert one.values["nll"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert found.protocol["max_positions"] == 3
    assert found.protocol["positions"] == "evenly spaced, from the first to the last"


def test_long_texts_are_cut_and_told(marking_tokenizer) -> None:
    task = lc.MaskedLanguageModeling(["abcdefghij" * 3, "abcdefgh"], max_length=10)
    found = score(masked_model(), task, marking_tokenizer)
    assert found.protocol["truncated"] == 1  # exactly as long as the limit is not cut
    assert found.warnings == ("1 of 2 texts were cut to 10 tokens",)


def test_masked_language_modeling_refuses_what_it_cannot_do(marking_tokenizer) -> None:
    task = lc.MaskedLanguageModeling(TEXTS)
    with pytest.raises(UnsupportedModelError, match=r"needs a masked language model.*LanguageModeling"):
        score(tiny_model("llama"), task, marking_tokenizer)
    with pytest.raises(ConfigError, match=r"data\[1\] must have a token to mask"):
        score(masked_model(), lc.MaskedLanguageModeling(["a", "<s>"]), marking_tokenizer)
    with pytest.raises(ConfigError, match=r"max_positions must be an integer in \[1, inf\), got 0"):
        lc.MaskedLanguageModeling(TEXTS, max_positions=0)
    model = masked_model()
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[20:] = math.nan
    with pytest.raises(CompressionError, match="NaN or infinity for example 0 of the data, token 1"):
        score(model, task, marking_tokenizer, batch_size=100)
    marking_tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="must have a mask token"):
        score(masked_model(), task, marking_tokenizer)


# --- multiple choice -------------------------------------------------------------------------------------------------

ROWS = [
    {"question": "what is the colour of the sky", "choices": ["blue", "green and red", "no"], "answer": "A"},
    {"question": "two and two", "choices": ["4", "5", "3", "6"], "answer": 0},  # one token each
    {"question": "", "choices": ["a cat", "a dog that ran"], "answer": 1},
    {"question": "an open question: ", "choices": ["x", "yy"], "answer": "yy"},
]


def causal_model(family: str, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": 128, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, **ids, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def small_llama(most: int = 512):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return causal_model("llama", **sizes, max_position_embeddings=most)


def small_gpt2(most: int = 512):
    return causal_model("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=most)


def likelihoods(task, model, tokenizer, batch_size: int = 4) -> list[list[float]]:
    run = task.start(model, tokenizer, batch_size=batch_size)
    advance({"model": run}, title="", progress=False)
    return run.loglikelihoods


def by_lm_eval(task, model, tokenizer) -> list[list[float]]:
    """The same requests, through lm-eval's own tokenisation, truncation and scoring."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    requests = [
        Instance("loglikelihood", {}, (task.template.format(question=example.question), task.delimiter + choice), 0)
        for example in task.examples
        for choice in example.choices
    ]
    found = iter(value for value, _ in runner.loglikelihood(requests, disable_tqdm=True))
    return [[next(found) for _ in example.choices] for example in task.examples]


@torch.inference_mode()
@pytest.mark.parametrize("build", [small_llama, small_gpt2, lambda: tiny_model("opt")])
def test_choices_equal_a_naive_loop_whatever_the_batch(build, tokenizer) -> None:
    model, task = build(), lc.MultipleChoice(ROWS)
    alone, together = (likelihoods(task, model, tokenizer, batch_size) for batch_size in (1, 7))
    for row, found, other in zip(ROWS, alone, together, strict=True):
        assert found == pytest.approx(other, abs=1e-4)
        context = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        for choice, value in zip(row["choices"], found, strict=True):
            ids = torch.tensor([[*context, *tokenizer(f" {choice}")["input_ids"]]])
            log = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert value == pytest.approx(float(log[len(context) - 1 :].sum()), abs=1e-4)
    turned = likelihoods(lc.MultipleChoice(ROWS[::-1]), model, tokenizer, 3)[::-1]
    assert [one for row in turned for one in row] == pytest.approx([one for row in alone for one in row], abs=1e-4)


def test_accuracy_raw_and_by_length_by_hand(tokenizer) -> None:
    model, task = small_llama(), lc.MultipleChoice(ROWS)
    found = score(model, task, tokenizer)
    for row, values, one in zip(task.examples, likelihoods(task, model, tokenizer), found.examples, strict=True):
        norms = np.array(values) / [len(choice) for choice in row.choices]
        assert one.prediction == int(np.argmax(values))
        assert one.values == {
            "accuracy": float(np.argmax(values) == row.answer),
            "accuracy_norm": float(np.argmax(norms) == row.answer),
        }
        assert one.confidence == pytest.approx(float(np.exp(values).max() / np.exp(values).sum()))
    assert found.metrics["accuracy"] == sum(one.values["accuracy"] for one in found.examples) / len(ROWS)
    # the four one-token answers of one question are read from one row
    assert (found.protocol["choices"], found.protocol["forward_rows"]) == (11, 8)


@pytest.mark.parametrize("build", [small_llama, small_gpt2])
@pytest.mark.parametrize("settings", [{}, {"template": "{question}"}, {"template": "{question} ", "delimiter": ""}])
def test_likelihoods_are_those_of_lm_eval(build, settings, tokenizer) -> None:
    # lm-eval has no answer to a question of nothing but spaces.
    rows = [row for row in ROWS if row["question"] or settings.get("template") != "{question} "]
    task, model = lc.MultipleChoice(rows, **settings), build()
    ours, theirs = likelihoods(task, model, tokenizer), by_lm_eval(task, model, tokenizer)
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_likelihoods_are_those_of_lm_eval_with_bos_and_without_room(bos_tokenizer) -> None:
    rows = [*ROWS, {"question": "<s>it begins itself", "choices": ["a", "bc"], "answer": 0}]
    task, model = lc.MultipleChoice(rows, template="{question}"), small_gpt2(most=20)
    ours, theirs = likelihoods(task, model, bos_tokenizer), by_lm_eval(task, model, bos_tokenizer)
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    found = score(model, task, bos_tokenizer)
    assert found.protocol["truncated"] == 4
    assert "lost their beginning: 20 tokens" in found.warnings[0]


def test_pairs_by_hand(bos_tokenizer) -> None:
    def texts(context: str, continuation: str) -> list[str]:
        [found] = encode_pairs([(context, continuation)], bos_tokenizer)
        return ["".join(bos_tokenizer.convert_ids_to_tokens(ids)) for ids in found]

    assert texts("ab", " c") == ["<s>ab", " c"]
    assert texts("ab ", "c") == ["<s>ab", " c"]  # the space goes to the continuation
    assert texts("", "c") == ["<s>", "c"]
    assert texts("", "<s>c") == ["<s>", "c"]
    assert texts("<s>ab", "c") == ["<s>ab", "c"]


def test_a_tokenizer_that_ends_every_text_is_told(marking_tokenizer) -> None:
    found = score(small_llama(), lc.MultipleChoice(ROWS), marking_tokenizer)
    assert found.warnings[0].startswith("the tokenizer ends every text with token 3")


def test_choices_in_the_formats_of_the_hub() -> None:
    arc = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    mmlu = {"question": "q", "choices": ["x", "y"], "answer": 1}
    hellaswag = {"ctx": "q", "endings": ["x", "y"], "label": "1"}
    piqa = {"goal": "q", "sol1": "x", "sol2": "y", "label": 1}
    letter = ("q", ["x", "y"], "B")
    for row in (arc, mmlu, hellaswag, piqa, letter):
        found = read_question(row, "data[0]")
        assert (found.question, found.choices, found.answer) == ("q", ("x", "y"), 1)
    assert lc.MultipleChoice([mmlu]).shown(0) == "q (A) x (B) y"


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        ({"text": ["two", "three", "four"], "label": [1, 2, 3]}, 1, 0),
        ({"text": ["two", "three", "four"], "label": [1, 2, 3]}, "1", 0),
        ({"text": ["two", "three", "four"], "label": ["A", "B", "C"]}, 1, 1),
        (["0", "1", "2"], "1", 1),
        (["1", "2", "3"], 2, 2),
        (["1", "2", "3"], np.int64(2), 2),
        (["1", "2", "3"], "3", 2),
    ],
)
def test_answers_among_numbers(choices, answer, expected: int) -> None:
    assert read_question({"question": "q", "choices": choices, "answer": answer}, "data[0]").answer == expected


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (["1", "2", "3", "4"], "2", "got '2', which is choice 2 as an index and choice 1 as a text"),
        (["B", "A"], "A", "got 'A', which is choice 0 as a letter and choice 1 as a text"),
    ],
)
def test_an_answer_of_two_meanings_is_refused(choices, answer, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\[0\] must have an answer .* {message}.*pass the index as an integer"):
        read_question({"question": "q", "choices": choices, "answer": answer}, "data[0]")


def test_multiple_choice_refuses_what_it_cannot_do(tokenizer) -> None:
    def row(**changed):
        return [{"question": "q", "choices": ["x", "y"], "answer": 0, **changed}]

    for answer in (2, "C", "z", -2, True):
        with pytest.raises(
            ConfigError, match=r"data\[0\] must have as answer one of its 2 choices: a letter \(A to B\)"
        ):
            lc.MultipleChoice(row(answer=answer))
    for answer in (None, -1, ""):
        with pytest.raises(MissingInputError, match=r"data\[0\] has no answer"):
            lc.MultipleChoice(row(answer=answer))
    for choices in (["x"], "xy", None, ["x", ""]):
        with pytest.raises(ConfigError, match=r"data\[0\] must have a list of at least two texts"):
            lc.MultipleChoice(row(choices=choices))
    with pytest.raises(ConfigError, match=r"data\[0\] must have a text in one of the columns question"):
        lc.MultipleChoice([{"choices": ["x", "y"], "answer": 0}])
    for template in ("no field", "{question} {other}", "{question", "{}"):
        with pytest.raises(ConfigError, match="template must have the one field"):
            lc.MultipleChoice(row(), template=template)
    for family in ("bert", "t5"):
        with pytest.raises(UnsupportedModelError, match="needs a causal language model"):
            score(tiny_model(family), lc.MultipleChoice(row()), tokenizer)
    with pytest.raises(ConfigError, match="choices of 1 to 8 tokens"):
        score(small_gpt2(most=8), lc.MultipleChoice(row(choices=["x", "longer than it"])), tokenizer)
    model = small_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("~")["input_ids"][0]] = math.nan
    with pytest.raises(CompressionError, match="NaN or infinity for choice 1 of example 0"):
        score(model, lc.MultipleChoice(row(choices=["x", "~y"])), tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither BOS nor EOS"):
        score(small_llama(), lc.MultipleChoice(row(question=""), template="{question}"), tokenizer)


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_compare_tells_fidelity_and_flips(marking_tokenizer) -> None:
    mcq = lc.MultipleChoice(ROWS)
    models = {"base": small_llama(), "same": small_llama(), "other": tiny_model("llama")}
    found = lc.compare(models, mcq, tokenizer=marking_tokenizer, latency=False, progress=False)
    same, other = (found[name].change for name in ("same", "other"))
    assert (same.flips[0].agreement, same.fidelity[0].kl_mean) == (1.0, pytest.approx(0, abs=1e-6))
    assert other.fidelity[0].kl_mean > 0.01
    assert {test.metric for test in same.tests[0]} == {"accuracy", "accuracy_norm"}
    for models, task in (
        ({"base": tagger(), "same": tagger()}, lc.TokenClassification(sentences())),
        ({"base": masked_model(), "same": masked_model()}, lc.MaskedLanguageModeling(TEXTS)),
    ):
        found = lc.compare(models, task, tokenizer=marking_tokenizer, latency=False, progress=False)
        fidelity = found["same"].change.fidelity[0]
        expected = len(TEXTS) and sum(map(len, TEXTS)) if isinstance(task, lc.MaskedLanguageModeling) else None
        assert fidelity.answers == (expected or sum(len(row["tokens"]) for row in sentences()))
        assert fidelity.top1_agreement == 1.0
        assert lc.Comparison.from_json(found.to_json()) == found


# --- lm-eval ---------------------------------------------------------------------------------------------------------

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{rest}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  max_gen_toks: 4
  until: ["\\n"]
metric_list:
  - metric: exact_match
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
"""
MCQ = [
    {"question": row["question"], "choices": row["choices"], "answer": row["answer"]}
    for row in (ROWS[0] | {"answer": 0}, ROWS[1], ROWS[2], ROWS[3] | {"answer": 1})
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tasks of lm-eval's kind on local data."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(MCQ))
    for name, rest in (("tiny_mcq", CHOICE), ("tiny_text", GENERATE), ("tiny_rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(YAML.format(name=name, data=data, rest=rest))
    return tmp_path


def test_lm_eval_on_the_model_in_memory(folder, tokenizer) -> None:
    model, ours = small_llama(), lc.MultipleChoice(MCQ)
    tokenizer.pad_token = None
    model.train()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), float(np.random.random()), float(torch.rand(1))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    task = LMEvalTask("tiny_mcq", include_path=folder)
    found = score(model, task, tokenizer, batch_size=2)
    assert (random.random(), float(np.random.random()), float(torch.rand(1))) == expected
    assert model.training
    assert tokenizer.pad_token is None
    assert "tie_weights" not in vars(model)
    same = score(model, ours, tokenizer)
    assert found.metrics == same.metrics
    assert [one.values for one in found.examples] == [one.values for one in same.examples]
    assert [(one.label, one.prediction) for one in found.examples] == [(o.label, o.prediction) for o in same.examples]
    assert found.primary == "accuracy"
    assert set(found.intervals) == {"accuracy", "accuracy_norm"}
    assert task.shown(1) == "Question: two and two\nAnswer: 4 | 5 | 3 | 6"
    limited = score(model, LMEvalTask(["tiny_mcq"], include_path=folder, limit=2), tokenizer)
    assert [one.values for one in limited.examples] == [one.values for one in found.examples[:2]]
    assert limited.protocol["data_sha256"] != found.protocol["data_sha256"]


def test_several_tasks_of_lm_eval_have_an_average(folder, tokenizer) -> None:
    task = LMEvalTask("tiny_mcq, tiny_text", include_path=folder, num_fewshot=0)
    found = score(small_llama(), task, tokenizer)
    parts = [found.metrics["tiny_mcq/accuracy"], found.metrics["tiny_text/exact_match"]]
    assert (found.primary, found.value) == ("average", pytest.approx(sum(parts) / 2))
    assert len(found.examples) == 2 * len(MCQ)
    assert all(isinstance(one.prediction, str) for one in found.examples[len(MCQ) :])
    models = {"base": small_llama(), "other": tiny_model("llama")}
    change = lc.compare(models, task, tokenizer=tokenizer, latency=False, progress=False)["other"].change
    assert {test.metric for test in change.tests[0]} == set(found.metrics)


def test_lm_eval_leaves_compressed_weights_alone(folder, tokenizer) -> None:
    quantized = lc.compress(tiny_model("llama"), "dynamic_quantization", progress=False).model
    loose = tiny_model("llama")  # its config says that the head is tied to the embeddings, and it no longer is
    loose.lm_head.weight = torch.nn.Parameter(loose.lm_head.weight.flip(0).clone())
    for model in (quantized, loose):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = score(model, LMEvalTask("tiny_mcq", include_path=folder), tokenizer)
        assert found.metrics == score(model, lc.MultipleChoice(MCQ), tokenizer).metrics
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_groups_of_lm_eval(folder, tokenizer) -> None:
    group = "group: tiny_group\ntask: [tiny_mcq, tiny_text]\naggregate_metric_list:\n  - metric: acc\n"
    (folder / "tiny_group.yaml").write_text(group)
    found = score(small_llama(), LMEvalTask("tiny_group", include_path=folder), tokenizer)
    assert found.protocol["tasks"] == "tiny_mcq, tiny_text"
    assert found.protocol["tiny_group/acc,none"] == found.metrics["tiny_mcq/accuracy"]


def test_lm_eval_task_refuses_what_it_cannot_do(folder, tokenizer, monkeypatch) -> None:
    def task(data="tiny_mcq", **settings):
        return LMEvalTask(data, include_path=folder, **settings)

    with pytest.raises(MissingInputError, match="name at least one task"):
        task([])
    with pytest.raises(ConfigError, match="must be a list of lm-eval's names"):
        task([1])
    with pytest.raises(MissingInputError, match="there is no folder"):
        LMEvalTask("tiny_mcq", include_path=folder / "absent")
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="limit must be a count"):
            task(limit=limit)
    with pytest.raises(ConfigError, match=r"num_fewshot must be an integer in \[0, inf\)"):
        task(num_fewshot=-1)
    with pytest.raises(UnsupportedModelError, match="needs a language model"):
        score(tiny_model("bert"), task(), tokenizer)
    with pytest.raises(ConfigError, match=r"tiny_rolling has no metric that is a mean over examples.*LanguageModeling"):
        score(small_llama(), task("tiny_rolling"), tokenizer)
    broken = small_llama()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(CompressionError, match="NaN or infinity for document 0 of tiny_mcq"):
        score(broken, task(), tokenizer)
    (folder / "rows.json").unlink()
    with pytest.raises(MissingInputError, match="can be neither found nor downloaded"):
        score(small_llama(), task(), tokenizer)
    # The index with all of lm-eval's own tasks takes long to read: a small one stands in for it.
    monkeypatch.setattr("llmcompress.evaluation.tasks.lm_eval_task._index_of", lambda path, all: _index_of(path, False))
    with pytest.raises(UnknownNameError, match=r"no task called 'tiny_mqc'; did you mean 'tiny_mcq'\?"):
        task("tiny_mqc")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    _index_of.cache_clear()
    with pytest.raises(MissingInputError, match=re.escape("pip install llmcompress[eval]")):
        task()


# --- real data -------------------------------------------------------------------------------------------------------


def arc_easy(count: int) -> list[dict]:
    """Questions of ARC-Easy; in the asset the choices stand inside the prompt."""
    rows = json.loads((ASSETS / "mcq" / "ARC-Easy.test.json").read_text())[:count]
    found = []
    for row in rows:
        question, choices, _ = row["instruction"].split(": ", 1)[1].rsplit("\n\n", 2)
        texts = re.split(r" ?Answer\d+: ", choices)[1:]
        found.append({"question": question, "choices": texts, "answer": int(row["answer"].removeprefix("answer")) - 1})
    return found


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no folder {ASSETS}")
def test_arc_easy_equals_lm_eval_on_a_trained_llama() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "stories260K-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    task = lc.MultipleChoice(arc_easy(40))
    ours, theirs = likelihoods(task, model, tokenizer, 16), by_lm_eval(task, model, tokenizer)
    assert sum(map(len, ours)) > 150
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    right = [int(np.argmax(row) == example.answer) for row, example in zip(theirs, task.examples, strict=True)]
    assert score(model, task, tokenizer).metrics["accuracy"] == pytest.approx(sum(right) / len(right))
