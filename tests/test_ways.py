"""Ways to learn: texts that the teacher or the student wrote, and copies with words replaced."""

import copy
import random

import pytest
import torch

import llmcompress as lc
from llmcompress.compressor import Context
from llmcompress.data import Example
from llmcompress.distillation.alignment import Alignment
from llmcompress.distillation.arguments import Training
from llmcompress.distillation.batches import collate, make_rows
from llmcompress.distillation.generation import OnPolicy, Writer
from llmcompress.distillation.heads import IGNORED, counted, labelled, model_inputs
from llmcompress.distillation.teachers import weights_of
from llmcompress.distillation.teaching import PlannedTeacher
from llmcompress.distillation.ways import Ways
from llmcompress.testing import tiny_model, tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran"]


def texts(count=12, pairs=False):
    draw = random.Random(0)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for _ in range(count)]
    return [Example(text, text[::-1] if pairs else None, draw.randint(0, 1)) for text in made]


def loud(family, seed=0):
    """A random model that has an opinion, so that what it writes is no accident of rounding."""
    model = tiny_model(family, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name and "shared" not in name:
                parameter.mul_(3)
    return model


def alone(teacher):
    """The original as the one teacher."""
    ((source, share),) = weights_of(None)
    return [PlannedTeacher(source, share, teacher)], [Alignment()], teacher


def rows_of(head, model, data, **fields):
    return make_rows(head, model, tiny_tokenizer(), data, max_length=24, labelled=True, joined=False, **fields)


@pytest.mark.parametrize(("head", "family"), [("causal_lm", "llama"), ("seq2seq_lm", "t5")])
def test_what_the_teacher_writes_is_what_it_writes_to_each_prompt_alone(head, family):
    teacher, data = loud(family), texts(pairs=family == "t5")
    rows = rows_of(head, teacher, data)
    settings = lc.Generation(share=0.5, max_new_tokens=6, prompt_tokens=5, temperature=0)
    training = Training(None, 1, 1e-3, 4, 0, 0, 1, "fp32")
    written = Ways(settings, head, 24, training).teacher_rows(rows, *alone(teacher))
    changed = [index for index, (old, new) in enumerate(zip(rows, written, strict=True)) if old != new]
    assert len(changed) == 6
    for index in changed:
        answer = [token for token in written[index]["labels"] if token != IGNORED]
        prompt = rows[index]["input_ids"] if family == "t5" else rows[index]["input_ids"][:5]
        written_alone = teacher.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0].tolist()
        assert answer == written_alone[1 if family == "t5" else 5 :]
        if family == "llama":
            assert written[index]["input_ids"] == prompt + answer
            assert written[index]["labels"][:5] == [IGNORED] * 5


def test_nobody_writes_beyond_the_positions_of_the_model_and_a_long_prompt_leaves_the_others_their_room():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=127, pad_token_id=0)).eval()
    torch.nn.init.zeros_(model.transformer.wte.weight[127])  # it never ends by itself: all other logits are above
    rows = [
        {"input_ids": [5] * length, "attention_mask": [1] * length, "labels": [IGNORED] * (length - 1) + [5], "row": 0}
        for length in (25, 24, 22, 6, 5)
    ]
    training = Training(None, 1, 1e-3, 8, 0, 0, 1, "fp32")
    ways = Ways(lc.Generation(share=1, max_new_tokens=8, temperature=0), "causal_lm", 999, training)
    written = ways.teacher_rows(rows, *alone(model))
    assert [len(row["input_ids"]) for row in written] == [25, 24, 24, 13, 12]
    assert written == [ways.teacher_rows([row], *alone(model))[0] for row in rows]


