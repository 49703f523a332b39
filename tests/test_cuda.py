"""On a GPU: strategies keep the contract there, products are those of the CPU, all that measures and trains runs.

Left out where there is no CUDA device.
"""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import llmcompress as lc
from llmcompress.anatomy.probe import probe_outputs, relative_error
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import Grid
from llmcompress.quantization.kernels import int4pack
from llmcompress.quantization.modules import Int8Linear
from llmcompress.quantization.packed_modules import PackedLinear
from llmcompress.testing import (
    FAMILIES,
    IMAGE_FAMILIES,
    check_compression,
    tiny_data,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRAINED = {"steps": 4, "batch_size": 4, "max_length": 24}
STEPS = {name: lc.compressors.get(name)() for name in lc.compressors if name not in ("pipeline", "torch_pruning")}
STEPS["knowledge_distillation"] = lc.KnowledgeDistillation(**TRAINED, precision="fp32")
STEPS["pipeline"] = lc.Pipeline(steps=[lc.StructuredPruning(), lc.DynamicQuantization(activations="token")])
STEPS["nf4"] = lc.WeightOnlyQuantization(codebook="nf4")
STEPS["three bits"] = lc.WeightOnlyQuantization(bits=3)


def compress(model, steps, **options):
    options = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False, **options}
    return lc.compress(model, steps, **options)


@pytest.mark.parametrize(("name", "family"), list(product(STEPS, FAMILIES)))
def test_every_strategy_keeps_the_contract(name, family, tmp_path):
    # The same seed gives the same weights where no training adds up gradients in another order.
    result = check_compression(STEPS[name], family, twice=name != "knowledge_distillation", device=DEVICE)
    assert {tensor.device.type for tensor in (*result.model.parameters(), *result.model.buffers())} == {DEVICE}
    result.save_pretrained(tmp_path)
    there = result.model.eval()
    found = probe_outputs(there, tiny_inputs(there)).cpu()
    loaded = lc.load(tmp_path)
    if name != "bitsandbytes_quantization":  # whose models transformers loads on a GPU where there is one
        assert loaded.device.type == "cpu"
        on_cpu = probe_outputs(loaded, tiny_inputs(loaded))
        # A CPU codes the inputs of packed layers in 8 bits.
        assert relative_error(found, on_cpu) < 0.2
    again = probe_outputs(loaded.to(DEVICE), tiny_inputs(loaded)).cpu()
    assert relative_error(again, found) < 1e-3


@pytest.mark.parametrize(
    ("name", "family"),
    [("torch_pruning", "resnet"), ("dynamic_quantization", "resnet"), ("structured_pruning", "vit")],
)
def test_images(name, family):
    assert family in IMAGE_FAMILIES
    if name == "torch_pruning":
        pytest.importorskip("torch_pruning")
    check_compression(lc.compressors.get(name)(), family, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(STEPS) - {"knowledge_distillation", "pipeline"}))
def test_models_in_half_precision(name, dtype):
    model = tiny_model("llama").to(DEVICE, dtype)
    result = compress(model, STEPS[name]).model
    outputs = result(**tiny_inputs(result)).logits
    assert outputs.dtype == dtype
    assert torch.isfinite(outputs).all()


# Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["tensor", "token"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 48), (3, 65, 17), (40, 256, 128), (0, 64, 48)])
def test_int8_products_are_those_of_the_cpu(rows, inputs, outputs, activations, dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs), torch.randn(2, rows, inputs)
    layer = Int8Linear.from_float(linear, activations).to(dtype)
    with torch.no_grad():
        expected = layer(x.to(dtype)).float()
        found = layer.to(DEVICE)(x.to(DEVICE, dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.02, atol=0.02)


GRIDS = [Grid(4, 64), Grid(4, 32, symmetric=True), Grid(4, 128, zero_bits=8), Grid(3, 64), Grid(4, None), Grid(8, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [*GRIDS, Grid(4, 64, codebook="nf4")])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_are_those_of_the_unpacked_weights(grid, bias, dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64, bias=bias), torch.randn(2, 3, 256)
    layer = PackedLinear.from_coded(linear, quantize(linear.weight, grid), grid).to(dtype)
    with torch.no_grad():
        expected = x @ layer.dequantized().T + (linear.bias.float() if bias else 0)
        found = layer.to(DEVICE)(x.to(DEVICE, dtype))
    assert found.dtype == dtype
    assert relative_error(found.float().cpu(), expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", ["int8", "int4", "nf4"])
def test_inputs_may_be_views(make, dtype):
    # What `generate` gives the head: the last token of each row.
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64, device=DEVICE), torch.randn(2, 3, 256, device=DEVICE, dtype=dtype)
    if make == "int8":
        layer = Int8Linear.from_float(linear)
    else:
        grid = Grid(4, 64, codebook="nf4" if make == "nf4" else None)
        layer = PackedLinear.from_coded(linear, quantize(linear.weight, grid), grid)
    layer = layer.to(dtype)
    with torch.no_grad():
        for view in (x[:, -1:], x.transpose(0, 1), x[..., ::2].repeat(1, 1, 2), x[:1].expand(4, 3, 256)):
            torch.testing.assert_close(layer(view), layer(view.contiguous()))


def test_the_trial_of_int4_does_not_hang_on_the_default_device():
    device = torch.device(DEVICE, torch.cuda.current_device())
    assert int4pack.runs(device) == (torch.cuda.get_device_capability(device) >= (8, 0))
    with torch.device(DEVICE):
        assert int4pack.runs.__wrapped__(device) == int4pack.runs(device)


def test_the_kernels_that_are_used_are_named():
    table = lc.kernels()
    assert table.used("int8_linear", DEVICE)
    assert table.used("packed_linear", DEVICE)
    assert torch.cuda.get_device_name() in str(table)


@pytest.mark.parametrize("step", [lc.DynamicQuantization(), lc.WeightOnlyQuantization(), STEPS["nf4"]])
def test_compiled_models_answer_as_eager_ones(step):
    model = compress(tiny_model("llama").to(DEVICE), step).model.eval()
    inputs = tiny_inputs(model)
    with torch.inference_mode():
        eager, compiled = model(**inputs).logits, torch.compile(model)(**inputs).logits
    assert relative_error(compiled, eager) < 0.02


def test_a_model_goes_there_and_back():
    model = compress(tiny_model("llama"), lc.WeightOnlyQuantization()).model.eval()
    before = probe_outputs(model, tiny_inputs(model))
    probe_outputs(model.to(DEVICE), tiny_inputs(model))
    assert torch.equal(probe_outputs(model.to("cpu"), tiny_inputs(model)), before)
    assert relative_error(probe_outputs(lc.dequantize(model.to(DEVICE)), tiny_inputs(model)).cpu(), before) < 0.03


# Caches


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_growing_cache_answers_as_the_plain_one(family):
    model = tiny_model(family).to(DEVICE)
    options = {"max_new_tokens": 80, "min_new_tokens": 80, "do_sample": False}
    answers = [
        model.generate(**tiny_inputs(model), past_key_values=cache, **options)
        for cache in (DynamicCache(config=model.config), lc.GrowingCache(model.config))
    ]
    assert torch.equal(*answers)


def test_a_quantized_cache_stays_near():
    model = tiny_model("llama").to(DEVICE)
    ids = torch.randint(4, 100, (2, 60), device=DEVICE)
    cache = lc.QuantizedCache(model.config, bits=8, group_size=8, residual_length=8)
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        model(ids[:, :-1], past_key_values=cache)
        behind = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert relative_error(behind, whole) < 0.05


# Training


@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_distillation_trains_there(family, precision):
    teacher = tiny_model(family).to(DEVICE)
    fields = {"student": "layers:1", "steps": 30, "learning_rate": 1e-3, "alpha": 1.0, "precision": precision}
    trained = compress(teacher, lc.KnowledgeDistillation(**{**TRAINED, **fields}))
    untrained = compress(teacher, lc.KnowledgeDistillation(**{**TRAINED, **fields, "steps": 1, "learning_rate": 1e-9}))
    assert trained.model.device.type == DEVICE
    inputs = tiny_inputs(teacher)
    expected, found, before = (probe_outputs(one, inputs) for one in (teacher, trained.model, untrained.model))
    assert relative_error(found, expected) < relative_error(before, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"features": {"hidden": 1.0, "attention": 0.5}, "layers": "uniform"},
        {"features": {"relations": 1.0, "embeddings": 1.0}},
        {"cache": True},
        {"cache": True, "augment": lc.RandomSpans(copies=2), "alpha": 1.0},
        {"student": "width:0.5", "features": {"hidden_mse": 1.0}},
        {"lora": lc.LoRA(rank=2)},
        {"gradient_accumulation": 2, "gradient_checkpointing": True},
        {"student": None, "quantize_for": lc.WeightOnlyQuantization(bits=3, group_size=32)},
        {"early_stopping": lc.EarlyStopping(task=lc.TextClassification([("a cat", 0), ("the dog", 1)] * 4))},
    ],
    ids=str,
)
def test_ways_of_training(fields, tmp_path):
    if "cache" in fields:
        fields = {**fields, "cache": lc.TeacherCache(folder=str(tmp_path / "cache"))}
    model = tiny_model("bert").to(DEVICE)
    result = compress(model, lc.KnowledgeDistillation(**{**TRAINED, "student": "layers:1", **fields}))
    assert result.model.device.type == DEVICE
    assert torch.isfinite(probe_outputs(result.model, tiny_inputs(result.model))).all()


