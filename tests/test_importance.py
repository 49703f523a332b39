"""Importances: each score against a count by hand, the model left as it was, and the order that real models confirm."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import llmcompress as lc
from llmcompress.anatomy import anatomy
from llmcompress.anatomy.coupling import expert_groups, feed_forward_groups, head_groups, query_head_groups
from llmcompress.anatomy.groups import tensor_of
from llmcompress.anatomy.residual import residual_group
from llmcompress.calibration import calibration_batches
from llmcompress.pruning import rounding
from llmcompress.pruning.gradients import _loss, loss_gradients
from llmcompress.pruning.importance import Evidence, score_groups
from llmcompress.pruning.selection import choose
from llmcompress.pruning.widths import find_widths
from llmcompress.registry import importances
from llmcompress.testing import tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
ALL = ("activation", "fisher", "magnitude", "magnitude_l1", "random", "taylor", "wanda")
ASKING = ("activation", "fisher", "taylor", "wanda")


def _evidence(model, rows=2, **fields):
    return Evidence([tiny_inputs(model) | fields] if rows == 2 else [], who="test")


def _score(model, groups, importance, evidence=None, context=None):
    return score_groups(model, groups, importance, evidence or _evidence(model), context or lc.Context())


def _compress(model, step, **inputs):
    return lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False, **inputs)


def _groups(model, kind):
    body = anatomy(model)
    if kind == "hidden":
        return [residual_group(model, body)]
    found = {"ffn": lambda: feed_forward_groups(body), "experts": lambda: expert_groups(model, body)}
    others = {"heads": lambda: head_groups(model, body), "query_heads": lambda: query_head_groups(model, body)}
    return (found | others)[kind]()


def _inputs_of(model, names, batch):
    """Return what the modules with these names get, by plain hooks: shape (tokens, features)."""
    seen, hooks = {}, []
    for name in names:

        def hook(module, args, name=name):
            seen[name] = args[0].detach().flatten(0, -2)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.inference_mode():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


# --- the registry --------------------------------------------------------------------------------------------------


def test_the_names_and_what_they_need():
    assert set(ALL) <= set(lc.importances.list())  # other tests add some of their own
    for name in ALL:
        needs = lc.StructuredPruning(importance=name).needs
        assert needs == ({"data", "tokenizer"} if name in ASKING else set())


def test_an_unknown_name_is_refused_when_the_step_is_made():
    with pytest.raises(lc.UnknownNameError, match="no importance is called 'tailor'; did you mean 'taylor'"):
        lc.StructuredPruning(importance="tailor")


def test_a_function_of_the_user():
    calls = []

    @lc.register_importance("the_even_ones", data=True)
    def the_even_ones(model, groups, evidence):
        calls.append(len(evidence.batches))
        return [(torch.arange(group.count) % 2 == 0).double() for group in groups]

    try:
        step = lc.StructuredPruning(ffn=0.5, importance="the_even_ones")
        assert step.needs == {"data", "tokenizer"}
        assert lc.compressors.create(yaml.safe_load(yaml.safe_dump(step.to_dict()))) == step
        context = lc.Context(data=tiny_data(tiny_model("bert")), tokenizer=tiny_tokenizer())
        step.compress(tiny_model("bert"), context)
        assert context.history[0].kept == tuple(range(0, 128, 2))
        assert calls == [4]  # texts of four lengths
        with pytest.raises(lc.DuplicateNameError, match=r"give .*another name"):
            lc.register_importance("the_even_ones")(lambda model, groups, evidence: [])
    finally:
        importances._classes.pop("the_even_ones")


def test_a_function_that_returns_no_scores():
    lc.register_importance("nonsense")(lambda model, groups, evidence: [torch.ones(3), 4])
    try:
        with pytest.raises(lc.ConfigError, match=r"'nonsense' must return tensors .* got \[\(3,\), 'int'\]"):
            _compress(tiny_model("bert"), lc.StructuredPruning(importance="nonsense"))
    finally:
        importances._classes.pop("nonsense")


@pytest.mark.parametrize("importance", ASKING)
def test_missing_data_are_refused_before_any_work(importance):
    model = tiny_model("gpt2")
    with pytest.raises(lc.MissingInputError, match="StructuredPruning needs data"):
        lc.compress(model, lc.StructuredPruning(importance=importance), tokenizer=tiny_tokenizer(), progress=False)
    with pytest.raises(lc.MissingInputError, match="StructuredPruning needs a tokenizer"):
        lc.compress(model, lc.StructuredPruning(importance=importance), data=tiny_data(model), progress=False)


# --- scores by hand ------------------------------------------------------------------------------------------------


def test_sums_of_absolute_weights():
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[1]
    up, down = layer.intermediate.dense.weight.detach().abs(), layer.output.dense.weight.detach().abs()
    expected = up.sum(1) / up.mean() + down.sum(0) / down.mean()
    assert torch.allclose(_score(model, _groups(model, "ffn"), "magnitude_l1")[1], expected, rtol=1e-5)


def test_random_follows_the_seed():
    model = tiny_model("mixtral")
    groups = _groups(model, "ffn")
    first, again, other = (_score(model, groups, "random", Evidence(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("family", "kind", "name", "width"),
    [
        ("bert", "ffn", "bert.encoder.layer.{}.output.dense", 1),
        ("gpt2", "ffn", "transformer.h.{}.mlp.c_proj", 1),
        ("gpt2", "heads", "transformer.h.{}.attn.c_proj", 16),
        ("llama", "heads", "model.layers.{}.self_attn.o_proj", 32),
        ("phi3", "query_heads", "model.layers.{}.self_attn.o_proj", 16),
    ],
)
def test_activations_and_wanda_against_hooks(family, kind, name, width):
    model = tiny_model(family)
    groups = _groups(model, kind)
    batch = tiny_inputs(model)
    seen = _inputs_of(model, [name.format(index) for index in range(2)], batch)
    activation, wanda = (_score(model, groups, importance) for importance in ("activation", "wanda"))
    for index in range(2):
        module = model.get_submodule(name.format(index))
        squares = seen[name.format(index)].square().sum(0)
        weight = module.weight.detach().abs()
        columns = weight.sum(1) if family == "gpt2" else weight.sum(0)
        assert torch.allclose(activation[index], squares.view(-1, width).sum(1).sqrt(), rtol=1e-4)
        assert torch.allclose(wanda[index], (columns * squares.sqrt()).view(-1, width).sum(1), rtol=1e-4)


def test_activations_of_hidden_features_are_summed_over_what_reads_them():
    model = tiny_model("llama")
    readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    names = [f"model.layers.{layer}.{reader}" for layer in range(2) for reader in readers]
    seen = _inputs_of(model, names, tiny_inputs(model))
    expected = sum(inputs.square().sum(0).sqrt() for inputs in seen.values())
    assert torch.allclose(_score(model, _groups(model, "hidden"), "activation")[0], expected, rtol=1e-4)


def test_activations_of_experts():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    caught = []
    hook = experts.register_forward_pre_hook(lambda module, args: caught.append(args[:2]))
    with torch.inference_mode():
        model(**tiny_inputs(model))
    hook.remove()
    hidden, chosen = caught[0]
    channels, wholes = [], []
    for expert in range(4):
        own = hidden[(chosen == expert).any(-1)]
        gate, up = (own @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        channels.append(inner.square().sum(0).sqrt())
        wholes.append(own.square().sum().sqrt() + inner.square().sum().sqrt())
    scores = _score(model, _groups(model, "ffn"), "activation")[0]
    assert torch.allclose(scores, torch.stack(channels).detach(), rtol=1e-4, atol=1e-6)
    scores = _score(model, _groups(model, "experts"), "activation")[0]
    assert torch.allclose(scores, torch.stack(wholes).detach(), rtol=1e-4)


@torch.no_grad()
def _scaled(model, group, channel, factor, expert=None):
    """Return a copy of the model whose channel is multiplied by `factor` in every tensor."""
    twin = copy.deepcopy(model)
    done = set()
    for member in group.members:
        tensor = tensor_of(twin, member.tensor)
        if (tensor.data_ptr(), member.axis) not in done:
            done.add((tensor.data_ptr(), member.axis))
            part = tensor[expert] if member.per_expert else tensor
            where = (member.channel == channel).nonzero().flatten()
            axis = member.axis - member.per_expert
            part.index_copy_(axis, where, part.index_select(axis, where) * factor)
    return twin


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "ffn"),
        ("gpt2", "heads"),
        ("llama", "hidden"),
        ("phi3", "query_heads"),
        ("mixtral", "ffn"),
        ("t5", "heads"),
    ],
)
def test_taylor_is_the_slope_of_the_loss_when_a_channel_fades(family, kind):
    """The loss is computed by brute force, with the channel a little weaker and a little stronger."""
    model = tiny_model(family)
    batch = {key: tensor[:1] for key, tensor in tiny_inputs(model).items()}
    if family == "bert":
        batch["labels"] = torch.tensor([1])
    group = _groups(model, kind)[0]
    [scores] = _score(model, [group], "taylor", Evidence([batch], who="test"))
    step = 5e-3  # the loss is float32: smaller steps drown in its rounding
    for channel in range(0, group.count, max(group.count // 4, 1)):
        expert = 2 if group.experts else None
        losses = [
            float(_loss(_scaled(model, group, channel, 1 + sign * step, expert), batch, "test")[0].detach())
            for sign in (1, -1)
        ]
        slope = abs(losses[0] - losses[1]) / (2 * step)
        found = float(scores[expert, channel] if group.experts else scores[channel])
        assert found == pytest.approx(slope, rel=2e-2, abs=5e-4)


def test_taylor_is_a_mean_over_texts_by_what_each_predicts():
    model = tiny_model("gpt2")
    group = _groups(model, "ffn")[0]
    ids = tiny_inputs(model)["input_ids"]
    texts = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :3]}]
    apart = [_score(model, [group], "taylor", Evidence([text]))[0] for text in texts]
    [both] = _score(model, [group], "taylor", Evidence(texts))
    assert torch.allclose(both, (7 * apart[0] + 2 * apart[1]) / 9, rtol=1e-4)
    together = {"input_ids": ids}
    rows = [_score(model, [group], "taylor", Evidence([{"input_ids": row[None]}]))[0] for row in ids]
    assert torch.allclose(_score(model, [group], "taylor", Evidence([together]))[0], sum(rows) / 2, rtol=1e-4)


@pytest.mark.parametrize("labelled", [True, False])
def test_fisher_by_plain_autograd(labelled):
    model = tiny_model("bert")
    inputs = tiny_inputs(model)
    labels = torch.tensor([1, 0]) if labelled else model(**inputs).logits.argmax(-1)
    evidence = Evidence([inputs | {"labels": labels} if labelled else inputs])
    scores = _score(model, _groups(model, "ffn"), "fisher", evidence)[0]
    model(**inputs, labels=labels).loss.backward()
    layer = model.bert.encoder.layer[0]
    up, down = layer.intermediate.dense, layer.output.dense
    worth = [(part * part.grad).square() for part in (up.weight, up.bias, down.weight)]
    expected = worth[0].sum(1) + worth[1] + worth[2].sum(0)
    assert torch.allclose(scores, expected.detach(), rtol=1e-4)


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_language_models_are_asked_for_the_next_token(family):
    model = tiny_model(family)
    batch = tiny_inputs(model)
    with torch.inference_mode():
        loss, targets = _loss(model, batch, "test")
        ids = batch["decoder_input_ids" if family == "t5" else "input_ids"]
        logits = model(**batch).logits
    each = [-logits[row, at].log_softmax(-1)[ids[row, at + 1]] for row in range(2) for at in range(7)]
    assert targets == 14
    assert float(loss) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_heads_of_other_kinds_are_asked_for_their_own_answer():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    # One label makes a sequence classifier a regression.
    for kind, labels in (
        ("SequenceClassification", 1),
        ("TokenClassification", 3),
        ("QuestionAnswering", 2),
        ("MaskedLM", 2),
    ):
        config = transformers.BertConfig(**sizes, intermediate_size=64, num_labels=labels)
        model = getattr(transformers, f"BertFor{kind}")(config).eval()
        [scores] = _score(model, _groups(model, "ffn"), "taylor")
        assert (scores > 0).any(), kind
    bare = transformers.BertModel(config).eval()
    with pytest.raises(lc.UnsupportedModelError, match=r"BertModel has no head .* use importance='wanda'"):
        _score(bare, _groups(bare, "ffn"), "taylor")
    assert (_score(bare, _groups(bare, "ffn"), "wanda")[0] > 0).all()


def test_labels_reach_the_loss_if_every_text_has_one():
    model = tiny_model("bert")
    data = tiny_data(model)
    sizes = {"who": "test", "samples": 8, "max_length": 16, "labels": True}
    batches = calibration_batches(model, lc.Context(data=data, tokenizer=tiny_tokenizer()), **sizes)
    assert torch.cat([batch["labels"] for batch in batches]).sort().values.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    bare = [*data[1:], lc.Example("no label here")]
    batches = calibration_batches(model, lc.Context(data=bare, tokenizer=tiny_tokenizer()), **sizes)
    assert all("labels" not in batch for batch in batches)
    wrong = [*data[1:], lc.Example("a label of another model", label=7)]
    with pytest.raises(lc.ConfigError, match=r"data\[7\].label must be a class of BertForSequenceClassification"):
        lc.compress(
            model, lc.StructuredPruning(importance="fisher"), data=wrong, tokenizer=tiny_tokenizer(), progress=False
        )


# --- the model stays as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("importance", "family"), itertools.product(ASKING, ["bert", "mixtral"]))
def test_gradients_modes_and_flags_are_untouched(importance, family):
    model = tiny_model(family).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    next(iter(model.modules())).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    before = copy.deepcopy(model)
    slopes = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    kinds = ("ffn", "heads") + (("experts",) if family == "mixtral" else ())
    scores = _score(model, [group for kind in kinds for group in _groups(model, kind)], importance)
    assert all(not score.requires_grad for score in scores)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), generator)
    for own, was, slope in zip(model.parameters(), before.parameters(), slopes, strict=True):
        assert torch.equal(own, was)
        assert own.requires_grad == was.requires_grad
        assert (own.grad is None) == (slope is None)
        assert slope is None or torch.equal(own.grad, slope)


def test_the_model_is_put_back_where_the_caller_stops_early():
    model = tiny_model("gpt2").train().requires_grad_(False)
    gradients = loss_gradients(model, ["transformer.wte.weight"], Evidence([tiny_inputs(model)] * 3))
    with torch.no_grad():
        assert "transformer.wte.weight" in next(gradients)[0]
        assert not torch.is_grad_enabled()
    assert not model.training
    gradients.close()
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_scores_do_not_depend_on_dropout_or_the_mode():
    first, again = (
        _score(tiny_model("bert").train(mode), _groups(tiny_model("bert"), "ffn"), "taylor") for mode in (True, False)
    )
    assert torch.equal(first[0], again[0])


# --- what the data do not tell --------------------------------------------------------------------------------------


def _one_sided_mixture():
    """Return a Mixtral of four experts that sends each token to one of the first two."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 1}
    config = transformers.MixtralConfig(**sizes, **experts, num_key_value_heads=2, initializer_range=0.1)
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate.weight
        router[1], router[2], router[3] = -router[0], 0, 0
    return model


