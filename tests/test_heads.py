"""Heads that distillation reads: what their rows ask, what training does to each, what they refuse."""

import copy
import math
import random

import pytest
import torch
import transformers

import llmcompress as lc
from llmcompress.compressor import Context
from llmcompress.data import Example, Span
from llmcompress.distillation.batches import collate, make_rows
from llmcompress.distillation.heads import IGNORED, counted, head_of, labelled, logits_of, model_inputs, targets
from llmcompress.distillation.labels import labels_of
from llmcompress.distillation.losses.table import SOFT_LOSSES
from llmcompress.distillation.objective import Objective
from llmcompress.distillation.observation import Observed
from llmcompress.distillation.sibling import class_from
from llmcompress.testing import tiny_model, tiny_tokenizer

WORDS = ["ann", "saw", "bob", "in", "rome", "and", "paris", "ran"]
TAGS = ("O", "B-PER", "B-LOC")


def model_of(kind, **settings):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64, **settings)
    return getattr(transformers, f"BertFor{kind}")(config).eval()


def tokenizer_with_mask():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "<extra_0>"
    return tokenizer


def sentences(count=24):
    draw = random.Random(0)
    kinds = {"ann": "B-PER", "bob": "B-PER", "rome": "B-LOC", "paris": "B-LOC"}
    rows = [tuple(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(count)]
    return [Example(" ".join(words), None, tuple(kinds.get(word, "O") for word in words), words) for words in rows]


def questions(count=16):
    draw, made = random.Random(0), []
    for _ in range(count):
        words = draw.choices(WORDS, k=12)
        place = draw.randrange(12)
        context = " ".join([*words[:place], "who", *words[place:]])
        made.append(
            {
                "question": "who?",
                "context": context,
                "answers": {"text": ["who"], "answer_start": [context.index("who")]},
            }
        )
    return lc.load_examples(made)


def sets(count=24):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(count)]
    return [Example(text, None, tuple(int(word in text) for word in ("ann", "rome", "ran"))) for text in texts]


NAMES = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: index for index, tag in enumerate(TAGS)}}
SETS = {"num_labels": 3, "problem_type": "multi_label_classification"}
CASES = {
    "multi_label": ("SequenceClassification", SETS, sets),
    "token_classification": ("TokenClassification", NAMES, sentences),
    "question_answering": ("QuestionAnswering", {}, questions),
    "masked_lm": ("MaskedLM", {}, sentences),
}


@pytest.mark.parametrize("head", CASES)
def test_each_head_learns_from_labels_and_from_its_teacher(head):
    kind, settings, data = CASES[head]
    model, tokenizer = model_of(kind, **settings), tokenizer_with_mask()
    assert head_of(model) == head

    def run(teacher, student, **fields):
        step = lc.KnowledgeDistillation(batch_size=8, max_length=40, learning_rate=5e-3, precision="fp32", **fields)
        context = Context(data=data(), tokenizer=tokenizer, teacher=teacher, progress=False)
        result = step.compress(student, context)
        return result, [float(loss) for loss in context.told[0].reason.removeprefix("loss ").split(" -> ")]

    teacher, losses = run(None, model, alpha=0.0, epochs=20)
    assert losses[-1] < 0.75 * losses[0]
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = agreement(head, teacher, student, data(), tokenizer)
    student, _ = run(teacher, student, alpha=1.0, epochs=10)
    assert agreement(head, teacher, student, data(), tokenizer) < 0.6 * before


def agreement(head, teacher, student, data, tokenizer):
    """Return KL(teacher || student) over what the head is asked."""
    batch = collate(head, make_rows(head, teacher, tokenizer, data, max_length=40, labelled=False), pad=0)
    objective = Objective(head=head)
    with torch.no_grad():
        outputs = [Observed(model(**model_inputs(batch))) for model in (student, teacher)]
        return float(objective(*outputs, batch, objective.counts(batch)))


@pytest.mark.parametrize("head", CASES)
def test_the_hard_loss_is_the_one_that_transformers_computes(head):
    kind, settings, data = CASES[head]
    model, tokenizer = model_of(kind, **settings), tokenizer_with_mask()
    batch = collate(head, make_rows(head, model, tokenizer, data(), max_length=40, labelled=True), pad=0)
    labels = batch["labels"]
    if head == "question_answering":
        # Ours has no probability outside the context: the same once those logits are out of the way.
        outputs = model(**model_inputs(batch))
        logits = [outputs[name].masked_fill(batch["counted"] == 0, -1e9) for name in ("start_logits", "end_logits")]
        losses = [torch.nn.functional.cross_entropy(part, labels[:, end]) for end, part in enumerate(logits)]
        theirs = sum(losses) / 2
    else:
        if head == "masked_lm":
            labels = labels.masked_fill(batch["counted"] == 0, IGNORED)
        theirs = model(**model_inputs(batch), labels=labels.float() if head == "multi_label" else labels).loss
        batch = {**batch, "labels": labels}
    objective = Objective(head=head, alpha=0.0)
    ours = objective(Observed(model(**model_inputs(batch))), None, batch, objective.counts(batch))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_the_first_piece_of_each_word_has_its_tag_also_where_a_sentence_is_cut():
    model, tokenizer = model_of("TokenClassification", **NAMES), tiny_tokenizer()
    data = sentences()
    rows = make_rows("token_classification", model, tokenizer, data, max_length=7, labelled=True)
    assert len(rows) > len(data)
    asked = [
        (tokenizer.decode([token]), TAGS[label])
        for row in rows
        for token, label, counts in zip(row["input_ids"], row["labels"], row["counted"], strict=True)
        if counts
    ]
    assert asked == [(word[0], tag) for example in data for word, tag in zip(example.words, example.label, strict=True)]


