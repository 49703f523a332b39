"""bitsandbytes' formats: every family, plain reloading, scales that stay exact, and refusals."""

import copy
import logging
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmcompress as lc
from llmcompress.checkpoint import load, save
from llmcompress.quantization.bitsandbytes_paths import product_path
from llmcompress.testing import FAMILIES, save_expected, tiny_inputs, tiny_model

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'llmcompress[bnb]'")
# LLM.int8() warns at each product of a float32 input.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

KINDS = {
    "nf4": {"kind": "nf4"},
    "nf4 double": {"kind": "nf4", "double_quant": True},
    "fp4": {"kind": "fp4"},
    "int8": {"kind": "int8"},
}

on_cpus = pytest.mark.skipif(
    torch.cuda.is_available(), reason="transformers loads models of bitsandbytes on the GPU; see test_cuda.py"
)


def quantized(family="llama", **fields):
    return lc.BitsAndBytesQuantization(**fields).compress(tiny_model(family), lc.Context())


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads_without_llmcompress(family, plain_reloads, tmp_path):
    for kind, fields in KINDS.items():
        if kind == "fp4" and family not in ("llama", "gpt2"):  # the same files as nf4, other levels
            continue
        model = quantized(family, **fields)
        logits(model)  # a forward pass before it is saved, on purpose: see keep_exact
        model.save_pretrained(tmp_path / kind)
        save_expected(model, tmp_path / kind)
        plain_reloads.append(tmp_path / kind)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.4), ("fp4", 0.5), ("int8", 0.06)])
def test_logits_stay_near_and_the_original_untouched(family, kind, bound):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    result = lc.BitsAndBytesQuantization(kind=kind).compress(model, lc.Context())
    expected = logits(model)
    assert (logits(result) - expected).norm() / expected.norm() < bound
    assert isinstance(result.config.quantization_config, BitsAndBytesConfig)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    if model.can_generate():
        assert result.generation_config.to_dict() == model.generation_config.to_dict()
    assert not result.training


@on_cpus
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_passes_and_state_dicts_may_alternate(family, kind, tmp_path):
    model = quantized(family, **KINDS[kind])
    expected = logits(model)
    for _ in range(2):
        model.state_dict()
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    loaded = load(save(model, tmp_path / "once", metadata={}))
    assert torch.equal(logits(loaded), expected)
    again = load(save(loaded, tmp_path / "twice", metadata={}))
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(loaded), expected)


def test_same_input_same_tensors():
    one, two = quantized().state_dict(), quantized().state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_left_is_told():
    plan = lc.BitsAndBytesQuantization().plan(tiny_model("mixtral"), lc.Context())
    reasons = {action.path: action.reason for action in plan if not action.touched}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"].startswith(
        "3-D experts, which bitsandbytes leaves in float"
    )
    assert "output head" in reasons["lm_head"]
    warnings = [action.reason for action in plan if not action.path]
    assert len(warnings) == 2
    assert re.match(r"\d\d% of the weights are 3-D experts", warnings[0])
    assert warnings[1].startswith("no fast path: bitsandbytes is made for GPUs")

    plan = lc.BitsAndBytesQuantization().plan(tiny_model("gemma"), lc.Context())
    narrow = next(action for action in plan if action.path == "model.layers.0.self_attn.k_proj")
    assert narrow.reason == "its 16 outputs are no multiple of 32, as the CPU kernels of bitsandbytes need"
    assert lc.BitsAndBytesQuantization(kind="int8").plan(tiny_model("gemma"), lc.Context())[1].touched


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "fast", "how"),
    [
        ("nf4", (8, 0), torch.bfloat16, True, "4-bit kernel"),
        ("nf4", (8, 0), torch.float32, False, "take compute_dtype='bfloat16'"),
        ("fp4", (7, 5), torch.float32, False, "take compute_dtype='float16'"),
        ("fp4", (7, 5), torch.bfloat16, False, "7.5 has no bfloat16 tensor cores"),
        ("int8", (7, 5), torch.float32, True, "int8 tensor cores"),
        ("int8", (7, 0), torch.float32, False, "7.0 has no int8 tensor cores"),
    ],
)
def test_the_path_of_products_on_gpus_is_named(kind, capability, dtype, fast, how, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = product_path(kind, torch.device("cuda"), dtype)
    assert found[0] is fast
    assert how in found[1]


@pytest.mark.parametrize("has", [True, False])
def test_the_path_of_products_on_cpus_is_named(has, monkeypatch):
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if has else "AVX2")
    four, eight = (product_path(kind, torch.device("cpu"), torch.float32) for kind in ("nf4", "int8"))
    assert (four[0], eight[0]) == (False, False)
    assert ("its AVX-512 BF16 kernel" if has else "expands the whole weight") in four[1]
    assert ("torch._int_mm" if has else "no int8 product") in eight[1]