@pytest.mark.parametrize("importance", ASKING)
def test_experts_that_no_token_reached_go_by_magnitude_and_are_told(importance):
    model = _one_sided_mixture()
    groups = _groups(model, "ffn")
    context = lc.Context()
    [scores] = _score(model, groups, importance, context=context)
    [sizes] = _score(model, groups, "magnitude")
    for expert in (2, 3):
        assert torch.equal(scores[expert].argsort(), sizes[expert].argsort())
    assert not torch.equal(scores[0].argsort(), sizes[0].argsort())
    assert scores[2:].mean() == pytest.approx(float(scores[:2].mean()), rel=1e-4)
    assert [action.path for action in context.told] == ["model.layers.0.mlp.experts"]
    assert "experts 2, 3: no " in context.told[0].reason
    # Of whole experts it is known well enough: nobody needs them.
    [wholes] = _score(model, _groups(model, "experts"), importance)
    assert set(wholes.topk(2).indices.tolist()) == {0, 1}


@pytest.mark.parametrize("importance", [name for name in ALL if name not in ("activation", "random")])
def test_not_a_number_is_refused_with_its_layer(importance):
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 5] = torch.nan
    groups = [_groups(model, "ffn")[1]]
    with pytest.raises(lc.CompressionError, match=r"bert\.encoder\.layer\.1 is NaN or infinite: its weights"):
        _score(model, groups, importance)


