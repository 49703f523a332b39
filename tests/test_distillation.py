"""Distillation: what a step of training does, what training changes and what it keeps, what it refuses."""

import copy
import json
import math
import random
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.stacks import find_stacks
from llmcompress.compressor import Context, Cut
from llmcompress.data import Example
from llmcompress.distillation.alignment import Alignment
from llmcompress.distillation.batches import collate, make_rows
from llmcompress.distillation.heads import head_of, model_inputs
from llmcompress.distillation.layer_map import layer_map
from llmcompress.distillation.loss_choice import SoftLoss
from llmcompress.distillation.losses.table import FEATURE_LOSSES, SOFT_LOSSES
from llmcompress.distillation.objective import Objective
from llmcompress.distillation.observation import Observed, observing
from llmcompress.distillation.student import make_student
from llmcompress.distillation.zeros import pruned_weights
from llmcompress.testing import FAMILIES, tiny_model, tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "a", "dog", "ran", "by", "to", "see", "it"]


def texts(count=48, *, labels=True, pairs=False):
    draw = random.Random(0)
    return [
        Example(
            " ".join(draw.choices(WORDS, k=draw.randint(2, 6))),
            " ".join(draw.choices(WORDS, k=3)) if pairs else None,
            draw.randint(0, 1) if labels else None,
        )
        for _ in range(count)
    ]


def distil(teacher, step, *, student=None, data=None, seed=0, history=()):
    """Run one step as the runner does, without the runner."""
    context = Context(
        data=texts() if data is None else data,
        tokenizer=tiny_tokenizer(),
        teacher=teacher,
        history=list(history),
        seed=seed,
        progress=False,
    )
    return step.compress(copy.deepcopy(teacher) if student is None else student, context), context


