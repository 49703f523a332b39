"""What each layer suffers from few bits: measured as by hand, estimated close to it, and bits chosen by it."""

import itertools
import json

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.layers import select
from llmcompress.calibration import calibration_batches
from llmcompress.calibration.answers import answers_of, divergence, log_distributions
from llmcompress.data import load_examples
from llmcompress.quantization.allocation import Choice, allocate
from llmcompress.quantization.damage import Candidate, estimated, measured
from llmcompress.quantization.grid import Grid
from llmcompress.quantization.sensitivity_table import LayerDamage
from llmcompress.testing import tiny_data, tiny_inputs, tiny_model, tiny_tokenizer


def prepared(family, **context):
    model = tiny_model(family)
    context = lc.Context(data=tiny_data(model), tokenizer=tiny_tokenizer(), **context)
    return model, calibration_batches(model, context, who="test", samples=8, max_length=16)


def candidates_of(model, patterns, widths=(2, 4)):
    layers, _ = select(model, who="test", targets=patterns, kinds=("linear", "conv1d", "experts", "embedding"))
    return [Candidate(layer, {width: Grid(width, 32) for width in widths}) for layer in layers]


@torch.no_grad()
def by_hand(model, batches, candidate, width):
    def logs():
        return torch.cat([log_distributions(answers_of(model, model(**batch))) for batch in batches])

    before, base = candidate.layer.weight.clone(), logs()
    candidate.layer.weight.copy_(candidate.rounded(width, "min_max"))
    found = divergence(base, logs()).mean().item()
    candidate.layer.weight.copy_(before)
    return found


@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("llama", ("*.v_proj", "*.down_proj", "lm_head", "*embed_tokens")),
        ("gpt2", ("*.c_fc",)),
        ("bert", ("*.query", "classifier")),
        ("mixtral", ("*.experts.down_proj",)),
        ("t5", ("*.v", "*.wo")),
    ],
)
def test_the_measured_damage_is_that_of_a_plain_pass(family, patterns):
    model, batches = prepared(family)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    candidates = candidates_of(model, patterns)
    found, answers = measured(model, batches, candidates, "min_max", who="test")
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert answers == sum(len(answers_of(model, model(**batch))) for batch in batches)
    for candidate in candidates:
        for width in candidate.grids:
            expected = by_hand(model, batches, candidate, width)
            assert found[candidate.layer.name, width] == pytest.approx(expected, rel=1e-3, abs=1e-8)
        assert found[candidate.layer.name, 2] > found[candidate.layer.name, 4] > 0


@pytest.mark.parametrize(("family", "patterns"), [("llama", None), ("bert", None)])
def test_the_estimate_is_close_to_what_is_measured(family, patterns):
    model, batches = prepared(family)
    candidates = candidates_of(model, patterns, widths=(4, 6))
    expected, answers = measured(model, batches, candidates, "min_max", who="test")
    found = [estimated(model, batches, candidates, "min_max", who="test", seed=seed) for seed in range(4)]
    assert {own for _, own in found} == {answers}
    assert all(parameter.requires_grad for parameter in model.parameters())
    mean = {key: np.mean([one[key] for one, _ in found]) for key in expected}
    logs = np.log([[expected[key], mean[key]] for key in expected])
    assert np.corrcoef(logs.T)[0, 1] > 0.9
    assert 0.4 < sum(mean.values()) / sum(expected.values()) < 2.5


def test_the_estimate_by_hand_for_one_linear_layer():
    # A regression: KL = half the squared difference, F = x x^T at each answer. One text makes the estimate exact but
    # for the draw, whose square has mean 1.
    model, batches = prepared("bert")
    model.config.num_labels = 1
    model.classifier = torch.nn.Linear(64, 1)
    candidates = candidates_of(model, ("classifier",), widths=(3,))
    draws = [estimated(model, batches, candidates, "min_max", who="test", seed=seed)[0] for seed in range(40)]
    with torch.no_grad():
        rows = torch.cat([model.bert(**batch).pooler_output for batch in batches])
    error = (candidates[0].rounded(3, "min_max") - model.classifier.weight).detach()
    exact = float((rows.square() * error.square()).sum(-1).mean() / 2)
    assert np.mean([next(iter(draw.values())) for draw in draws]) == pytest.approx(exact, rel=0.25)


def test_answers_of_spans_labels_and_headless_models():
    from transformers import BertForQuestionAnswering

    model = tiny_model("bert")
    spans = BertForQuestionAnswering(model.config)
    inputs = tiny_inputs(model)
    rows, tokens = inputs["input_ids"].shape
    assert answers_of(spans, spans(**inputs)).shape == (2 * rows, tokens)
    assert answers_of(model.bert, model.bert(**inputs)).shape == (rows * tokens * 64, 1)
    plain = model(**inputs).logits
    model.config.problem_type = "multi_label_classification"
    found = log_distributions(answers_of(model, model(**inputs)))
    assert torch.allclose(found.exp()[:, 1], plain.sigmoid().flatten())