def test_activations_that_overflow_are_refused_with_their_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(
        lc.CompressionError, match=r"NaN or infinite activations enter model\.layers\.0\.mlp\.down_proj"
    ):
        _score(model, _groups(model, "ffn"), "activation")


def test_texts_of_one_token_predict_nothing():
    model = tiny_model("gpt2")
    batch = {"input_ids": torch.ones(40, 1, dtype=torch.long)}
    with pytest.raises(lc.CompressionError, match="test: texts of one token have nothing to predict"):
        _score(model, _groups(model, "ffn"), "fisher", Evidence([batch], who="test"))


# --- through compress -----------------------------------------------------------------------------------------------


# In turns: every importance on two or three families, every family by three or four importances.
_TURNS = [
    (importance, family)
    for (i, importance), (j, family) in itertools.product(
        enumerate(ALL), enumerate(["bert", "gpt2", "llama", "mixtral", "t5"])
    )
    if (i + j) % 2
]


@pytest.mark.parametrize(("importance", "family"), _TURNS)
def test_every_importance_prunes_and_every_family_is_pruned(importance, family):
    model = tiny_model(family)
    step = lc.StructuredPruning(ffn=0.5, importance=importance)
    result = _compress(model, step)
    assert {tuple(s) for s in step.predicted_shapes(model).values()} == {
        tuple(tensor.shape) for tensor in result.model.state_dict().values()
    }
    if importance != "random":
        assert not any(action.path and "ranked by magnitude" in action.reason for action in result.report.steps[0].left)