@pytest.mark.parametrize("way", ["sequence", "on_policy"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_on_texts_that_models_write(family, way):
    generation = lc.Generation(way=way, max_new_tokens=8, prompt_tokens=4)
    model = tiny_model(family).to(DEVICE)
    result = compress(model, lc.KnowledgeDistillation(**TRAINED, student="layers:1", generation=generation))
    assert result.model.device.type == DEVICE


def test_a_killed_chain_goes_on(tmp_path):
    model = tiny_model("bert").to(DEVICE)
    steps = [lc.StructuredPruning(), lc.KnowledgeDistillation(**TRAINED, precision="fp32"), lc.DynamicQuantization()]
    first = compress(model, steps, resume_dir=tmp_path)
    again = compress(model, steps, resume_dir=tmp_path)
    assert again.model.device.type == DEVICE
    for one, other in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# Measuring


def classification():
    return lc.TextClassification([(example.text, example.label) for example in tiny_data(tiny_model("bert"), 40)])


def test_a_model_is_scored_and_timed():
    model = tiny_model("bert").to(DEVICE)
    found = lc.evaluate(
        model, classification(), tokenizer=tiny_tokenizer(), memory=True, latency=[(1, 16)], progress=False
    )
    on_cpu = lc.evaluate(
        copy.deepcopy(model).cpu(), classification(), tokenizer=tiny_tokenizer(), latency=False, progress=False
    )
    assert found.scores[0].metrics["accuracy"] == on_cpu.scores[0].metrics["accuracy"]
    assert found.memory.cuda_peak_bytes > 100_000
    assert found.latency[0].device.startswith("cuda")
    assert "CUDA" in str(found)


def test_tasks_of_decoders():
    model = tiny_model("llama").to(DEVICE)
    texts = [example.text for example in tiny_data(model)]
    tasks = [
        lc.LanguageModeling(texts, window=16),
        lc.MultipleChoice([{"question": "one", "choices": ["two", "three"], "answer": 0}] * 4),
        lc.TextGeneration([("a", "b"), ("c", "d")], max_new_tokens=4, measures=["exact_match"]),
    ]
    found = lc.evaluate(model, tasks, tokenizer=tiny_tokenizer(), latency=[(1, 8)], generation=[(1, 8)], progress=False)
    assert len(found.scores) == 3
    assert found.generation[0].device.startswith(DEVICE)


def test_models_are_compared_and_gated():
    model = tiny_model("bert").to(DEVICE)
    result = compress(
        model,
        [lc.StructuredPruning(), lc.DynamicQuantization()],
        task=classification(),
        gates=[lc.MaxDrop("accuracy", 1.0), lc.MinAgreement(0.01)],
    )
    assert not result.report.failed()
    table = lc.compare(
        {"base": model, "small": result.model}, classification(), tokenizer=tiny_tokenizer(), progress=False
    )
    assert "small" in str(table)


def test_sensitivities_and_importances():
    model = tiny_model("llama").to(DEVICE)
    for method in ("kl", "fisher"):
        found = lc.sensitivity(model, tiny_data(model), tokenizer=tiny_tokenizer(), method=method, progress=False)
        assert "q_proj" in str(found)
    for importance in lc.importances:
        step = lc.StructuredPruning(importance=importance)
        assert compress(model, step).model.device.type == DEVICE


def test_a_chain_is_found():
    model = tiny_model("bert").to(DEVICE)
    rows = [(example.text, example.label) for example in tiny_data(model, 60)]
    found = lc.fit(
        model,
        lc.TextClassification(rows),
        rows,
        size="200 kB",
        max_drop=1.0,
        budget="40 s",
        tokenizer=tiny_tokenizer(),
        progress=False,
    )
    assert found.model.device.type == DEVICE
    assert found.sentence


def test_a_plan_foresees_the_bytes():
    model = tiny_model("llama").to(DEVICE)
    planned = lc.plan(model, lc.WeightOnlyQuantization(), data=tiny_data(model), tokenizer=tiny_tokenizer())
    result = compress(model, lc.WeightOnlyQuantization())
    assert planned.steps[-1].size.disk_bytes == result.report.steps[-1].footprint.disk_bytes
