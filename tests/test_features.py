"""Losses on what is inside: what is read of a model, what is laid beside it, and that training on it works."""

import copy
from types import SimpleNamespace

import pytest
import torch

import llmcompress as lc
from llmcompress.compressor import Context, Cut
from llmcompress.distillation.alignment import Alignment, heads_left
from llmcompress.distillation.batches import collate, make_rows
from llmcompress.distillation.heads import IGNORED, head_of, model_inputs
from llmcompress.distillation.losses.states import relative_error
from llmcompress.distillation.losses.table import FEATURE_LOSSES
from llmcompress.distillation.objective import Objective
from llmcompress.distillation.observation import Observed, observing
from llmcompress.testing import FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer


def step_of(**fields):
    return lc.KnowledgeDistillation(
        **{"steps": 2, "batch_size": 4, "max_length": 16, "precision": "fp32", "learning_rate": 1e-3, **fields}
    )


def distil(teacher, step, *, student=None, history=()):
    context = Context(
        data=tiny_data(teacher), tokenizer=tiny_tokenizer(), teacher=teacher, history=list(history), progress=False
    )
    return step.compress(copy.deepcopy(teacher) if student is None else student, context), context


def losses_of(context):
    told = next(action.reason for action in context.told if (action.reason or "").startswith("loss "))
    return [float(loss) for loss in told.removeprefix("loss ").split(";")[0].split(" -> ")]


def bert(hidden=32, heads=2, layers=2, *, seed=0, **more):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 128, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 64}
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**sizes, hidden_size=hidden, initializer_range=0.2, **more)).eval()


