"""Training for a later quantization: the rounding is that of the step, nothing is left behind, and it pays."""

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.compressor import Rounding
from llmcompress.distillation.fake_quantization import fake_quantized, settled
from llmcompress.distillation.zeros import pruned_weights
from llmcompress.testing import tiny_inputs, tiny_model, tiny_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
STEPS = {
    "int3": lc.WeightOnlyQuantization(bits=3, group_size=32),
    "nf4": lc.WeightOnlyQuantization(codebook="nf4", group_size=32),
    "int8": lc.DynamicQuantization(),
    "static": lc.StaticQuantization(samples=8, max_length=32),
}


def texts(count=24):
    draw = random.Random(0)
    return [" ".join(draw.choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], k=8)) for _ in range(count)]


def qat(step, **fields):
    more = {"steps": 3, "batch_size": 8, "max_length": 32, "alpha": 1.0, "precision": "fp32", "learning_rate": 3e-3}
    return lc.KnowledgeDistillation(quantize_for=step, **{**more, **fields})


def run(model, steps, **more):
    return lc.compress(model, steps, data=texts(), tokenizer=tiny_tokenizer(), progress=False, **more)


@pytest.mark.parametrize("name", ["int3", "nf4", "int8", "static"])
def test_rounding_is_exact_under_autocast(name):
    # Which "auto" takes on processors with AMX.
    result = run(tiny_model("llama"), [qat(STEPS[name], precision="bf16"), STEPS[name]])
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("name", ["int3", "nf4", "int8"])
def test_what_is_rounded_is_what_will_be_stored(family, name):
    model, step = tiny_model(family), STEPS[name]
    roundings = step.roundings(model)
    assert [(rounding.path, rounding.parameter) for rounding in roundings if "experts" in rounding.path] == [
        (f"model.layers.{index}.mlp.experts", parameter)
        for index in (0, 1)
        for parameter in ("gate_up_proj", "down_proj")
        if family == "mixtral"
    ]
    result = lc.dequantize(step.compress(copy.deepcopy(model), lc.Context()))
    for rounding in roundings:
        exact, stored = (getattr(each.get_submodule(rounding.path), rounding.parameter) for each in (model, result))
        assert torch.equal(rounding.weight(exact.detach()), stored)
        assert not torch.equal(exact, stored)


def test_the_student_computes_as_the_quantized_model_and_learns_underneath():
    model, step = tiny_model("llama"), lc.WeightOnlyQuantization(bits=3, group_size=32, compute="float")
    inputs = tiny_inputs(model)
    quantized = step.compress(copy.deepcopy(model), lc.Context())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    plain = model(**inputs).logits
    with fake_quantized(model, step.roundings(model)):
        logits = model(**inputs).logits
        assert torch.allclose(logits, quantized(**inputs).logits, atol=1e-4)
        assert not torch.allclose(logits, plain, atol=1e-2)
        logits.sum().backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    # Order and identity are as before, and the step still stores what the student computed with.
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert list(before) == [name for name, _ in tiny_model("llama").named_parameters()]
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.allclose(step.compress(model, lc.Context())(**inputs).logits, logits, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_static_ranges_are_calibrated_before_the_training_and_hold(family):
    torch.manual_seed(0)
    model, step = tiny_model(family), lc.StaticQuantization(samples=8, max_length=32, ranges="minmax")
    context = lc.Context(data=lc.load_examples(texts()), tokenizer=tiny_tokenizer(), progress=False)
    inputs = tiny_inputs(model)
    quantized = step.compress(copy.deepcopy(model), context)
    roundings = step.roundings(model, context)
    calibrated = [rounding for rounding in roundings if rounding.inputs is not None]
    assert len(calibrated) == sum("StaticLinear" in type(module).__name__ for module in quantized.modules()) > 4
    with fake_quantized(model, roundings):
        assert torch.allclose(model(**inputs).logits, quantized(**inputs).logits, atol=1e-4)
    # No range moves with what comes by: a hundredfold input ends where the calibrated one did.
    far = calibrated[0].inputs(torch.tensor([[-1e3, 1e3], [-1e5, 1e5]]))
    assert torch.equal(far[0], far[1])
    # A plan calibrates nothing, and counts the same layers.
    planned = step.roundings(model)
    assert [rounding.path for rounding in planned] == [rounding.path for rounding in roundings]
    assert sum(rounding.inputs is not None for rounding in planned) == len(calibrated)


@pytest.mark.parametrize(
    "step",
    [STEPS["int3"], STEPS["nf4"], STEPS["int8"], lc.WeightOnlyQuantization(bits=2, group_size=32, symmetric=True)],
)
def test_settled_weights_round_to_what_they_were_trained_as(step):
    model = tiny_model("gpt2")
    shares = []
    for rounding in step.roundings(model):
        weight = getattr(model.get_submodule(rounding.path), rounding.parameter).detach()
        once, found = rounding.weight(weight), settled(weight, rounding)
        assert torch.equal(rounding.weight(found), once)
        shares.append(float((found == once).float().mean()))
    assert sum(shares) / len(shares) > 0.5


def test_a_rounding_that_would_move_leaves_the_weight():
    weight = torch.tensor([[0.3, 1.0]])
    shrinking = Rounding("fc", "weight", 1, lambda weight: weight / 2)
    assert torch.equal(settled(weight, shrinking), weight)


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "int8"), ("gpt2", "int3"), ("t5", "int3"), ("mixtral", "int8"), ("bert", "static")]
)
def test_the_chain_ends_in_the_layout_of_the_step(family, name):
    model, data = tiny_model(family), texts()
    if family == "t5":
        data = [lc.Example(text, pair=text[::-1]) for text in data]
    chain = [qat(STEPS[name]), STEPS[name]]
    result = lc.compress(model, chain, data=data, tokenizer=tiny_tokenizer(), progress=False)
    context = lc.Context(data=lc.load_examples(data), tokenizer=tiny_tokenizer(), progress=False)
    plain = STEPS[name].compress(copy.deepcopy(model), context)
    found, expected = result.model.state_dict(), plain.state_dict()
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in found.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in expected.items()
    ]
    does = [action.does for action in result.report.steps[0].touched]
    assert any("weights rounded as" in done for done in does)
    assert any("inputs of" in done for done in does) == (name in ("int8", "static"))