# -- allocation ---------------------------------------------------------------------------------------------------


def test_the_allocation_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for trial in range(5):
        choices = {
            name: [Choice(bits, bits + 0.5, damage) for bits, damage in zip((2, 3, 4, 8), damages, strict=True)]
            for name, damages in zip("abcde", np.sort(generator.exponential(1e-4, (5, 4)))[:, ::-1], strict=True)
        }
        weights = dict(zip("abcde", generator.integers(1, 100, 5).tolist(), strict=True))
        total, best = sum(weights.values()), np.inf
        for picked in itertools.product(range(4), repeat=5):
            own = [choices[name][index] for name, index in zip("abcde", picked, strict=True)]
            if sum(one.stored * weights[name] for one, name in zip(own, "abcde", strict=True)) <= 4.6 * total:
                best = min(best, sum(one.damage for one in own))
        found = allocate(choices, weights, 4.6)
        damage = sum(one.damage for name in "abcde" for one in choices[name] if one.bits == found[name])
        assert damage == pytest.approx(best, rel=1e-3), trial
        assert sum((found[name] + 0.5) * weights[name] for name in "abcde") <= 4.6 * total + 1e-6


def test_a_target_that_is_the_least_gives_the_fewest_bits_and_one_below_is_refused():
    choices = {"a": [Choice(2, 2.5625, 1.0), Choice(3, 3.59, 0.1)]}
    assert allocate(choices, {"a": 10}, 2.5625) == {"a": 2}
    with pytest.raises(lc.ConfigError, match=r"at least 2\.562 here, got 2\.5"):
        allocate(choices, {"a": 10}, 2.5)


# -- the table ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    rows = [
        LayerDamage(layer=name, weights=weights, bits=bits, bits_a_weight=bits + 0.5, damage=scale * 4.0**-bits)
        for name, weights, scale in (("up", 100, 1.0), ("<down>", 50, 8.0))
        for bits in (2, 4)
    ]
    return lc.Sensitivity(model="Tiny", method="kl", answers=7, fit="min_max", group_size=32, rows=rows)


def test_the_table_says_and_shows_what_it_holds(table, tmp_path):
    assert str(table).splitlines()[2].split() == ["up", "100", "0.062", "0.0039"]
    assert table.predicted({"up": 2, "<down>": 4}) == pytest.approx(1 / 16 + 8 / 256)
    assert table.bits_a_weight({"up": 2, "<down>": 4}) == pytest.approx((2.5 * 100 + 4.5 * 50) / 150)
    assert table.allocate(3.2) == {"up": 2, "<down>": 4}
    html = table._repr_html_()
    assert "&lt;down&gt;" in html
    assert "rgb(127,0,0)" in html
    assert lc.Sensitivity.model_validate(table.to_dict()) == table
    assert lc.Sensitivity.model_validate_json(table.to_json(tmp_path / "s.json")) == table
    assert json.loads((tmp_path / "s.json").read_text())["answers"] == 7
    pytest.importorskip("matplotlib")
    figure = table.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    assert figure.axes[0].get_xlabel() == "bits of a code"
    with pytest.raises(lc.ConfigError, match=r"bits must be of \[2, 4\], got \[3\]"):
        table.allocate(4.0, bits=[3])
    with pytest.raises(lc.ConfigError, match="'up' and 3"):
        table.damage("up", 3)


def test_refusals():
    model = tiny_model("llama")
    given = {"tokenizer": tiny_tokenizer(), "progress": False}
    with pytest.raises(
        lc.ConfigError, match=r"sensitivity\.bits must be some of 2 to 8, such as \(2, 4\), got \(1, 4\)"
    ):
        lc.sensitivity(model, tiny_data(model), bits=(1, 4), **given)
    with pytest.raises(lc.ConfigError, match=r"sensitivity\.bits must be some of 2 to 8, such as \(2, 4\), got 4"):
        lc.sensitivity(model, tiny_data(model), bits=4, **given)
    with pytest.raises(lc.ConfigError, match="method must be"):
        lc.sensitivity(model, tiny_data(model), method="hessian", **given)
    with pytest.raises(lc.MissingInputError, match="too short"):
        lc.sensitivity(model, ["a"], **given)
    small = lc.compress(tiny_model("llama"), lc.DynamicQuantization(), progress=False).model
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        lc.sensitivity(small, tiny_data(model), **given)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(lc.CompressionError, match="NaN or infinite"):
        lc.sensitivity(model, tiny_data(model), **given)
    with pytest.raises(lc.CompressionError, match="NaN or infinite"):
        lc.sensitivity(model, tiny_data(model), method="fisher", **given)


