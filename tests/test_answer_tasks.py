"""Tasks whose answer is a text: SQuAD's metrics and windows, generation and its metrics, the user's own functions."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import string
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.errors import CheckpointError, CompressionError, ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.evaluation.scoring import score_models
from llmcompress.evaluation.tasks import CustomTask, ExampleResult, QuestionAnswering, TextGeneration
from llmcompress.evaluation.tasks.overlap import bleu, chrf
from llmcompress.evaluation.tasks.prompts import read_prompts
from llmcompress.evaluation.tasks.question_answering import best_spans
from llmcompress.evaluation.tasks.repetition import collapse_warnings, loops
from llmcompress.evaluation.tasks.squad import exact_match, f1
from llmcompress.questions import read_questions
from llmcompress.testing import tiny_model

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
XQUAD = ASSETS / "xquad" / "xquad.en.json"


def score(model, task, tokenizer, **settings):
    found = task.evaluate(model, tokenizer, progress=False, **settings)
    assert set(found.metrics) <= set(task.metric_names)  # by which wrong names are refused before any work
    return found


# --- SQuAD's metrics -------------------------------------------------------------------------------------------------


def official(prediction: str, gold: list[str]) -> tuple[float, float]:
    """The rules of evaluate-v2.0.py, written down step by step and without ours."""

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        text = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text)
        return text.split()

    gold = [answer for answer in gold if words(answer)] or [""]
    matches, shares = [], []
    for answer in gold:
        theirs, ours = words(answer), words(prediction)
        matches.append(int(" ".join(theirs) == " ".join(ours)))
        common = sum(min(count, Counter(ours)[word]) for word, count in Counter(theirs).items())
        if not theirs or not ours:
            shares.append(float(theirs == ours))
        elif common == 0:
            shares.append(0.0)
        else:
            precision, recall = common / len(ours), common / len(theirs)
            shares.append(2 * precision * recall / (precision + recall))
    return float(max(matches)), max(shares)


@pytest.mark.parametrize(
    ("prediction", "answers", "match", "share"),
    [
        ("The Rome!", ["rome"], 1, 1),
        ("Rome  in\tItaly", ["rome in italy"], 1, 1),
        ("old Rome", ["Rome", "old old Rome"], 0, 4 / 5),
        ("Rome Rome", ["Rome"], 0, 2 / 3),
        ("theatre", ["the theatre"], 1, 1),  # an article is a word, not the beginning of one
        ("a-b", ["ab"], 1, 1),  # punctuation goes without leaving a blank
        ("U.S.", ["us"], 1, 1),
        ("Milan", ["Rome"], 0, 0),
        ("", ["Rome"], 0, 0),
        ("Rome", [], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("x", ["the", "x"], 1, 1),
        ("", ["the"], 1, 1),
    ],
)
def test_squad_metrics_by_hand(prediction: str, answers: list[str], match: float, share: float) -> None:
    assert (exact_match(prediction, answers), f1(prediction, answers)) == pytest.approx((match, share))
    assert official(prediction, answers) == pytest.approx((match, share))


@pytest.mark.assets
@pytest.mark.skipif(not XQUAD.is_file(), reason="xquad is not there")
def test_squad_metrics_on_all_of_xquad_equal_the_official_definition() -> None:
    task, dice = QuestionAnswering(XQUAD), random.Random(0)
    assert len(task.examples) == 1190
    assert task.groups is not None
    assert len(set(task.groups)) == 240
    for question in task.examples:
        gold = dice.choice(question.answers)
        assert gold in question.context
        at = question.context.index(gold)
        perturbed = [
            gold,
            f"The {gold.upper()}!",
            question.context[max(0, at - dice.randrange(12)) : at + len(gold) + dice.randrange(12)],
            " ".join(dice.sample(gold.split(), k=max(1, len(gold.split()) - 1))),
            dice.choice(question.context.split()),
            "",
        ]
        for text in perturbed:
            assert (exact_match(text, question.answers), f1(text, question.answers)) == pytest.approx(
                official(text, list(question.answers)), abs=1e-12
            )


def test_questions_come_in_every_layout(tmp_path) -> None:
    hub = {"question": "q", "context": "a b", "answers": {"text": ["a", "a", "b"], "answer_start": [0, 0, 2]}}
    nested = {"question": "q", "id": "1", "answers": [{"text": "a", "answer_start": 0}, {"text": "b"}]}
    impossible = {**nested, "is_impossible": True, "plausible_answers": nested["answers"], "answers": []}
    file = tmp_path / "squad.json"
    file.write_text(
        json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": "a b", "qas": [nested, impossible]}]}]})
    )
    read = [(one.question, one.context, one.answers) for one in QuestionAnswering(file).examples]
    assert read == [("q", "a b", ("a", "b")), ("q", "a b", ())]
    for row in (hub, ("q", "a b", ["a", "b"]), {"question": "q", "context": "a b", "answer": ["a", "b"]}):
        assert [one.answers for one in read_questions([row], "data")] == [("a", "b")]
    assert read_questions([("q", "a b", "a")], "data")[0].answers == ("a",)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            {"context": "c", "answers": []},
            ConfigError,
            r"data\[1\] must have a text in the column 'question', got None",
        ),
        ({"question": "q", "context": " ", "answers": []}, ConfigError, r"data\[1\] must have a text in .* 'context'"),
        ({"question": "q", "context": "c"}, MissingInputError, r"data\[1\] has no answers"),
        (("q", "c", 3), ConfigError, r"data\[1\] must have texts as answers, got 3"),
        (("q", "c", [1]), ConfigError, r"data\[1\] must have texts as answers"),
        ("q", ConfigError, r"data\[1\] must be a dict or \(question, context, answers\), got 'q'"),
    ],
)
def test_rows_that_are_no_questions_are_named(row, error, message: str) -> None:
    with pytest.raises(error, match=message):
        QuestionAnswering([("q", "c", "a"), row])


# --- question answering ----------------------------------------------------------------------------------------------

CONTEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun is up again. " * 3


@pytest.fixture
def reader():
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForQuestionAnswering(BertConfig(**sizes, intermediate_size=64, initializer_range=0.2)).eval()


@pytest.fixture
def paired(tokenizer):
    """The tiny tokenizer with BERT's special tokens around a pair."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return tokenizer