def test_an_encoder_decoder_writes_no_more_than_its_decoder_has_positions():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = BartConfig(
        **sizes, vocab_size=128, decoder_attention_heads=2, max_position_embeddings=12, pad_token_id=0,
        eos_token_id=127, bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    training = Training(None, 1, 1e-3, 4, 0, 0, 1, "fp32", decoder_start=2)
    policy = Ways(lc.Generation(way="on_policy", share=1), "seq2seq_lm", 999, training).on_policy(model)
    batch = collate("seq2seq_lm", rows_of("seq2seq_lm", model, texts(pairs=True)), pad=0, decoder_start=2)
    written = policy(batch, torch.Generator().manual_seed(0))
    assert 1 <= int((written["labels"] != IGNORED).sum(1).max()) <= 12
    model(**model_inputs(written))  # which reads its positions again


def test_what_was_written_is_not_written_again_after_a_kill(tmp_path):
    teacher = loud("llama")
    rows = rows_of("causal_lm", teacher, texts())
    training = Training(None, 1, 1e-3, 4, 0, 0, 1, "fp32", folder=tmp_path)
    ways = Ways(lc.Generation(share=1), "causal_lm", 24, training)
    first = ways.teacher_rows(rows, *alone(teacher))
    assert first != rows
    assert ways.teacher_rows(rows, *alone(None)) == first  # no teacher: it is not asked


def test_on_policy_the_student_writes_and_no_label_counts():
    student = loud("llama", seed=1)
    rows = rows_of("causal_lm", student, texts())
    batch = collate("causal_lm", rows, pad=0)
    settings = lc.Generation(way="on_policy", prompt_tokens=4, max_new_tokens=8)
    writer = Writer(student, "causal_lm", settings, max_length=24, pad=0)
    policy = OnPolicy(writer, "causal_lm", share=0.5, pad=0, decoder_start=None)
    before = torch.get_rng_state()
    found = [policy(batch, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    replaced = [one for one in found if "unlabelled" in one]
    assert 10 <= len(replaced) <= 30
    again = policy(batch, torch.Generator().manual_seed(next(s for s, one in enumerate(found) if "unlabelled" in one)))
    assert torch.equal(again["input_ids"], replaced[0]["input_ids"])
    assert not torch.equal(replaced[1]["input_ids"], replaced[0]["input_ids"])
    one = replaced[0]
    assert torch.equal(one["input_ids"][:, :4], batch["input_ids"][:, :4])
    assert int(labelled("causal_lm", one).sum()) == 0
    assert bool((counted("causal_lm", one)[:, :3] == 0).all())
    assert int(counted("causal_lm", one).sum()) > len(rows)
    with torch.no_grad():  # what was drawn is likely to the student
        logits = student(**model_inputs(one)).logits[:, :-1].log_softmax(-1)
    mask = counted("causal_lm", one)
    drawn = logits.gather(-1, one["input_ids"][:, 1:, None])[..., 0][mask].mean()
    assert float(drawn) > float(logits[mask].mean()) + 0.5


@pytest.mark.parametrize("way", ["sequence", "on_policy"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_both_ways_bring_the_student_nearer_to_the_teacher(family, way):
    teacher, data = loud(family), texts(pairs=family == "t5")
    step = lc.KnowledgeDistillation(
        steps=30, alpha=0.8, learning_rate=3e-3, batch_size=6, max_length=24, precision="fp32",
        generation={"way": way, "share": 0.5, "max_new_tokens": 8, "prompt_tokens": 4},
    )  # fmt: skip
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = apart(teacher, student, data)
    context = Context(data=data, tokenizer=tiny_tokenizer(), teacher=teacher, progress=False)
    assert any("train on written texts: 50% of" in str(action.does) for action in step.plan(student, context))
    assert apart(teacher, step.compress(student, context), data) < 0.7 * before


def apart(teacher, student, data):
    head = "seq2seq_lm" if teacher.config.is_encoder_decoder else "causal_lm"
    batch = collate(head, rows_of(head, teacher, data), pad=0, decoder_start=0)
    with torch.no_grad():
        ours, theirs = (one(**model_inputs(batch)).logits.log_softmax(-1) for one in (student, teacher))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    mask = batch["labels"] != IGNORED
    return float(kl[mask].mean())


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory):
    """A masked language model that would have a z everywhere, or at least a q."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked-lm")
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "<extra_0>"
    sizes = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=16))
    with torch.no_grad():
        for letter, bias in (("z", 9.0), ("q", 8.0), ("!", 12.0), ("<pad>", 13.0)):
            model.cls.predictions.bias[tokenizer.convert_tokens_to_ids(letter)] = bias
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_copies_have_other_words_and_no_labels(masked_lm):
    settings = lc.MaskedWords(model=str(masked_lm), copies=20, share=0.4, candidates=2)
    data = [Example("the cat - sat z", "a dog", 1), Example("ran", None, 0)]
    made = settings.copies_of(data, device="cpu", seed=0, progress=False)
    assert made == settings.copies_of(data, device="cpu", seed=0, progress=False)
    assert made != settings.copies_of(data, device="cpu", seed=1, progress=False)
    assert {example.label for example in made} == {None}
    pairs = [example for example in made if example.pair is not None]
    words = [example.text.split() for example in pairs]
    assert {word[2] for word in words} == {"-"}  # nothing that is no word
    assert {word[4] for word in words} == {"z", "q"}  # not by itself
    replaced = [
        word != old
        for example in words
        for word, old in zip(example, ["the", "cat", "-", "sat"], strict=False)
        if old != "-"
    ]
    assert 0.25 < sum(replaced) / len(replaced) < 0.55
    assert {word for example in words for word in example} <= {"the", "cat", "-", "sat", "z", "q"}
    assert {example.text for example in made if example.pair is None} == {"z", "q"}


def test_spans_are_runs_of_one_text_or_of_two_and_have_no_labels():
    one, other = "a b c d e f g h", "1 2 3 4 5 6"
    data = [Example(one, None, 1), Example(other, None, 0), Example(one, other, 1), Example("x y")]

    def made(**fields):
        return lc.RandomSpans(copies=50, **fields).copies_of(data, device="cpu", seed=0, progress=False)

    def is_run(text, of):
        return f" {text} " in f" {of} "

    spans = made(joined=0.0, shortest=3)
    assert spans == made(joined=0.0, shortest=3)
    assert {example.label for example in spans} == {None}
    alone = [example.text for example in spans if example.pair is None]
    assert all(is_run(text, one) or is_run(text, other) for text in alone)  # "x y" stays whole, and is left out
    assert {len(text.split()) for text in alone if is_run(text, one)} == {3, 4, 5, 6, 7}
    pairs = [example for example in spans if example.pair is not None]
    assert all(is_run(example.text, one) and is_run(example.pair, other) for example in pairs)
    assert len({(example.text, example.pair) for example in pairs}) > 30
    joined = [example.text.split() for example in made(joined=1.0, shortest=2) if example.pair is None]
    assert 145 < len(joined) <= 150  # two runs may make the whole text again
    assert all(is_run(" ".join(words[:2]), f"{one} {other} x y") for words in joined)
    mixed = [words for words in joined if "a" <= words[0] <= "h" and words[-1].isdigit()]
    assert 10 < len(mixed) < 50
    assert max(len(words) for words in mixed) == 4 + 3


@pytest.mark.parametrize("kind", ["masked words", "random spans"])
def test_a_classifier_learns_what_the_teacher_makes_of_the_copies(masked_lm, kind):
    teacher = tiny_model("bert")
    augment = lc.MaskedWords(model=masked_lm, copies=3) if kind == "masked words" else lc.RandomSpans(copies=3)
    step = lc.KnowledgeDistillation(steps=4, alpha=0.5, student="layers:1", max_length=24, augment=augment)
    result = lc.compress(teacher, step, data=texts(), tokenizer=tiny_tokenizer(), progress=False)
    (told,) = [action.does for action in result.report.steps[0].touched if str(action.does).startswith("train on")]
    assert int(told.split()[2]) > 2.5 * 12
    assert lc.compressors.create(step.to_dict()) == step
    recorded = result.report.recipe["steps"][0]["augment"]
    assert recorded["name"] == kind.replace(" ", "_")
    assert recorded.get("model") == (str(masked_lm) if kind == "masked words" else None)


def test_ways_that_a_head_does_not_allow_are_refused(masked_lm):
    def refused(error, match, family, **fields):
        model = tiny_model(family)
        with pytest.raises(error, match=match):
            lc.compress(
                model,
                lc.KnowledgeDistillation(steps=1, **fields),
                data=texts(),
                tokenizer=tiny_tokenizer(),
                progress=False,
            )

    refused(lc.UnsupportedModelError, "generation must be None for BertFor.* writes no texts", "bert", generation={})
    refused(lc.UnsupportedModelError, "augment must be None for Llama", "llama", augment={"model": str(masked_lm)})
    refused(lc.ConfigError, "alpha must be above 0", "llama", alpha=0.0, generation={"way": "on_policy"})
    refused(
        lc.UnsupportedModelError,
        "must be a masked language model, got Bert",
        "bert",
        augment={"model": tiny_model("bert")},
    )
    refused(lc.ConfigError, "did you mean 'random_spans'", "bert", augment={"name": "random_span"})
    refused(lc.ConfigError, "MaskedWords.model must be a folder", "bert", augment={"model": "/nowhere/at all"})