_AXES = [
    ("bert", {"heads": 0.5, "uniform": False}),
    ("llama", {"query_heads": 0.5}),
    ("llama", {"hidden": 0.25}),
    ("mixtral", {"experts": 0.5, "ffn": 0.5, "rounds": 2}),
    ("t5", {"heads": 0.5}),
]


# In turns: every importance on two or three axes, every axis by two importances.
@pytest.mark.parametrize(
    ("importance", "family", "fields"),
    [
        (importance, *axis)
        for (i, importance), (j, axis) in itertools.product(enumerate(ASKING), enumerate(_AXES))
        if (i + j) % 2
    ],
)
def test_importances_of_data_on_other_axes(importance, family, fields):
    result = _compress(tiny_model(family), lc.StructuredPruning(importance=importance, **fields))
    assert result.report.steps[0].footprint.parameters < result.report.base.parameters


@pytest.mark.parametrize("importance", ["taylor", "wanda"])
def test_layers_that_compete_keep_their_floor(importance):
    model = tiny_model("llama")
    with torch.no_grad():  # in layer 0 nearly nothing comes through
        model.model.layers[0].mlp.down_proj.weight[:, 8:] *= 1e-4
        model.model.layers[0].mlp.up_proj.weight[8:] *= 1e-4
    step = lc.StructuredPruning(ffn=0.5, scope="global", uniform=False, floor=0.25, importance=importance, round_to=1)
    first, second = (layer.mlp.up_proj.out_features for layer in _compress(model, step).model.model.layers)
    assert first == 32
    assert second == 96


