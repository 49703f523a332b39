"""Tasks whose answer is a text: SQuAD's metrics and windows, generation and its metrics, the user's own functions."""

from __future__ import annotations

import json
import math
import random
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.errors import CompressionError, ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.evaluation.scoring import score_models
from llmcompress.evaluation.tasks import QuestionAnswering
from llmcompress.evaluation.tasks.question_answering import best_spans
from llmcompress.evaluation.tasks.squad import exact_match, f1, read_questions
from llmcompress.testing import tiny_model

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
XQUAD = ASSETS / "xquad" / "xquad.en.json"


def score(model, task, tokenizer, **settings):
    return task.evaluate(model, tokenizer, progress=False, **settings)


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