def test_windows_of_a_context_point_at_the_answer_wherever_they_hold_it():
    tokenizer = tiny_tokenizer()
    data = questions()
    rows = make_rows("question_answering", model_of("QuestionAnswering"), tokenizer, data, max_length=24, labelled=True)
    assert len(rows) > 2 * len(data)
    pointed = [row for row in rows if row["labels"][0] != IGNORED]
    for row in pointed:
        first, last = row["labels"]
        assert "".join(tokenizer.decode(token) for token in row["input_ids"][first : last + 1]) == "who"
        assert all(row["counted"][first : last + 1])
    assert len(pointed) >= len(data)


def test_data_without_labels_teaches_no_label_but_the_teacher():
    for head, (kind, settings, data) in CASES.items():
        bare = [Example(example.text, example.pair, None, example.words) for example in data()]
        model, tokenizer = model_of(kind, **settings), tokenizer_with_mask()
        batch = collate(head, make_rows(head, model, tokenizer, bare, max_length=40, labelled=True), pad=0)
        assert int(counted(head, batch).sum()) > len(bare)
        assert targets(head, batch).shape == logits_of(head, model(**model_inputs(batch)), batch).shape[:-1]
        if head != "masked_lm":
            assert int(labelled(head, batch).sum()) == 0
            with pytest.raises(lc.MissingInputError, match=r"needs labels .* data\[0\] has none"):
                lc.compress(model, lc.KnowledgeDistillation(steps=1), data=bare, tokenizer=tokenizer, progress=False)


def test_labels_that_a_head_does_not_know_are_refused_before_any_work():
    def refused(kind, settings, example, match):
        with pytest.raises(lc.ConfigError, match=match):
            lc.compress(
                model_of(kind, **settings), lc.KnowledgeDistillation(steps=1, max_length=16), data=[example],
                tokenizer=tokenizer_with_mask(), progress=False,
            )  # fmt: skip

    kind, settings, _ = CASES["multi_label"]
    refused(kind, settings, Example("a", None, 1), "must be a list of classes for the multi-label")
    refused(kind, settings, Example("a", None, (0, 7)), r"data\[0\].label must be of the classes .* got 7")
    kind, settings, _ = CASES["token_classification"]
    refused(kind, settings, Example("a b", None, ("O",), ("a", "b")), "one tag a word")
    refused(kind, settings, Example("a", None, ("B-PEX",), ("a",)), "did you mean 'B-PER'")
    refused("QuestionAnswering", {}, Example("who?", "in rome", "paris"), "must be a text that stands in its context")
    refused("QuestionAnswering", {}, Example("who are you and what", "in rome", Span(3, 7)), "must leave room")
    for outside in (Span(5, 3), Span(-2, 3), Span(3, 8)):
        refused("QuestionAnswering", {}, Example("who?", "in rome", outside), "a Span within the 7 characters")
    kind, settings, _ = CASES["multi_label"]
    for no_class in (0.5, True, float("nan"), 3):
        refused(kind, settings, Example("a", None, (no_class,)), rf"data\[0\].label must be .* got {no_class}")
    for number in (float("nan"), float("inf")):
        refused(
            "SequenceClassification", {"num_labels": 1}, Example("a", None, number), r"data\[0\].label must be a fin"
        )
    scores = {"num_labels": 3, "problem_type": "regression"}
    with pytest.raises(lc.UnsupportedModelError, match="one score, got num_labels=3"):
        lc.KnowledgeDistillation(steps=1).plan(model_of("SequenceClassification", **scores), Context())


def test_all_sets_of_classes_are_read_in_one_form():
    model = model_of("SequenceClassification", num_labels=2, problem_type="multi_label_classification")

    def read(*labels):
        return labels_of("multi_label", model, [Example("a", None, label) for label in labels])

    assert read((0, 1), (1, 0), None) == [[0, 1], [1, 0], None]  # yes or no of each
    assert read((0.0, 1.0), (True, False), (0, 0)) == [[0, 1], [1, 0], [0, 0]]
    assert read((0, 1), (1,), (), None) == [[1, 1], [0, 1], [0, 0], None]  # lists, as the second one can only be
    assert read(("LABEL_1",), (1, 0)) == [[0, 1], [1, 1]]
    with pytest.raises(
        lc.ConfigError, match=r"data\[2\].label must be a list .* that of data\[1\], \(1,\), got \(1, 1\)"
    ):
        read((0, 1), (1,), (1, 1))