def questions(count: int = 6, *, impossible: bool = False):
    rows = []
    for i in range(count):
        context = CONTEXT[7 * i : 7 * i + 60 + 40 * (i % 4)]
        rows.append((f"What is {'so ' * i}?", context, [] if impossible and i % 2 else [context[5:20]]))
    return rows


@torch.inference_mode()
def brute_force(model, tokenizer, question: str, context: str, window: int, stride: int, longest: int):
    """Every span of every window that transformers' own tokenizer cuts, one forward pass each."""
    extra = len(tokenizer(question, "x")["input_ids"]) - 1
    overlap = max(0, window - extra - stride)
    features = tokenizer(
        question,
        context,
        max_length=window,
        stride=overlap,
        truncation="only_second",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best, text, null = -math.inf, "", math.inf
    for number in range(len(features["input_ids"])):
        keys = ("input_ids", "attention_mask", "token_type_ids")
        outputs = model(**{key: torch.tensor([features[key][number]]) for key in keys if key in features})
        start, end = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
        inside = [part == 1 for part in features.sequence_ids(number)]
        offsets = features["offset_mapping"][number]
        null = min(null, start[0] + end[0])
        for i in range(len(start)):
            for j in range(i, min(i + longest, len(start))):
                if inside[i] and inside[j] and start[i] + end[j] > best:
                    best, text = start[i] + end[j], context[offsets[i][0] : offsets[j][1]].strip()
    return text, best, null, len(features["input_ids"])


def shifted(outputs, shift: float):
    """The same outputs, with CLS more likely as a start."""
    outputs.start_logits = outputs.start_logits.clone()
    outputs.start_logits[:, 0] += shift
    return outputs


@pytest.mark.parametrize("window", [48, 64, 300])
@pytest.mark.parametrize("impossible", [False, True])
def test_windows_and_spans_equal_brute_force(window: int, impossible: bool, reader, paired) -> None:
    rows = questions(impossible=impossible)
    if impossible:  # half of the questions are to be declined
        brute = [brute_force(reader, paired, question, context, window, 16, 9) for question, context, _ in rows]
        shift = float(np.median([best - null for _, best, null, _ in brute]))
        reader.register_forward_hook(lambda model, inputs, outputs: shifted(outputs, shift))
    task = QuestionAnswering(rows, window=window, stride=16, max_answer_tokens=9)
    found = score(reader, task, paired, batch_size=4)
    brute = [brute_force(reader, paired, question, context, window, 16, 9) for question, context, _ in rows]
    expected = ["" if impossible and null > best else text for text, best, null, _ in brute]
    assert [one.prediction for one in found.examples] == expected
    assert expected.count("") == (3 if impossible else 0)
    for one, (_, _, answers) in zip(found.examples, rows, strict=True):
        assert (one.values["exact_match"], one.values["f1"]) == pytest.approx(official(one.prediction, answers))
    windows = sum(count for *_, count in brute)
    assert found.protocol["windows"] == windows
    assert (windows > len(rows)) == (window < 300)
    assert found.primary == "f1"
    assert found.metrics["f1"] == pytest.approx(np.mean([one.values["f1"] for one in found.examples]))


def test_batching_changes_no_answer(reader, paired) -> None:
    task = QuestionAnswering(questions(9), window=64, stride=20)
    alone, together = (score(reader, task, paired, batch_size=size) for size in (1, 5))
    assert [one.prediction for one in alone.examples] == [one.prediction for one in together.examples]


def test_the_longest_answer_is_kept_and_ties_go_to_the_shortest() -> None:
    starts, ends = torch.zeros(1, 5), torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]])
    assert best_spans(starts, ends, 3) == ([9.0], [4], [4])
    starts[0, 0] = 4.0
    assert best_spans(starts, ends, 3) == ([9.0], [4], [4])
    assert best_spans(starts, ends, 5) == ([13.0], [0], [4])