def step_of(**fields):
    return lc.KnowledgeDistillation(**{"steps": 3, "batch_size": 8, "max_length": 24, "precision": "fp32", **fields})


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_parts_of_an_accumulated_batch_add_up_to_one_big_batch(family):
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    head = head_of(student)
    pairs = layer_map("uniform", student, teacher, [])
    # Each loss by itself, so that no other hides what it lacks.
    fields = [{"soft": SoftLoss(name=name), "temperature": 2.0} for name in SOFT_LOSSES] + [{"alpha": 0.0}]
    fields += [{"alpha": 0.0, "features": {name: 0.7}} for name in FEATURE_LOSSES]
    objectives = [Objective(head=head, alignment=Alignment(pairs=pairs), **{"alpha": 1.0, **own}) for own in fields]
    rows = make_rows(head, student, tiny_tokenizer(), texts(7, pairs=family == "t5"), max_length=17, labelled=True)
    assert len({len(row["input_ids"]) for row in rows}) > 1  # else a mean of means would pass too
    everything = {loss.reads for loss in FEATURE_LOSSES.values()}

    @torch.no_grad()
    def losses(split):
        batches = [collate(head, part, pad=0, decoder_start=0) for part in split]
        counts = torch.stack([objectives[0].counts(batch) for batch in batches]).sum(0)
        sums = torch.zeros(len(objectives))
        with ExitStack() as undo:
            observe = [
                undo.enter_context(observing(model, everything, [{0, 1}] * len(pairs))) for model in (student, teacher)
            ]
            for batch in batches:
                fed = model_inputs(batch)
                seen = [one(fed) for one in observe]
                sums += torch.stack([objective(*seen, batch, counts) for objective in objectives])
        return sums

    whole = losses([rows])
    assert bool((whole > 1e-3).all())
    assert torch.allclose(losses([rows[:1], rows[1:3], rows[3:]]), whole, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_training_with_accumulation_is_training_with_big_batches_without_dropout(family):
    teacher, start = tiny_model(family), tiny_model(family, seed=1)
    # Dropout draws differently for other sizes of batches.
    fields = {"steps": 2, "learning_rate": 1e-2, "max_length": 12, "dropout": 0.0}
    big, small = (
        distil(teacher, step_of(**fields, **sizes), student=copy.deepcopy(start), data=texts(8))[0]
        for sizes in ({"batch_size": 8}, {"batch_size": 2, "gradient_accumulation": 4})
    )
    assert str(big) == str(start)  # its own dropout is back

    def distance(first, second):
        # Of all weights together: where a gradient is almost zero, Adam's steps follow the last digit of it.
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5

    assert distance(big, start) > 5e-2
    assert distance(big, small) < 0.1 * distance(big, start)


# Training


def kl_to(teacher, student, data, labelled=True):
    head = head_of(teacher)
    rows = make_rows(head, teacher, tiny_tokenizer(), data, max_length=24, labelled=labelled)
    batch = collate(head, rows, pad=0, decoder_start=0)
    fed = model_inputs(batch)
    objective = Objective(head=head)
    with torch.no_grad():
        seen = [Observed(model(**fed)) for model in (student, teacher)]
        return float(objective(*seen, batch, objective.counts(batch)))


@pytest.mark.parametrize(("family", "student"), [("bert", "layers:1"), ("llama", "layers:1"), ("gpt2", None)])
def test_distillation_brings_the_student_nearer_to_the_teacher(family, student):
    teacher = tiny_model(family)
    start = copy.deepcopy(teacher)
    if student is None:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in start.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    teacher_before = state_of(teacher)
    bare = copy.deepcopy(start)
    make_student(bare, student, Context())
    step = step_of(steps=60, student=student, alpha=1.0, features={"hidden": 0.5}, learning_rate=3e-3, batch_size=16)
    data = texts(labels=False)
    distilled, _ = distil(teacher, step, student=start, data=data)
    before, after = (kl_to(teacher, model, data, labelled=False) for model in (bare, distilled))
    assert after < 0.5 * before
    assert equal(state_of(teacher), teacher_before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_distilled_and_comes_back_as_it_went(family):
    teacher = tiny_model(family)
    teacher.train()
    step = step_of(features={"hidden": 1.0}, learning_rate=1e-3)
    student = copy.deepcopy(teacher).eval()
    attributes, config = set(vars(student)), student.config.to_dict()
    python, numpy, torch_state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    result, context = distil(teacher, step, student=student, data=texts(pairs=family == "t5"))
    assert result is student
    assert not equal(state_of(result), state_of(teacher))
    assert not any(module.training for module in result.modules())
    assert all(module.training for module in teacher.modules())
    assert set(vars(result)) == attributes
    assert result.config.to_dict() == config
    assert all(parameter.grad is None and not parameter._backward_hooks for parameter in result.parameters())
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert context.told[0].reason.startswith("loss ")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    teacher, step = tiny_model("bert"), step_of(student="layers:1", learning_rate=1e-3)
    results = []
    for seed, caller in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(caller)  # the caller's state has no say
        results.append(state_of(distil(teacher, step, seed=seed)[0]))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zeros_stay_zero(family, precision):
    teacher = tiny_model(family)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    block = find_stacks(student)[0].blocks[0]
    pruned = [parameter for parameter in block.parameters() if parameter.dim() >= 2]
    with torch.no_grad():
        for parameter in pruned:
            parameter[torch.rand_like(parameter) < 0.5] = 0
    zeros = [parameter == 0 for parameter in pruned if parameter.shape[0] > 4 or parameter.dim() == 3]
    counts = {name: int(zero.sum()) for name, _, zero in pruned_weights(student)}
    held = sum(counts.values())
    step = step_of(steps=4, learning_rate=1e-2, weight_decay=0.1, precision=precision)
    result, context = distil(teacher, step, student=student)
    assert held > 1000
    assert {name: int(zero.sum()) for name, _, zero in pruned_weights(result)} == counts
    for parameter, zero in zip([p for p in pruned if p.shape[0] > 4 or p.dim() == 3], zeros, strict=True):
        assert bool((parameter[zero] == 0).all())
        assert float((parameter[~zero] != 0).float().mean()) > 0.99
    plan = step.plan(student, context)
    assert f"hold {held} zeros in {len(counts)} weights" in [action.does for action in plan]


def test_zeros_of_a_pruned_model_stay_through_the_runner():
    step = step_of(steps=4, learning_rate=1e-2, features={"hidden": 1.0}, student="layers:1")
    result = lc.compress(
        tiny_model("llama"),
        [lc.MagnitudePruning(pattern="2:4"), step],
        data=texts(),
        tokenizer=tiny_tokenizer(),
        progress=False,
    )
    weights = [weight for _, weight, _ in pruned_weights(result.model)]
    assert len(weights) == 7
    assert all(bool(((weight.reshape(-1, 4) == 0).sum(-1) == 2).all()) for weight in weights)
    assert "hold 18432 zeros in 7 weights" in [action.does for action in result.report.steps[1].touched]


def test_without_alpha_no_teacher_is_asked():
    step = step_of(alpha=0.0, learning_rate=1e-3)
    assert "teacher" not in step.needs
    model = tiny_model("bert")
    before = state_of(model)
    result = step.compress(model, Context(data=texts(), tokenizer=tiny_tokenizer(), progress=False))
    assert not equal(state_of(result), before)


def test_half_precision_weights_are_trained_in_full_and_come_back_in_half():
    teacher = tiny_model("llama").to(torch.bfloat16)
    result, _ = distil(teacher, step_of(learning_rate=1e-3))
    assert {parameter.dtype for parameter in result.parameters()} == {torch.bfloat16}
    assert result.lm_head.weight is result.model.embed_tokens.weight
    assert not equal(state_of(result), state_of(teacher))


def test_a_regression_head_learns_scores():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(config).eval()
    data = [Example(example.text, None, len(example.text) / 20) for example in texts()]
    _, context = distil(teacher, step_of(steps=20, alpha=0.0, learning_rate=3e-3, student="layers:1"), data=data)
    losses = [float(loss) for loss in context.told[0].reason.removeprefix("loss ").split(" -> ")]
    assert losses[-1] < 0.5 * losses[0]


def test_padded_vocabularies_compare_the_real_tokens_only():
    teacher = tiny_model("llama")
    student = copy.deepcopy(teacher)
    student.resize_token_embeddings(160, mean_resizing=False)
    result, _ = distil(teacher, step_of(alpha=1.0), student=student)
    assert result.config.vocab_size == 160
    student = copy.deepcopy(teacher)
    student.resize_token_embeddings(100)
    with pytest.raises(lc.UnsupportedModelError, match="tokenizer's 128 tokens, got vocabularies of 128 and 100"):
        distil(teacher, step_of(), student=student)


def test_windows_of_a_causal_lm_hold_every_token_once():
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    rows = make_rows("causal_lm", model, tokenizer, [Example("abcdefgh"), Example("ij")], max_length=4, labelled=True)
    joined = [token for row in rows for token in row["input_ids"]]
    assert joined == tokenizer("abcdefgh\n\nij", add_special_tokens=False)["input_ids"]
    assert [len(row["input_ids"]) for row in rows] == [4, 4, 3]
    batch = collate("causal_lm", rows, pad=0)
    assert batch["labels"][2].tolist() == [*rows[2]["input_ids"], -100]
    assert batch["attention_mask"][2].tolist() == [1, 1, 1, 0]


# Fields and refusals


def test_epochs_are_the_default_and_the_recipe_comes_back():
    assert lc.KnowledgeDistillation().epochs == 3
    assert lc.KnowledgeDistillation(steps=5).epochs is None
    for step in (lc.KnowledgeDistillation(), lc.KnowledgeDistillation(steps=5, student="layers:0,2")):
        assert lc.compressors.get("knowledge_distillation")(**json.loads(step.model_dump_json())) == step
    with pytest.raises(lc.ConfigError, match=r"must have epochs or steps, got both \(epochs=1, steps=2\)"):
        lc.KnowledgeDistillation(epochs=1, steps=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0), ("alpha", 1.1), ("alpha", -0.1), ("temperature", [1, 0]), ("alpha", [0, 1, 0]),
     ("learning_rate", math.nan), ("steps", 0),
     ("epochs", 0), ("warmup", 1.0), ("precision", "fp16"), ("batch_size", 0)],
)  # fmt: skip
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(lc.ConfigError, match=rf"KnowledgeDistillation.{field} must be"):
        lc.KnowledgeDistillation(**{field: value})