@on_cpus
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_is_stored_is_what_transformers_stores(kind, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    for double in (False, True):
        ours = lc.BitsAndBytesQuantization(kind=kind, double_quant=double).compress(model, lc.Context())
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            llm_int8_skip_modules=["lm_head"],
        )
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).state_dict()
        found = ours.state_dict()
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[name], theirs[name]) for name in found if "quant_state" not in name)


def test_double_quantization_stores_scales_in_eight_bits():
    once, twice = (quantized(double_quant=double).state_dict() for double in (False, True))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(once[weight], twice[weight])
    assert (once[f"{weight}.absmax"].dtype, twice[f"{weight}.absmax"].dtype) == (torch.float32, torch.uint8)
    assert once[f"{weight}.absmax"].numel() == once[weight].numel() * 2 // 64
    # One float for 256 scales, and a byte for each: 0.373 bits a weight less.
    blocks = once[f"{weight}.absmax"].numel()
    assert 4 * blocks - (blocks + 4 * twice[f"{weight}.nested_absmax"].numel()) == 4 * 128 - (128 + 4)


def test_a_layer_whose_inputs_no_block_divides_is_left_and_the_rest_works():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj = nn.Linear(96, 64, bias=False)
        block.mlp.gate_proj, block.mlp.up_proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
    model.config.intermediate_size = 96
    plan = lc.BitsAndBytesQuantization().plan(model, lc.Context())
    reason = next(action.reason for action in plan if action.path == "model.layers.0.mlp.down_proj")
    assert reason == "its 96 inputs are no multiple of bitsandbytes' block of 64"
    result = lc.BitsAndBytesQuantization().compress(model, lc.Context())
    assert type(result.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(result.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert logits(result).isfinite().all()


def test_targets_skip_and_dtype():
    model = quantized(targets=("*.mlp.*",), skip=("*.down_proj",), compute_dtype="bfloat16")
    found = {path for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert found == {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj")}
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    half = lc.BitsAndBytesQuantization().compress(tiny_model("qwen2").to(torch.bfloat16).train(), lc.Context())
    assert half.dtype == torch.bfloat16
    assert half.training


def test_refusals(monkeypatch):
    with pytest.raises(lc.ConfigError, match="'nf4', 'fp4' or 'int8', got 'int4'"):
        lc.BitsAndBytesQuantization(kind="int4")
    with pytest.raises(lc.ConfigError, match="double_quant must be left out with kind='int8'"):
        lc.BitsAndBytesQuantization(kind="int8", double_quant=True)
    with pytest.raises(lc.ConfigError, match="compute_dtype must be left out with kind='int8'"):
        lc.BitsAndBytesQuantization(kind="int8", compute_dtype="float16")
    with pytest.raises(lc.UnsupportedModelError, match=r"already quantized \(bitsandbytes\)"):
        lc.BitsAndBytesQuantization().compress(quantized(), lc.Context())
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        lc.DynamicQuantization().compress(quantized(), lc.Context())
    with pytest.raises(lc.NothingToCompressError, match="tied to"):
        quantized(targets=("lm_head",))
    broken = tiny_model("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(lc.CompressionError, match=r"layers\.0\.mlp\.up_proj hold NaN or infinity"):
        lc.BitsAndBytesQuantization().compress(broken, lc.Context())
    monkeypatch.setattr("llmcompress.quantization.bitsandbytes.find_spec", lambda name: None)
    with pytest.raises(lc.PluginError, match=r"pip install 'llmcompress\[bnb\]'"):
        lc.BitsAndBytesQuantization().plan(tiny_model("llama"), lc.Context())


def test_generates_with_and_without_cache_alike():
    model = quantized()
    settings = {**tiny_inputs(model), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**settings, use_cache=True), model.generate(**settings, use_cache=False))


@on_cpus
def test_a_plain_auto_class_reads_it(tmp_path):
    model = quantized("gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