def test_questions_on_one_context_are_one_group(reader, paired) -> None:
    rows = [("Who?", "a cat", "cat"), ("What?", "a dog", "dog"), ("Which?", "a cat", "a")]
    assert score(reader, QuestionAnswering(rows), paired).groups == [0, 1, 0]
    assert score(reader, QuestionAnswering(rows[:2]), paired).groups is None


def test_fidelity_compares_starts_and_ends_inside_the_context(reader, paired) -> None:
    import copy

    other = copy.deepcopy(reader)
    with torch.no_grad():
        other.qa_outputs.weight.mul_(1.3)
    task = QuestionAnswering(questions(8, impossible=True), window=64, stride=20)
    models = {"base": reader, "same": copy.deepcopy(reader), "other": other}
    found = score_models(task, models, dict.fromkeys(models, paired), batch_size=3, progress=False)
    windows = found.scores["base"].protocol["windows"]
    same, changed = found.fidelity["same"], found.fidelity["other"]
    assert same.answers == 2 * windows
    assert (same.kl_mean, same.top1_agreement) == (pytest.approx(0, abs=1e-6), 1.0)

    divergences = []
    for row in task.start(reader, paired, batch_size=1).batches:
        ours, theirs = reader(**row.inputs), other(**row.inputs)
        for name in ("start_logits", "end_logits"):
            p, q = (getattr(one, name)[row.scored].detach().softmax(-1) for one in (ours, theirs))
            divergences.append(float((p * (p / q).log()).sum()))
    assert changed.kl_mean == pytest.approx(np.mean(divergences), rel=1e-4)
    assert changed.kl_median == pytest.approx(np.median(divergences), rel=1e-4)
    assert changed.entropy is not None
    assert math.isfinite(changed.entropy)


def test_one_answer_to_all_is_told_as_collapse(reader, paired) -> None:
    with torch.no_grad():
        reader.qa_outputs.weight.zero_()
        reader.qa_outputs.bias.zero_()
    rows = [(f"Q{i}?", "same text", answer) for i, answer in enumerate(["same", "text", "same text"])]
    assert "collapse" in score(reader, QuestionAnswering(rows), paired).warnings[0]


def test_question_answering_refuses_what_it_cannot_do(reader, paired) -> None:
    rows = questions(2)
    with pytest.raises(
        UnsupportedModelError, match=r"needs a model with a question answering head.*got Bert.*AutoModelFor"
    ):
        score(tiny_model("bert"), QuestionAnswering(rows), paired)
    with pytest.raises(ConfigError, match="window must be at most 512 for BertForQuestionAnswering, got 600"):
        score(reader, QuestionAnswering(rows, window=600), paired)
    with pytest.raises(ConfigError, match=r"window must leave room for the context, got 12: the question of data\[0\]"):
        score(reader, QuestionAnswering(rows, window=12), paired)
    with pytest.raises(ConfigError, match=r"stride must be an integer in \[1, inf\), got 0"):
        QuestionAnswering(rows, stride=0)
    with torch.no_grad():
        reader.get_input_embeddings().weight[paired.convert_tokens_to_ids("~")] = math.nan
    with pytest.raises(CompressionError, match="NaN or infinity for example 2 of the data"):
        score(reader, QuestionAnswering([*rows, ("~?", "a text", "text")]), paired)
    paired.backend_tokenizer.post_processor = None
    with pytest.raises(UnsupportedModelError, match="unanswerable questions, which need a tokenizer that puts CLS"):
        score(reader, QuestionAnswering(questions(2, impossible=True)), paired)


def test_question_answering_is_found_by_name() -> None:
    assert isinstance(lc.tasks.create({"name": "question_answering", "data": questions(2)}), lc.QuestionAnswering)