def test_the_table_refuses_what_it_was_not_asked(table):
    for bits, words in (({}, "each of its layers"), (7, "bits of .*, got 7")):
        with pytest.raises(lc.ConfigError, match=words):
            table.bits_a_weight(bits)
    for target in (float("nan"), "4"):
        with pytest.raises(lc.ConfigError, match=r"target_bits must be a number, such as 4\.5, got"):
            table.allocate(target)


# -- bits="auto" --------------------------------------------------------------------------------------------------


def test_auto_keeps_to_its_target_and_can_be_had_again_without_data(tmp_path):
    model = tiny_model("llama")
    step = lc.WeightOnlyQuantization(bits="auto", target_bits=4.0, group_size=32, overrides={"*.q_proj": 8})
    given = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False}
    result = lc.compress(model, step, **given)
    record = result.report.steps[0]
    done = {action.path: action.does for action in record.touched}
    assert len(done) == len(record.touched) == 14
    assert done["model.layers.0.self_attn.q_proj"].startswith("int8")
    assert any("stored bits a weight, of 4 at most" in action.reason for action in record.left if not action.path)
    grids = {
        path: (module.grid, module.rows * module.columns, module.columns)
        for path, module in result.model.named_modules()
        if hasattr(module, "grid")
    }
    assert all(done[path].startswith(f"int{grid.bits},") for path, (grid, _, _) in grids.items())
    free = [own for path, own in grids.items() if "q_proj" not in path]
    assert len({grid.bits for grid, _, _ in free}) > 1
    assert sum(g.bits_a_weight(columns) * n for g, n, columns in free) / sum(n for _, n, _ in free) <= 4.0
    context = lc.Context(data=load_examples(given["data"]), tokenizer=given["tokenizer"], progress=False)
    plain = step.resolved(model, context)
    assert plain.needs == frozenset()
    again = lc.compress(model, plain, progress=False).model
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    result.save_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    assert torch.equal(lc.load(tmp_path)(**inputs).logits, result.model(**inputs).logits)


def test_tied_layers_count_once_and_get_the_same_bits():
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    step = lc.WeightOnlyQuantization(bits="auto", target_bits=5, group_size=32, targets=("*.c_fc", "lm_head"))
    result = lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    assert result.model.lm_head.grid == result.model.transformer.wte.grid


def test_auto_is_refused_where_it_cannot_work():
    with pytest.raises(lc.ConfigError, match="target_bits must be given with bits='auto'"):
        lc.WeightOnlyQuantization(bits="auto")
    with pytest.raises(lc.ConfigError, match=r"target_bits must be None with bits=4, got 4\.5"):
        lc.WeightOnlyQuantization(target_bits=4.5)
    with pytest.raises(lc.ConfigError, match="must be above the fewest bits"):
        lc.WeightOnlyQuantization(bits="auto", target_bits=2)
    with pytest.raises(lc.ConfigError, match="auto_bits must be some of 2 to 8"):
        lc.WeightOnlyQuantization(bits="auto", target_bits=4, auto_bits=(1, 4))
    with pytest.raises(lc.ConfigError, match=r"bits must be in \[2, 8\], got 'best'; or 'auto'"):
        lc.WeightOnlyQuantization(bits="best")
    with pytest.raises(lc.ConfigError, match="bits must be 4 with codebook"):
        lc.WeightOnlyQuantization(bits="auto", target_bits=4.5, codebook="nf4")
    model = tiny_model("llama")
    step = lc.WeightOnlyQuantization(bits="auto", target_bits=2.2, group_size=32)
    with pytest.raises(lc.MissingInputError, match="needs data"):
        lc.compress(model, step, progress=False)
    given = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False}
    with pytest.raises(lc.ConfigError, match=r"target_bits must be at least 2\.562 .* got 2\.2"):
        lc.compress(model, step, **given)
    with pytest.raises(lc.ConfigError, match="overrides name every layer"):
        lc.compress(model, step.model_copy(update={"overrides": {"*": 4}}), **given)
    step = step.model_copy(update={"target_bits": 4.5})
    assert next(action.does for action in step.plan(model, lc.Context())).startswith("int2, 3, 4, 5, 6 or 8, chosen")


@pytest.mark.parametrize("strategy", [lc.AWQ, lc.GPTQ])
def test_calibrated_strategies_take_their_bits_from_plain_rounding(strategy):
    model = tiny_model("llama")
    step = strategy(bits="auto", target_bits=3.9, group_size=32, auto_bits=(3, 4), samples=4)
    assert not step.in_turns
    given = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False}
    result = lc.compress(model, step, **given)
    done = {a.path: a.does for a in result.report.steps[0].touched if a.does.startswith("int")}
    grids = {path: module.grid for path, module in result.model.named_modules() if hasattr(module, "grid")}
    assert {grid.bits for grid in grids.values()} == {3, 4}
    assert all(done[path].startswith(f"int{grid.bits},") for path, grid in grids.items())
    with pytest.raises(lc.ConfigError, match="bits must be chosen before it is trained for"):
        lc.WeightOnlyQuantization(bits="auto", target_bits=4).roundings(model)