def test_each_round_sees_the_model_without_what_went_before():
    model = tiny_model("mixtral")
    batch = tiny_inputs(model)
    seen = []

    def score():
        with torch.inference_mode():
            logits = model(**batch, output_router_logits=True).router_logits
        seen.append([int((layer.view(-1, 4) == -torch.inf).any(0).sum()) for layer in logits])
        seen[-1].append(int((model.model.layers[0].mlp.experts.down_proj[0] == 0).all(0).sum()))
        return _score(model, widths.groups, "activation")

    widths = find_widths(model, {"ffn": 0.5, "experts": 0.5}, multiple=8, uniform=True, who="test")
    chosen = choose(model, widths, score, rounds=2, floor=None, multiple=8)
    assert len(seen) == 2
    assert seen[0][-1] == 0
    assert seen[1][-1] == 32
    assert [keep.shape[-1] for _, keep in chosen] == [64, 64, 2, 2]


def test_rounds_rank_anew():
    """Two channels that are one: dear together in the first round, and in the second one of them is enough."""
    model = tiny_model("bert")
    gone = []
    for rounds in (1, 4):
        context = lc.Context(data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        lc.StructuredPruning(ffn=0.5, importance="taylor", rounds=rounds).compress(copy.deepcopy(model), context)
        gone.append([set(cut.kept) for cut in context.history])
    assert gone[0] != gone[1]
    assert [len(kept) for kept in gone[0]] == [len(kept) for kept in gone[1]] == [64, 64]


# --- widths by measurement ------------------------------------------------------------------------------------------


def _timed_as(monkeypatch, cost):
    """Have the products of each width take `cost(width)` seconds; return the widths that were asked about."""
    asked = []

    def seconds(candidates, dtype, device, threads):
        widths = [shapes[-1][0] for shapes in candidates]
        asked.extend(widths)
        return tuple(cost(width) for width in widths)

    monkeypatch.setattr(rounding, "product_seconds", seconds)
    return asked


def test_the_fastest_multiple_is_taken_and_told(monkeypatch):
    model = tiny_model("llama", seed=1)
    asked = _timed_as(monkeypatch, lambda width: width * (1.0 if width % 32 == 0 else 2.0))
    result = _compress(model, lc.StructuredPruning(ffn=0.27, round_to="auto"))
    assert result.model.config.intermediate_size == 96
    assert set(asked) == {93, 96}
    [told] = [action.reason for action in result.report.steps[0].left if "auto" in action.reason]
    assert "model.layers.0.mlp take, for 64 rows, 1.86e+05 ms at 93, 9.6e+04 ms at 96" in told


def test_of_equal_costs_the_smallest_multiple_is_taken(monkeypatch):
    _timed_as(monkeypatch, lambda width: width * (1.0 if width % 8 == 0 else 1.01))
    assert rounding.fastest_rounding(tiny_model("bert"), {"ffn": 0.27}).multiple == 1


def test_multiples_that_round_too_far_are_not_tried(monkeypatch):
    asked = _timed_as(monkeypatch, lambda width: 1.0)
    rounding.fastest_rounding(tiny_model("bert"), {"ffn": 0.4})  # 76.8 of 128
    assert set(asked) == {77, 80}
    mixture = rounding.fastest_rounding(tiny_model("mixtral"), {"ffn": 0.4})
    assert mixture.multiple in (1, 16)


def test_the_plan_measures_what_the_work_does_and_only_once():
    model = tiny_model("bert")
    step = lc.StructuredPruning(ffn=0.27, round_to="auto")
    planned = [action.does for action in step.plan(model, lc.Context()) if action.touched]
    misses = rounding.product_seconds.cache_info().misses
    width = step.compress(model, lc.Context()).config.intermediate_size
    assert planned == [f"128 -> {width} FFN channels"] * 2
    assert rounding.product_seconds.cache_info().misses == misses


def test_auto_where_there_is_nothing_to_measure():
    heads = rounding.fastest_rounding(tiny_model("llama"), {"heads": 0.5})
    assert (heads.multiple, "rounds nothing here" in heads.remark) == (8, True)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(tiny_model("llama").config)
    assert "meta device" in rounding.fastest_rounding(empty, {"ffn": 0.5}).remark


def test_auto_goes_through_a_recipe_and_nonsense_is_refused():
    step = lc.StructuredPruning(ffn=0.5, round_to="auto")
    assert lc.compressors.create(yaml.safe_load(yaml.safe_dump(step.to_dict()))) == step
    for wrong in (0, 1025, "fast", 2.5, True):
        with pytest.raises(lc.ConfigError, match=r"round_to must be .*number.*, got"):
            lc.StructuredPruning(ffn=0.5, round_to=wrong)


# --- distillation behind it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *itertools.product(
            ["bert", "llama"],
            [
                {"ffn": 0.5},
                {"ffn": 0.5, "uniform": False},
                {"heads": 0.5, "uniform": False},
                {"hidden": 0.25, "uniform": False},
            ],
        ),
        ("llama", {"heads": 0.5}),
        ("llama", {"hidden": 0.25}),
        ("mixtral", {"experts": 0.5}),
        ("mixtral", {"experts": 0.5, "uniform": False}),
        ("mixtral", {"ffn": 0.5, "heads": 0.5}),
    ],
)
def test_distillation_follows_with_nothing_to_configure(family, fields):
    model = tiny_model(family)
    training = {"steps": 4, "batch_size": 4, "max_length": 16, "precision": "fp32"}
    steps = [lc.StructuredPruning(**fields), lc.KnowledgeDistillation(features={"hidden": 1.0}, **training)]
    trained = _compress(model, steps).model
    pruned = steps[0].compress(copy.deepcopy(model), lc.Context())
    shapes = [[tensor.shape for tensor in each.state_dict().values()] for each in (trained, pruned)]
    assert shapes[0] == shapes[1]
    assert torch.isfinite(trained(**tiny_inputs(model)).logits).all()


# --- a model that was trained ---------------------------------------------------------------------------------------


@pytest.mark.assets
@pytest.mark.skipif(not (ASSETS / "babyllama-tok105-hf").is_dir(), reason=f"no folder {ASSETS}")
def test_data_rank_the_channels_of_a_trained_model_better():
    folder = ASSETS / "babyllama-tok105-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    story = next((ASSETS / "tinystories").glob("*.txt")).read_text(encoding="utf-8").replace("\n\n", "\n")
    ids = tokenizer(story[:9000], return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    data = [lc.Example(story[400_000 + at * 1200 : 401_200 + at * 1200]) for at in range(16)]
    lost = {}
    for importance in ALL:
        pruned = copy.deepcopy(model)
        context = lc.Context(data=data, tokenizer=tokenizer, progress=False)
        lc.StructuredPruning(ffn=0.25, importance=importance, max_length=256).compress(pruned, context)
        rows = ids[: 32 * 256].view(32, 256)
        with torch.inference_mode():
            logits = pruned(input_ids=rows).logits[:, :-1].flatten(0, 1)
        lost[importance] = float(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()))
    assert max(lost[importance] for importance in ASKING) < 1.35
    assert min(lost[importance] for importance in ALL if importance not in ASKING) > 1.45