def refused(error, match, *, teacher=None, student=None, data=None, history=(), **fields):
    teacher = tiny_model("bert") if teacher is None else teacher
    student = copy.deepcopy(teacher) if student is None else student
    before = state_of(student)
    with pytest.raises(error, match=match):
        distil(teacher, step_of(**fields), student=student, data=data, history=history)
    assert equal(state_of(student), before)
    assert next(student.parameters()).dtype == torch.float32


def test_missing_or_wrong_labels_are_refused():
    refused(lc.MissingInputError, r"data\[0\] has none.*alpha=1.0", data=texts(labels=False))
    wrong = [Example("a", None, 0), Example("b", None, 7)]
    refused(lc.ConfigError, r"data\[1\].label must be a class of Bert.*got 7", data=wrong)
    refused(lc.ConfigError, r"got 'odd'", data=[Example("a", None, "odd")])
    refused(lc.MissingInputError, "needs target texts", teacher=tiny_model("t5"))
    refused(lc.MissingInputError, "at least two tokens", teacher=tiny_model("llama"), data=[Example("a")])
    refused(lc.MissingInputError, "needs data", data=[])


def test_teachers_that_do_not_match_are_refused():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    three = BertForSequenceClassification(BertConfig(**sizes, hidden_size=32, num_labels=3))
    two = BertForSequenceClassification(BertConfig(**sizes, hidden_size=32))
    refused(lc.UnsupportedModelError, "same classes, got 3 and 2 labels", teacher=three, student=two)
    refused(lc.UnsupportedModelError, "same kind of head", teacher=tiny_model("llama"), student=two)
    refused(
        lc.UnsupportedModelError, "must have the 1 tokens that were kept", history=[Cut("x", "vocabulary", (0,), 2)]
    )
    model = tiny_model("bert")
    with pytest.raises(lc.MissingInputError, match="teacher that is not the student itself"):
        step_of().compress(model, Context(data=texts(), tokenizer=tiny_tokenizer(), teacher=model))


def test_heads_that_cannot_be_distilled_and_frozen_students_are_refused():
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    refused(lc.UnsupportedModelError, "got BertModel", teacher=BertModel(BertConfig(**sizes, hidden_size=32)))
    refused(lc.UnsupportedModelError, "are frozen", teacher=tiny_model("bert").requires_grad_(False))


def test_a_quantized_student_is_refused():
    student = tiny_model("bert")
    student.config.quantization_config = {"quant_method": "llmcompress"}
    with pytest.raises(lc.UnsupportedModelError, match="quantize last"):
        step_of().plan(student, Context())


def test_a_loss_that_is_not_finite_stops_with_its_step_and_leaves_no_trace():
    teacher = tiny_model("bert")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.classifier.bias.fill_(math.nan)
    attributes = set(vars(student))
    with pytest.raises(lc.CompressionError, match=r"must be finite, got nan at step 1 of 3 on the rows \d+, "):
        distil(teacher, step_of(), student=student)
    assert set(vars(student)) == attributes
    assert all(not parameter._backward_hooks for parameter in student.parameters())


def test_nothing_is_printed_without_progress(capfd):
    distil(tiny_model("bert"), step_of())
    assert capfd.readouterr().out == ""