@pytest.mark.parametrize("soft", SOFT_LOSSES)
def test_a_reader_of_questions_learns_at_any_temperature_from_a_cache_too(tmp_path, soft):
    def run(cache):
        step = lc.KnowledgeDistillation(
            steps=1, alpha=1.0, temperature=0.1, soft=soft, batch_size=16, max_length=40, precision="fp32", cache=cache
        )
        student, teacher = model_of("QuestionAnswering", hidden_act="relu"), model_of("QuestionAnswering")
        context = Context(data=questions(), tokenizer=tiny_tokenizer(), teacher=teacher, progress=False)
        step.compress(student, context)
        assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
        return float(context.told[-1].reason.removeprefix("loss "))

    live = run(None)
    assert 0 < live < 100
    assert run(lc.TeacherCache(folder=str(tmp_path))) == pytest.approx(live, rel=0.02)


def test_data_that_leaves_nothing_to_ask_is_refused():
    def refused(match, head, model, *data, **fields):
        with pytest.raises(lc.MissingInputError, match=match):
            make_rows(head, model, tokenizer_with_mask(), data, max_length=16, labelled=True, **fields)

    untagged = Example("a b", None, (IGNORED, IGNORED), ("a", "b"))
    nothing = r"data\[0\] to data\[1\] have nothing: they are empty, too short, or all tagged -100"
    refused(nothing, "token_classification", model_of("TokenClassification", **NAMES), untagged, untagged)
    refused(nothing, "masked_lm", model_of("MaskedLM"), Example(""), Example(""))
    refused(nothing, "causal_lm", tiny_model("llama"), Example(""), Example("", ""), joined=False)
    empty = r"needs a {} of at least one token in each row, and that of data\[1\] has none"
    classifier = model_of("SequenceClassification")
    refused(empty.format("text"), "classification", classifier, Example("a", label=0), Example("", label=1))
    refused(empty.format("text"), "seq2seq_lm", tiny_model("t5"), Example("a"), Example("", "b"))
    refused(empty.format("text_pair"), "seq2seq_lm", tiny_model("t5"), Example("a"), Example("b", ""))


def test_an_encoder_decoder_needs_second_texts_and_the_first_token_of_its_decoder():
    model = tiny_model("t5")
    with pytest.raises(lc.MissingInputError, match=r"needs target texts .* data\[1\] has none"):
        lc.KnowledgeDistillation(steps=1).plan(model, Context(data=[Example("a", "b"), Example("a", "")]))
    assert class_from(model, {"model_type": "bart"}, "student")[1].decoder_start_token_id == 0
    model.config.decoder_start_token_id = None
    with pytest.raises(lc.UnsupportedModelError, match=r"set model.config.decoder_start_token_id"):
        lc.KnowledgeDistillation(steps=1).plan(model, Context())


def test_a_causal_model_learns_the_second_text_as_what_follows_the_first():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    data = [Example("abc", "de"), Example("a" * 30, "f"), Example("gh")]
    rows = make_rows("causal_lm", model, tokenizer, data, max_length=10, labelled=True)
    end = tokenizer.eos_token_id
    learned = [[token for token in row["labels"] if token != IGNORED] for row in rows]
    assert learned == [
        [*tokenizer("de")["input_ids"], end],
        [*tokenizer("f")["input_ids"], end],
        [*tokenizer("gh")["input_ids"], end],
    ]
    assert [len(row["input_ids"]) for row in rows] == [6, 10, 3]


def test_every_row_hides_other_tokens_each_time_and_the_same_after_a_restart():
    from llmcompress.distillation.masking import Masking

    model, tokenizer = model_of("MaskedLM"), tokenizer_with_mask()
    batch = collate(
        "masked_lm", make_rows("masked_lm", model, tokenizer, sentences(), max_length=40, labelled=True), pad=0
    )
    masking = Masking(tokenizer.mask_token_id, 128)
    first, again, other = (masking(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["counted"], other["counted"])
    assert bool((first["counted"].sum(-1) >= 1).all())
    assert not bool((first["counted"].bool() & (batch["attention_mask"] == 0)).any())
    share = float(first["counted"].sum() / batch["counted"].sum())
    assert math.isclose(share, 0.15, abs_tol=0.05)


def test_a_decoder_that_does_not_know_its_padding_token_is_refused_in_the_plan():
    model = transformers.LlamaForSequenceClassification(tiny_model("llama").config)
    model.config.pad_token_id = None
    given = {"data": [("a cat", 0), ("the dog ran", 1)], "tokenizer": tiny_tokenizer()}
    step = lc.KnowledgeDistillation(steps=1, max_length=8)
    with pytest.raises(lc.ConfigError, match=r"set model\.config\.pad_token_id"):
        lc.plan(model, step, **given)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    assert lc.compress(model, step, progress=False, **given).report.steps