def _queries_keys_values(block, entering):
    """What the projections of a block put out, by hand, from what enters its attention."""
    attention = block.attention.self if hasattr(block, "attention") else block.self_attn
    names = ("query", "key", "value") if hasattr(attention, "query") else ("q_proj", "k_proj", "v_proj")
    return [getattr(attention, name)(entering) for name in names]


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox", "phi3"])
def test_what_is_caught_are_the_queries_keys_and_values_of_the_block(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    model(**inputs, output_hidden_states=True)  # transformers leaves hooks of its own at the first time
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with observing(model, ["relations", "states"], [[1]]) as observe:
        seen = observe(inputs)
    caught = seen.relations[0, 1]
    entering = seen.states[0][1]
    if family == "bert":
        expected = _queries_keys_values(model.bert.encoder.layer[1], entering)
    elif family == "llama":
        block = model.model.layers[1]
        expected = _queries_keys_values(block, block.input_layernorm(entering))
    elif family == "gpt2":
        block = model.transformer.h[1]
        expected = block.attn.c_attn(block.ln_1(entering)).split(64, dim=-1)
    elif family == "gpt_neox":  # rows ordered head by head
        block = model.gpt_neox.layers[1]
        fused = block.attention.query_key_value(block.input_layernorm(entering)).view(2, 8, 4, 3, 16)
        expected = [fused[..., part, :].flatten(-2) for part in range(3)]
    else:  # two key heads of four
        block = model.model.layers[1]
        expected = block.self_attn.qkv_proj(block.input_layernorm(entering)).split([64, 32, 32], dim=-1)
    assert all(torch.allclose(mine, by_hand, atol=1e-5) for mine, by_hand in zip(caught, expected, strict=True))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_are_distributions_while_training_and_the_model_is_as_before(family):
    model = tiny_model(family).train()
    before = (
        model.config._attn_implementation,
        str(model),
        {n: vars(m).get("dropout") for n, m in model.named_modules()},
    )
    with observing(model, ["attention"]) as observe:
        maps = observe(tiny_inputs(model)).attention
    assert len(maps) == (2 if family == "t5" else 1)
    assert all(torch.allclose(own.sum(-1), torch.ones(()), atol=1e-4) for stack in maps for own in stack)
    after = model.config._attn_implementation, str(model), {n: vars(m).get("dropout") for n, m in model.named_modules()}
    assert after == before


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt_neox"])
def test_features_train_the_student_towards_the_teacher(family, monkeypatch):
    courses = {}
    plain = Objective.parts

    def spy(self, *args, progress):
        parts = plain(self, *args, progress=progress)
        for name, loss in parts.items():
            courses.setdefault(name, []).append(float(loss.detach()))
        return parts

    monkeypatch.setattr(Objective, "parts", spy)
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    # Every step sees all rows.
    step = step_of(steps=10, batch_size=8, alpha=1.0, features=dict.fromkeys(FEATURE_LOSSES, 1.0), learning_rate=1e-2)
    result, _ = distil(teacher, step, student=student)
    assert set(courses) == {"soft", *FEATURE_LOSSES}
    still = [name for name in FEATURE_LOSSES if courses[name][-1] > 0.98 * courses[name][0]]
    assert not still, courses
    assert result.config._attn_implementation == teacher.config._attn_implementation


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_features_are_means_over_blocks_and_over_the_tokens_of_each_stack(family):
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    head = head_of(student)
    data = tiny_data(teacher, 3)
    rows = make_rows(head, student, tiny_tokenizer(), data, max_length=24, labelled=True)
    batch = collate(head, rows, pad=0, decoder_start=0)
    masks = [batch["attention_mask"].bool()] + ([batch["labels"] != IGNORED] if family == "t5" else [])
    pairs = [((0, 1), (1, 0))] * len(masks)
    with observing(student, ["states"]) as mine, observing(teacher, ["states"]) as theirs:
        seen = [observe(model_inputs(batch)) for observe in (mine, theirs)]
    errors = [
        relative_error(seen[0].states[stack][own + 1], seen[1].states[stack][other + 1], mask=mask)
        for stack, mask in enumerate(masks)
        for own, other in pairs[stack]
    ]
    objective = Objective(head, alpha=0.0, features={"hidden": 3.0}, alignment=Alignment(pairs=pairs))
    part = objective.parts(*seen, batch, objective.counts(batch))["hidden"]
    assert float(part) == pytest.approx(3 * float(torch.stack(errors).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "feature"), [("llama", "relations"), ("gpt_neox", "relations"), ("llama", "attention")]
)
def test_adapters_learn_what_the_features_ask(family, feature):
    pytest.importorskip("peft")
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    step = step_of(
        steps=12,
        batch_size=8,
        alpha=1.0,
        features={feature: 5.0},
        learning_rate=3e-2,
        lora={"rank": 8},
    )
    result, context = distil(teacher, step, student=student)
    # What is caught is what leaves the adapter too: else nothing of it would be learned.
    assert losses_of(context)[-1] < 0.8 * losses_of(context)[0]
    assert not any("lora" in name for name, _ in result.named_modules())


def test_a_student_of_another_width_learns_through_projections_that_are_gone_afterwards(tmp_path):
    teacher, student = bert(48, heads=3, layers=4), bert(32, seed=1)
    step = step_of(steps=30, batch_size=8, alpha=1.0, features={"hidden": 5.0, "embeddings": 1.0}, learning_rate=3e-3)
    context = Context(data=tiny_data(teacher), tokenizer=tiny_tokenizer(), teacher=teacher, progress=False)
    planned = [action.does for action in step.plan(student, context)]
    assert "learn projections 32 -> 48" in planned
    assert "compare hidden and embeddings of blocks 0 with 2, 1 with 3" in planned
    names = list(student.state_dict())
    result, context = distil(teacher, step, student=student)
    # They start at the least-squares fit: better than no student at all, whose relative error is 1 each.
    assert losses_of(context)[0] < 6.0
    assert losses_of(context)[-1] < 0.6 * losses_of(context)[0]
    assert list(result.state_dict()) == names
    assert not any("projection" in name for name, _ in result.named_modules())


def test_relations_need_no_projection_and_other_head_counts_are_refused_for_attention():
    teacher, student = bert(48, heads=3), bert(32, seed=1)
    _, context = distil(teacher, step_of(steps=12, alpha=1.0, features={"relations": 10.0}), student=student)
    assert losses_of(context)[-1] < losses_of(context)[0]
    before = copy.deepcopy(student.state_dict())
    wrong = step_of(features={"attention": 1.0}, student="layers:1")
    context = Context(data=tiny_data(teacher), tokenizer=tiny_tokenizer(), teacher=teacher, progress=False)
    with pytest.raises(lc.UnsupportedModelError, match=r"as many heads .*got 3 in .*block 1 and 2 in .*relations"):
        wrong.plan(student, context)
    with pytest.raises(lc.UnsupportedModelError, match=r"as many heads .*got 3 in .*and 2 in .*relations"):
        distil(teacher, step_of(features={"attention": 1.0}), student=student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_after_pruning_heads_the_maps_of_those_that_stayed_are_compared(family):
    model = tiny_model(family)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name in ("dropout", "p") and isinstance(value, float):
                setattr(module, name, 0.0)
    # Maps of the blocks that see the untouched input are exactly the teacher's: there is nothing to learn there.
    distillation = step_of(steps=1, alpha=1.0, features={"attention": 1e6}, layers=((0, 0),), learning_rate=1e-9)
    steps = [lc.StructuredPruning(heads=0.5, uniform=False), distillation]
    result = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    told = next(a.reason for a in result.report.steps[1].touched if (a.reason or "").startswith("loss "))
    first = float(told.removeprefix("loss ").split(" -> ")[0])
    if family == "t5":  # its decoder sees another encoder
        assert first < 1e6
    else:
        assert first < 10.0  # 1e-5 x the weight; other heads differ by 0.1


def test_heads_are_followed_through_cuts_of_blocks_and_heads():
    teacher = tiny_model("bert")
    path = "bert.encoder.layer"
    cuts = [
        Cut(f"{path}.1.attention", "heads", (0, 2, 3), 4),
        Cut(path, "layers", (1,), 2),
        Cut(f"{path}.0.attention", "heads", (1, 2), 3),
    ]
    left = heads_left(teacher, cuts)
    assert {place: kept.tolist() for place, kept in left.items()} == {(0, 1): [2, 3]}


@pytest.mark.parametrize("layers", [(0, 9), ((0, 9),), ((5, 0),), (0,)])
def test_a_layer_map_outside_the_model_is_refused_before_training(layers):
    teacher = tiny_model("bert")
    step = step_of(features={"hidden": 1.0}, layers=layers)
    context = Context(data=tiny_data(teacher), tokenizer=tiny_tokenizer(), teacher=teacher, progress=False)
    with pytest.raises(lc.ConfigError, match=r"KnowledgeDistillation.layers must name"):
        step.plan(copy.deepcopy(teacher), context)
    # Blocks are those that the student will have.
    step = step_of(features={"hidden": 1.0}, layers=(1,), student="layers:1")
    assert "compare hidden of blocks 0 with 1" in [action.does for action in step.plan(copy.deepcopy(teacher), context)]


@pytest.mark.parametrize("features", [{}, {"embeddings": 1.0}, {"hidden": 0.0}])
def test_a_layer_map_without_a_feature_that_compares_blocks_is_refused(features):
    with pytest.raises(lc.ConfigError, match=r"layers must be left out .*layers='last'.*student='layers:0,2,5'"):
        step_of(features=features, layers="last")


def test_soft_losses_other_than_the_squared_error_are_refused_for_a_regression():
    teacher = bert(num_labels=1)
    with pytest.raises(lc.ConfigError, match=r"soft must be left out for the regression .*got 'tvd'"):
        distil(teacher, step_of(soft="tvd", alpha=1.0))


def test_weights_and_temperature_follow_their_schedule(monkeypatch):
    seen = []
    plain = Objective.parts

    def spy(self, *args, progress):
        seen.append(progress)
        return plain(self, *args, progress=progress)

    monkeypatch.setattr(Objective, "parts", spy)
    teacher = tiny_model("bert")
    step = step_of(steps=3, alpha=[1.0, 0.0], temperature=[4.0, 1.0], features={"hidden": [1.0, 0.0]})
    assert step.needs == {"data", "tokenizer", "teacher"}
    distil(teacher, step)
    assert seen == [0.0, 0.5, 1.0]
    # What is made of it: weights fall on their line, and the temperature is the one of the moment.
    torch.manual_seed(0)
    one, other = (Observed(SimpleNamespace(logits=torch.randn(4, 2)), states=[torch.randn(3, 4, 5, 8)]) for _ in "ab")
    batch = {"labels": torch.tensor([0, 1, 0, 1]), "attention_mask": torch.ones(4, 5)}
    aligned = Alignment(pairs=[((0, 0), (1, 1))])

    def parts(progress=0.0, **fields):
        objective = Objective("classification", alignment=aligned, **fields)
        return objective.parts(one, other, batch, objective.counts(batch), progress=progress)

    halfway = parts(0.5, alpha=(1.0, 0.0), temperature=(4.0, 1.0), features={"hidden": (1.0, 0.0)})
    halved = parts(alpha=0.5, temperature=2.5, features={"hidden": 0.5})
    assert {name: float(loss) for name, loss in halfway.items()} == {name: float(loss) for name, loss in halved.items()}
    assert set(parts(1.0, alpha=(1.0, 0.0), features={"hidden": (1.0, 0.0)})) == {"hard"}
    assert float(halved["soft"]) != float(parts(alpha=0.5, temperature=4.0)["soft"])
    again = type(step).model_validate_json(step.model_dump_json())
    assert again == step
    assert again.alpha == (1.0, 0.0)


def test_recipes_hold_losses_by_name():
    step = step_of(soft="tvd", features={"relations": 1}, layers=[[1, 1]])
    written = step.to_dict()
    assert (written["soft"], written["features"], written["layers"]) == ("tvd", {"relations": 1.0}, [[1, 1]])
    assert lc.compressors.create(written) == step
    step = step_of(soft={"name": "jsd", "beta": 0.1})
    assert step.to_dict()["soft"] == {"name": "jsd", "beta": 0.1}
    assert lc.compressors.create(step.to_dict()) == step == step_of(soft=lc.SoftLoss(name="jsd", beta=0.1))