def test_training_for_two_bits_recovers_what_rounding_loses():
    model, step = tiny_model("llama"), lc.WeightOnlyQuantization(bits=2, group_size=32, compute="float")
    more = {"steps": 30}
    ids = tiny_tokenizer()(texts(16), return_tensors="pt", padding=True).input_ids

    @torch.no_grad()
    def far(result):
        ours, theirs = (each(ids).logits.log_softmax(-1) for each in (result, model))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    rounded = far(run(model, step).model)
    trained = far(run(model, [qat(step, **more), step]).model)
    assert trained < 0.4 * rounded


@pytest.mark.parametrize("name", ["int3", "int8"])
def test_zeros_of_earlier_pruning_hold_to_the_end(name):
    pruned = run(tiny_model("llama"), lc.MagnitudePruning(pattern="2:4")).model
    result = run(tiny_model("llama"), [lc.MagnitudePruning(pattern="2:4"), qat(STEPS[name], weight_decay=0.1)]).model
    masks = {layer: zero for layer, _, zero in pruned_weights(pruned)}
    assert len(masks) == 14
    for rounding in STEPS[name].roundings(result):
        if rounding.path in masks:
            weight = result.get_submodule(rounding.path).weight
            assert (weight[masks[rounding.path]] == 0).all()
            assert (rounding.weight(weight)[masks[rounding.path]] == 0).all()


def test_half_precision_students_come_back_in_half():
    model = tiny_model("llama").to(torch.bfloat16)
    result = run(model, qat(STEPS["int3"])).model
    assert {parameter.dtype for parameter in result.parameters()} == {torch.bfloat16}


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    chain = [qat(STEPS["int3"]), STEPS["int3"]]
    once = run(tiny_model("llama"), chain, resume_dir=tmp_path)
    monkeypatch.setattr("llmcompress.distillation.train.train", lambda *a, **k: pytest.fail("trained again"))
    again = run(tiny_model("llama"), chain, resume_dir=tmp_path)
    state = once.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.model.state_dict().items())
    other = [qat(lc.WeightOnlyQuantization(bits=4, group_size=32)), STEPS["int3"]]
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run(tiny_model("llama"), other, resume_dir=tmp_path)


def test_recipes_and_refusals(tmp_path):
    chain = lc.Pipeline(steps=[qat(STEPS["nf4"]), STEPS["nf4"]])
    chain.to_yaml(tmp_path / "recipe.yaml")
    assert lc.Pipeline.from_yaml(tmp_path / "recipe.yaml") == chain
    assert lc.KnowledgeDistillation(quantize_for="dynamic_quantization").quantize_for == lc.DynamicQuantization()
    for wrong in (lc.MagnitudePruning(sparsity=0.5), 4, lc.GPTQ(bits=3), lc.AWQ(bits=3)):
        with pytest.raises(lc.ConfigError, match="quantize_for must be a step that rounds each weight by itself"):
            lc.KnowledgeDistillation(quantize_for=wrong)
    for smoothing in (lc.DynamicQuantization(smooth=0.5), lc.StaticQuantization(smooth=0.5)):
        with pytest.raises(lc.ConfigError, match=r"smooth must be None where .*, got 0\.5"):
            run(tiny_model("llama"), qat(smoothing))
    with pytest.raises(lc.ConfigError, match="must divide the inputs"):
        run(tiny_model("llama"), qat(lc.WeightOnlyQuantization(bits=4, group_size=48)))


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs shared/assets beside the checkout")
def test_a_trained_model_recovers():
    folder = ASSETS / "stories260K-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    story = next((ASSETS / "tinystories").glob("*.txt")).read_text(encoding="utf-8")
    held_out = tokenizer(story[:20_000], return_tensors="pt", verbose=False).input_ids[0, : 32 * 128].reshape(32, 128)
    data = [story[at : at + 400] for at in range(100_000, 180_000, 400)]
    step = lc.WeightOnlyQuantization(bits=2, group_size=32, indivisible="pad", compute="float")
    train = lc.KnowledgeDistillation(
        quantize_for=step, steps=25, alpha=1.0, temperature=1.0, learning_rate=2e-3, batch_size=8, max_length=128
    )

    @torch.no_grad()
    def loss(found):
        return float(found(held_out, labels=held_out).loss)

    def compressed(chain):
        return lc.compress(model, chain, data=data, tokenizer=tokenizer, progress=False).model

    dense, rounded, trained = loss(model), loss(compressed(step)), loss(compressed([train, step]))
    assert rounded - dense > 0.5
    assert trained - dense < 0.5 * (rounded - dense)