# --- generation ------------------------------------------------------------------------------------------------------

PROMPTS = [
    ("the cat sat on", "a mat"),
    ("once", "upon a time"),
    ("a much longer prompt, which is padded to", "x"),
    ("no", "y"),
]


@torch.inference_mode()
def greedy(model, tokenizer, prompt: str, steps: int) -> list[int]:
    """One prompt, no padding, no cache: the most likely token, again and again."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    decodes = model.config.is_encoder_decoder
    made = torch.tensor([[model.config.decoder_start_token_id]]) if decodes else ids
    new: list[int] = []
    for _ in range(steps):
        logits = model(input_ids=ids, decoder_input_ids=made).logits if decodes else model(input_ids=made).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
        made = torch.cat([made, torch.tensor([[token]])], dim=1)
    return new


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "mixtral", "t5"])
def test_padding_and_batching_change_no_text(family: str, tokenizer) -> None:
    model = tiny_model(family, seed=3)
    found = score(model, TextGeneration(PROMPTS, max_new_tokens=12), tokenizer, batch_size=3)
    for (prompt, reference), one in zip(PROMPTS, found.examples, strict=True):
        ids = greedy(model, tokenizer, prompt, 12)
        assert one.prediction == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert one.values["tokens"] == len(ids)
        assert one.label == reference
    assert found.metrics["tokens"] == pytest.approx(np.mean([one.values["tokens"] for one in found.examples]))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beams_are_those_of_generate_alone(family: str, tokenizer) -> None:
    model = tiny_model(family, seed=1)
    found = score(model, TextGeneration(PROMPTS, max_new_tokens=8, num_beams=3), tokenizer, batch_size=2)
    for (prompt, _), one in zip(PROMPTS, found.examples, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False)[0]
        start = 1 if family == "t5" else inputs["input_ids"].shape[1]
        assert one.prediction == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert found.protocol["decoding"] == "beam search, 3 beams"


def speaking(model, tokenizer, text: str):
    """Make `model` say `text` after any prompt that ends in its first letter, by a table of what follows what."""
    table = torch.full((128, 128), -30.0)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for now, then in itertools.pairwise(ids):
        table[now, then] = 30.0

    def told(module, args, kwargs, outputs):
        outputs.logits = table[kwargs["input_ids"]]
        return outputs

    model.register_forward_hook(told, with_kwargs=True)
    return model


def test_a_text_ends_at_the_end_token_or_before_a_stop_string(tokenizer) -> None:
    data = [("say a", "x"), ("and a", "b")]
    model = speaking(tiny_model("llama"), tokenizer, "abcdefg")
    found = score(model, TextGeneration(data, max_new_tokens=30), tokenizer)
    assert [one.prediction for one in found.examples] == [tokenizer.decode(tokenizer("bcdefg")["input_ids"])] * 2
    assert [one.values["tokens"] for one in found.examples] == [6, 6]
    assert found.protocol["texts_cut_at_max_new_tokens"] == 0
    stop = tokenizer.decode(tokenizer("de")["input_ids"])
    stopped = score(model, TextGeneration(data, max_new_tokens=30, stop=[stop, "zzz"]), tokenizer)
    assert [one.prediction for one in stopped.examples] == [tokenizer.decode(tokenizer("bc")["input_ids"])] * 2
    assert [one.values["tokens"] for one in stopped.examples] == [4, 4]  # it took four to see "de"
    cut = score(model, TextGeneration(data, max_new_tokens=1), tokenizer)
    assert [one.prediction for one in cut.examples] == ["b", "b"]
    assert [one.values["exact_match"] for one in cut.examples] == [0, 1]
    assert cut.protocol["texts_cut_at_max_new_tokens"] == 2


def test_a_prompt_too_long_keeps_its_end_in_a_decoder(tokenizer) -> None:
    model = tiny_model("gpt2")
    task = TextGeneration([("x" * 90 + "abc", "r"), ("abc", "r")], max_new_tokens=4, max_prompt_tokens=3)
    found = score(model, task, tokenizer)
    first, second = found.examples
    assert first.prediction == second.prediction
    assert found.protocol["prompts_cut"] == 1
    assert "1 of 2 prompts were cut to 3 tokens" in found.warnings
    encoder = score(
        tiny_model("t5"), TextGeneration([("abc" + "x" * 90, "r"), ("abc", "r")], max_prompt_tokens=3), tokenizer
    )
    assert encoder.examples[0].prediction == encoder.examples[1].prediction


SENTENCES = [
    ("the cat sat on the mat", ["the cat sat on a mat", "a cat was sitting on the mat"]),
    ("there is a dog in the big garden", ["a dog is in the garden"]),
    ("", ["nothing was said here at all"]),
    ("completely other words", ["the reference shares none", "not even one of them", "at all"]),
    ("he went home, and then he slept.", ["he went home and slept."]),
    ("exactly the same sentence here", ["exactly the same sentence here"]),
]


def corpus_score(metric, texts: list[str], references: list[list[str]]) -> float:
    most = max(map(len, references))
    streams = [[one[at] if at < len(one) else None for one in references] for at in range(most)]
    return metric.corpus_score(texts, streams).score


def test_bleu_and_chrf_are_sacrebleus_on_every_resample() -> None:
    sacrebleu = pytest.importorskip("sacrebleu.metrics")
    texts, references = [text for text, _ in SENTENCES], [list(refs) for _, refs in SENTENCES]
    random_counts = np.random.default_rng(0).multinomial(len(texts), [1 / len(texts)] * len(texts), size=60)
    # ... and each alone: most of these lack the matches of some order
    counts = np.concatenate([np.ones((1, len(texts)), int), np.eye(len(texts), dtype=int), random_counts]).astype(float)
    for name, ours, theirs in (("bleu", bleu, sacrebleu.BLEU()), ("chrf", chrf, sacrebleu.CHRF())):
        metric, signature = ours(texts, references)
        found = metric(counts)[name]
        for row, value in zip(counts.astype(int), found, strict=True):
            drawn = np.repeat(np.arange(len(texts)), row)
            expected = corpus_score(theirs, [texts[i] for i in drawn], [references[i] for i in drawn])
            assert value == pytest.approx(expected, abs=1e-6)
        assert found[0] > 0
        assert signature.startswith("nrefs:var|")


def test_metrics_of_a_task_are_the_libraries_own(tokenizer, monkeypatch) -> None:
    sacrebleu, rouge_scorer = pytest.importorskip("sacrebleu.metrics"), pytest.importorskip("rouge_score.rouge_scorer")
    from llmcompress.evaluation.tasks.decoding import Writer, Written

    said = [Written(text, len(text.split()), True, False) for text, _ in SENTENCES]
    monkeypatch.setattr(Writer, "write", lambda self, **_: said)
    task = TextGeneration([(f"prompt {i}", refs) for i, (_, refs) in enumerate(SENTENCES)], stemmer=False)
    found = score(tiny_model("llama"), task, tokenizer)
    texts, references = [text for text, _ in SENTENCES], [list(refs) for _, refs in SENTENCES]
    assert found.metrics["bleu"] == pytest.approx(corpus_score(sacrebleu.BLEU(), texts, references), abs=1e-6)
    assert found.metrics["chrf"] == pytest.approx(corpus_score(sacrebleu.CHRF(), texts, references), abs=1e-6)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [max(scorer.score(ref, text)[name].fmeasure for ref in refs) for text, refs in SENTENCES]
        assert [one.values[name] for one in found.examples] == pytest.approx(each)
        assert found.metrics[name] == pytest.approx(np.mean(each))
    assert found.metrics["exact_match"] == pytest.approx(1 / 6)
    assert found.primary == "rougeL"
    assert found.protocol["bleu"] == "nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:" + version("sacrebleu")
    low, high = found.intervals["bleu"]
    assert 0 <= low < found.metrics["bleu"] < high <= 100
    assert not found.kinds["bleu"].lower_is_better
    assert found.kinds["bleu"].scale == "difference"


def test_rouge_by_hand(tokenizer) -> None:
    from llmcompress.evaluation.tasks.overlap import rouge, rouge_scorer

    # 3 of 4 and 3 of 5 words; pairs: "the cat" of 3 and 4; longest common subsequence: the cat mat
    found = rouge(rouge_scorer(stemmer=False), "the cat on mat", ["the cat and a mat"])
    assert found == pytest.approx({"rouge1": 6 / 9, "rouge2": 2 / 7, "rougeL": 6 / 9})
    assert rouge(rouge_scorer(stemmer=True), "cats running", ["cat run"])["rouge1"] == 1


def test_candidates_are_paired_with_the_base(tokenizer) -> None:
    models = {"base": tiny_model("llama"), "same": tiny_model("llama"), "other": tiny_model("llama", seed=1)}
    data = [(f"prompt {i}", "aaa bbb ccc ddd " * (i % 3 + 1)) for i in range(12)]
    task = TextGeneration(data, max_new_tokens=6, measures=("bleu", "exact_match"))
    found = score_models(task, models, dict.fromkeys(models, tokenizer), progress=False)
    tests = {test.metric: test for test in found.tests["same"]}
    assert tests["exact_match"].method == "exact McNemar"
    assert tests["bleu"].method == "paired bootstrap"
    assert tests["bleu"].change == 0


@pytest.mark.assets
@pytest.mark.skipif(not (ASSETS / "dialogsum").is_dir(), reason="dialogsum is not there")
def test_dialogsum_and_multi30k_are_read_as_they_are() -> None:
    import gzip

    test = TextGeneration(ASSETS / "dialogsum" / "dialogsum.test.jsonl", template="{dialogue}\n\nSummary:").examples
    assert len(test) == 500
    assert len(test[0].references) == 3
    assert test[0].prompt.endswith("before 4 pm.\n\nSummary:")
    assert len(TextGeneration(ASSETS / "dialogsum" / "dialogsum.dev.jsonl").examples[0].references) == 1
    english, german = (
        gzip.decompress((ASSETS / "multi30k" / f"test_2016_flickr.{language}.gz").read_bytes()).decode().splitlines()
        for language in ("en", "de")
    )
    pairs = TextGeneration(list(zip(english, german, strict=True)), template="translate: {prompt}").examples
    assert (pairs[0].prompt, pairs[0].references) == ("translate: " + english[0], (german[0],))


def test_columns_are_found_or_named() -> None:
    def one(row, template="{prompt}", **settings):
        found = read_prompts([row], "T.data", template=template, **settings)[0]
        return found.prompt, found.references

    assert one({"article": "a", "highlights": "b", "id": "1"}) == ("a", ("b",))
    assert one({"question": "q", "answers": {"text": ["x", "y", "x"]}}) == ("q", ("x", "y"))
    assert one({"dialogue": "d", "summary2": "t", "summary1": "s", "topic1": "no"}) == ("d", ("s", "t"))
    assert one({"en": "e", "de": "d"}, "{en} ->", reference="de") == ("e ->", ("d",))
    assert one({"translation": {"en": "e", "de": "d"}}, "{en}", reference="de") == ("e", ("d",))
    assert one({"question": "{context}", "context": "c", "answer": "x"}, "{context} Q: {question}") == (
        "c Q: {context}",
        ("x",),
    )
    with pytest.raises(
        ConfigError, match=r"T.data\[0\] must have one column that can be a prompt, got question, context"
    ):
        one({"question": "q", "context": "c", "answer": "x"})
    with pytest.raises(ConfigError, match="can be a prompt, got none of a, answer; say which by template="):
        one({"a": "q", "answer": "x"})
    with pytest.raises(
        ConfigError, match=r"text in the column 'topic', which the template names, got None; it has: prompt"
    ):
        one({"prompt": "q", "answer": "x"}, "{topic}")
    with pytest.raises(ConfigError, match="can be references, got target, summary"):
        one({"prompt": "q", "summary": "x", "target": "y"})
    with pytest.raises(MissingInputError, match="has no reference in one of the columns"):
        one({"prompt": "q"})
    with pytest.raises(MissingInputError, match="has no reference; pass"):
        one("q")
    with pytest.raises(MissingInputError, match="must have a text as reference"):
        one(("q", []))
    with pytest.raises(ConfigError, match="has no column 'de'; it has: prompt"):
        one({"prompt": "q"}, reference="de")
    with pytest.raises(ConfigError, match=r"must be \(prompt, reference\) or a dict, got 3"):
        one(3)


def test_collapse_is_told() -> None:
    normal = [f"the {word} sits quietly on its own chair today" for word in ("cat", "dog", "hen", "fox", "owl")]
    assert collapse_warnings(normal, normal, looping=0) == []
    assert "5 of 5 texts are empty" in collapse_warnings([""] * 5, normal, looping=0)[0]
    looped = ["and so on " * 9] * 4 + [normal[0]]
    told = collapse_warnings(looped, normal, looping=4)
    assert "4 of 5 texts end in one piece repeated" in told[0]
    assert "4-grams in a text are different, in the references 100%" in told[1]
    assert "every prompt was answered by 'yes'" in collapse_warnings(["yes"] * 5, normal, looping=0)[0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 16, True),
        ([1, 2] * 8, True),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 3] * 3, False),  # too short to tell
        (list(range(8)) * 4, False),  # the last half holds it twice: a refrain
        ([1, 2] * 7 + [1, 3], False),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected


def test_generation_refuses_what_it_cannot_do(tokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="needs a model that generates text, got Bert"):
        score(tiny_model("bert"), TextGeneration(PROMPTS), tokenizer)
    with pytest.raises(ConfigError, match="max_new_tokens must leave room for a prompt in the 512 tokens"):
        score(tiny_model("gpt2"), TextGeneration(PROMPTS, max_new_tokens=512), tokenizer)
    with pytest.raises(ConfigError, match="max_prompt_tokens must be at most 448"):
        score(tiny_model("gpt2"), TextGeneration(PROMPTS, max_prompt_tokens=449), tokenizer)
    with pytest.raises(ConfigError, match=r"data\[1\] must have a prompt of a token at least, got ''"):
        score(tiny_model("gpt2"), TextGeneration([("a", "b"), ("", "c")]), tokenizer)
    for settings, message in (
        ({"measures": ()}, "measures must be some of"),
        ({"measures": "rouge"}, "measures must be some of"),
        ({"measures": ("meteor",)}, "measures must be some of"),
        ({"template": "no column"}, "template must name a column"),
        ({"stop": "x"}, "stop must be strings"),
        ({"num_beams": 0}, "num_beams must be an integer"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer"),
        ({"bleu_tokenize": "14a"}, "tokenize must be one of none, zh, 13a"),
    ):
        with pytest.raises(ConfigError, match=message):
            TextGeneration(PROMPTS, **settings)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_folder_of_either_kind_is_loaded(family: str, tmp_path, tokenizer) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = TextGeneration(PROMPTS, max_new_tokens=5)
    found = lc.evaluate(tmp_path, task, latency=False, progress=False)
    assert found.score.examples == score(model, task, tokenizer).examples


def test_a_bare_encoder_may_lack_its_pooler_and_a_head_none_of_its_weights(tmp_path, tokenizer) -> None:
    tiny_model("roberta").save_pretrained(tmp_path)  # a classifier, which has no pooler
    tokenizer.save_pretrained(tmp_path)

    def width(model, tokenizer, text):
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state.shape[-1]

    task = CustomTask(["a"], function=width, scale="difference")
    assert lc.evaluate(tmp_path, task, latency=False, progress=False).score.value == 64
    lacking = r"saved as RobertaForSequenceClassification .* lm_head\.bias, .*which RobertaForMaskedLM needs"
    with pytest.raises(CheckpointError, match=lacking):
        lc.evaluate(tmp_path, CustomTask(["a"], function=width, head="AutoModelForMaskedLM"), latency=False)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_nan_while_generating_names_the_prompt(family: str, tokenizer) -> None:
    model = tiny_model(family)
    bad = tokenizer.convert_tokens_to_ids("~")

    def damaged(module, args, kwargs, outputs):
        ids = kwargs.get("input_ids")
        if family == "t5":  # its encoder ran before: mark by what it gave
            return outputs
        outputs.logits[(ids == bad).any(1)] = math.nan
        return outputs

    if family == "t5":
        with torch.no_grad():
            model.encoder.embed_tokens.weight = torch.nn.Parameter(model.encoder.embed_tokens.weight.clone())
            model.encoder.embed_tokens.weight[bad] = math.nan
    model.register_forward_hook(damaged, with_kwargs=True)
    data = [("fine", "x"), ("also fine, and longer", "x"), ("a ~", "x"), ("~", "x")]
    with pytest.raises(CompressionError, match="NaN or infinity for the text after prompt 2 of the data"):
        score(model, TextGeneration(data, max_new_tokens=3), tokenizer, batch_size=4)


# --- functions of the user's own -------------------------------------------------------------------------------------


def custom(function, data=("a", "bb", "ccc", "dddd"), batch_size: int = 32, **settings):
    return CustomTask(list(data), function=function, **settings).evaluate(
        None_model, None, progress=False, batch_size=batch_size
    )


None_model = torch.nn.Linear(1, 1)


def test_a_function_may_return_a_number_several_or_a_result() -> None:
    plain = custom(lambda model, tokenizer, text: len(text) / 4)
    assert (plain.primary, plain.value) == ("score", pytest.approx(0.625))
    low, high = plain.intervals["score"]
    assert low < 0.625 < high
    many = custom(
        lambda model, tokenizer, text: ({"long": float(len(text) > 2), "letters": len(text)}, text.upper()),
        metric="long",
        scale={"letters": "ratio"},
        lower_is_better=["letters"],
    )
    assert many.metrics == pytest.approx({"long": 0.5, "letters": 2.5})
    assert [one.prediction for one in many.examples] == ["A", "BB", "CCC", "DDDD"]
    assert (many.kinds["long"].scale, many.kinds["letters"].scale) == ("points", "ratio")
    assert (many.kinds["long"].lower_is_better, many.kinds["letters"].lower_is_better) == (False, True)
    assert many.right == [False, False, True, True]
    whole = custom(lambda m, t, text: ExampleResult(values={"score": 1.0}, weight=len(text), group=len(text) % 2))
    assert whole.groups == [1, 0, 1, 0]


def test_a_batched_function_sees_rows_in_order() -> None:
    seen = []

    def function(model, tokenizer, texts):
        seen.append(list(texts))
        assert not torch.is_grad_enabled()
        assert not model.training
        return [len(text) / 4 for text in texts]

    found = custom(function, batched=True, batch_size=3)
    assert seen == [["a", "bb", "ccc"], ["dddd"]]
    assert [one.values["score"] for one in found.examples] == [0.25, 0.5, 0.75, 1]
    assert None_model.training


def test_functions_that_fail_or_return_nonsense_name_the_example() -> None:
    def at(index: int, outcome):
        texts = ["a", "bb", "ccc", "dddd"]

        def function(model, tokenizer, text):
            if text == texts[index]:
                return outcome() if callable(outcome) else outcome
            return 0.5

        return function

    def fail():
        raise KeyError("gold")

    with pytest.raises(CompressionError, match="function failed on example 2 of the data: KeyError: 'gold'") as caught:
        custom(at(2, fail))
    assert isinstance(caught.value.__cause__, KeyError)
    for outcome, message in (
        (math.nan, "example 1 of the data must be finite, got score=nan"),
        (1.5, r"example 1 of the data must be in \[0, 1\] where the scale is 'points', got score=1.5"),
        ("good", "example 1 of the data must be a number, a dict of numbers"),
        (None, "example 1 of the data must be a number"),
        ({"other": 1.0}, "same metrics for every example, got .'score'. for example 0 .* and .'other'. for example 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            custom(at(1, outcome))
    with pytest.raises(
        ConfigError, match=r"metric must be one of what the function returns, accuracy, got 'acuracy'; did"
    ):
        custom(lambda m, t, text: {"accuracy": 1.0}, metric="acuracy")
    with pytest.raises(ConfigError, match="must return a list of 4 outcomes for examples 0 to 3"):
        custom(lambda m, t, texts: 1.0, batched=True)
    for settings, message in (
        ({"scale": "percent"}, "scale must be one of"),
        ({"metric": ""}, "metric must be a name"),
        ({"lower_is_better": "score"}, "lower_is_better must be True, False or a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            CustomTask(["a"], function=len, **settings)
    with pytest.raises(ConfigError, match="function must be callable"):
        CustomTask(["a"], function="len")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower_is_better": ["los"]}, r"lower_is_better must name what .* loss, acc, got 'los'; did you mean 'loss'"),
        ({"scale": {"los": "ratio"}}, r"scale must name what the function returns, loss, acc, got 'los'; did you"),
    ],
)
def test_metrics_that_the_function_does_not_return_are_named_at_once(settings, message: str) -> None:
    seen = []

    def function(model, tokenizer, text):
        seen.append(text)
        return {"loss": 0.5, "acc": 1.0}

    with pytest.raises(ConfigError, match=rf"CustomTask.{message}"):
        custom(function, metric="acc", **settings)
    assert seen == ["a"]


def test_a_ratio_is_of_numbers_that_are_not_negative() -> None:
    with pytest.raises(ConfigError, match=r"example 1 of the data must not be negative .* 'ratio', got score=-2; pass"):
        custom(lambda m, t, text: 2.0 if text == "a" else -2.0, scale="ratio")


@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_zeros_and_ones_are_shares_only_where_they_are_points(scale: str) -> None:
    zeros = custom(lambda m, t, text: float(text == "a"), scale=scale)
    assert zeros.right is None
    points = custom(lambda m, t, text: float(text == "a"))
    assert points.right == [True, False, False, False]
    assert zeros.metrics == points.metrics
    assert zeros.intervals != points.intervals


@pytest.mark.parametrize("wrong", [{"weight": 0}, {"weight": -1}, {"weight": math.inf}, {"confidence": 7}])
def test_results_have_bounds(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExampleResult(values={"score": 1.0}, **wrong)


def test_custom_tasks_are_compared_like_any(tokenizer) -> None:
    def likely(model, tokenizer, text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return float(model(input_ids=ids, labels=ids).loss)

    task = CustomTask(
        [f"text number {i}" for i in range(9)], function=likely, metric="loss", scale="ratio", lower_is_better=True
    )
    models = {"base": tiny_model("llama"), "other": tiny_model("llama", seed=1)}
    found = score_models(task, models, dict.fromkeys(models, tokenizer), progress=False)
    (test,) = found.tests["other"]
    assert test.scale == "ratio"
    assert test.change == pytest.approx(found.scores["other"].value / found.scores["base"].value)
    assert lc.CustomTask(["a"], function=likely, head="AutoModelForMaskedLM").auto_class == "AutoModelForMaskedLM"
