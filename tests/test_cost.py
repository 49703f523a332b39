"""What a model costs: size, operations, generation, energy, ratios. No test here depends on how fast the machine is."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import llmcompress as lc
from llmcompress.anatomy.footprint import disk_bytes, sparse_bytes
from llmcompress.errors import ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.evaluation import energy as energy_module
from llmcompress.evaluation import latency as latency_module
from llmcompress.evaluation.cost import plan_costs
from llmcompress.evaluation.energy import find_counters, measure_energy
from llmcompress.evaluation.flops import count_flops
from llmcompress.evaluation.generation_latency import (
    GenerationLatency,
    generate_greedily,
    generates,
    generation_speedup,
    measure_generation,
    prompt_for,
)
from llmcompress.evaluation.latency import measure_latency
from llmcompress.evaluation.machine import machine
from llmcompress.evaluation.size import measure_size
from llmcompress.evaluation.turns import ratio_of, take_turns
from llmcompress.testing import FAMILIES, tiny_model

CAUSAL = sorted(set(FAMILIES) - {"bert", "distilbert", "roberta"})
CPU = torch.device("cpu")


# Size


def test_sparse_bytes_by_hand() -> None:
    layer = nn.Linear(64, 8, bias=True)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    assert sparse_bytes(layer) == disk_bytes(layer)  # nothing to leave out: stored as it is
    with torch.no_grad():
        layer.weight.view(-1)[:300] = 0
    # 512 weights: a bit each and 212 values, instead of 512 values.
    assert disk_bytes(layer) - sparse_bytes(layer) == 512 * 4 - (512 // 8 + 212 * 4)
    with torch.no_grad():
        layer.weight.view(-1)[16:] = 1
    # 16 zeros save as many bytes as the bits cost: no gain.
    assert sparse_bytes(layer) == disk_bytes(layer)


def test_int8_codes_that_are_zero_count_for_a_byte() -> None:
    layer = nn.Module()
    codes = torch.ones(16, 16, dtype=torch.int8)
    codes[:8] = 0
    layer.weight = nn.Parameter(codes, requires_grad=False)
    assert disk_bytes(layer) - sparse_bytes(layer) == 128 - 256 // 8


def test_size_has_five_numbers_and_pruning_moves_only_two() -> None:
    model = tiny_model("llama")
    before = measure_size(model)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for module in pruned.modules():
            if isinstance(module, nn.Linear):
                module.weight[module.weight.abs() < module.weight.abs().median()] = 0
    after = measure_size(pruned)
    assert (after.parameters, after.memory_bytes, after.disk_bytes) == (
        before.parameters,
        before.memory_bytes,
        before.disk_bytes,
    )
    assert after.nonzero < before.nonzero
    assert after.sparse_bytes < before.sparse_bytes <= before.disk_bytes
    assert after.zeros == pytest.approx(1 - after.nonzero / after.parameters)


def test_only_the_files_that_a_model_is_loaded_from_count(tmp_path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for folder in (tmp_path / "one", tmp_path / "shards"):
        size = measure_size(model, folder)
        assert size.from_files
        # Mistral's own layout, an adapter, a shard of an earlier save.
        for name in ("consolidated", "adapter_model", "model-00001-of-00099"):
            (folder / f"{name}.safetensors").write_bytes(bytes(1000))
        assert measure_size(model, folder) == size
    (tmp_path / "one" / "model.safetensors").unlink()
    assert not measure_size(model, tmp_path / "one").from_files


# Operations


def _expected(config, tokens: int) -> int:
    """Operations of a BERT or Llama of the tiny sizes, counted from the architecture."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    if config.model_type == "bert":
        layer = 4 * hidden**2 + 2 * hidden * inner + 2 * tokens * hidden
        return 2 * (tokens * layers * layer + hidden**2 + hidden * config.num_labels)
    head = config.head_dim
    query, key = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * inner + 2 * tokens * query
    return 2 * tokens * (layers * layer + hidden * config.vocab_size)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama", "qwen3"])
def test_operations_of_known_architectures(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    assert count_flops(model, tokens=16).count == _expected(model.config, 16)


def test_operations_of_experts_are_those_of_the_chosen_ones() -> None:
    model = tiny_model("mixtral")
    config, tokens = model.config, 16
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * hidden**2 + 2 * hidden * config.num_key_value_heads * head + 2 * tokens * hidden
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size + hidden * config.num_local_experts
    layers = config.num_hidden_layers * (attention + experts)
    assert count_flops(model, tokens=tokens).count == 2 * tokens * (layers + hidden * config.vocab_size)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_quantized_layers_count_as_the_products_they_stand_for(family: str) -> None:
    model = tiny_model(family)
    int8 = lc.DynamicQuantization().compress(copy.deepcopy(model), lc.Context())
    inputs = prompt_for(model, 1, 8) | ({"decoder_input_ids": torch.ones(1, 3).long()} if family == "t5" else {})
    with torch.inference_mode():
        before = int8(**inputs).logits
    assert count_flops(int8, tokens=8).count == count_flops(model, tokens=8).count
    with torch.inference_mode():
        assert torch.equal(int8(**inputs).logits, before)  # its layers compute again


def test_bitsandbytes_layers_are_counted_too() -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("bert")
    coded = lc.BitsAndBytesQuantization().compress(copy.deepcopy(model), lc.Context())
    assert count_flops(coded, tokens=8).count == count_flops(model, tokens=8).count


def test_what_cannot_be_counted_is_none_with_the_reason() -> None:
    model = tiny_model("bert")

    @torch.library.custom_op("llmcompress_test::secret_product", mutates_args=())
    def secret(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    class Secret(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return secret(x, self.weight.T)

    model.classifier = Secret(64, 2)
    found = count_flops(model, tokens=8)
    assert found.count is None
    assert "llmcompress_test.secret_product" in found.reason


def test_counting_leaves_the_model_as_it_was() -> None:
    model = lc.DynamicQuantization().compress(tiny_model("bert"), lc.Context()).train()
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    count_flops(model, tokens=8)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(module.training for module in model.modules())


# Generation


@pytest.mark.parametrize("family", CAUSAL)
def test_the_timed_loop_writes_what_generate_writes(family: str) -> None:
    model = tiny_model(family)
    prompt = prompt_for(model, 2, 9)
    length = {"max_new_tokens": 10, "min_new_tokens": 10, "eos_token_id": None}
    whole = model.generate(**prompt, **length, do_sample=False, pad_token_id=0)
    written = generate_greedily(model, prompt, 10)
    assert torch.equal(written.tokens, whole[:, 1:] if model.config.is_encoder_decoder else whole[:, 9:])
    assert len(written.milliseconds) == 10


def test_generation_is_summarised_from_the_turns(monkeypatch) -> None:
    models = {"base": tiny_model("llama"), "half": tiny_model("llama", seed=1)}
    pace = {id(models["base"]): 4.0, id(models["half"]): 2.0}

    def scripted(model, prompt, new_tokens):
        one = pace[id(model)]
        return SimpleNamespace(milliseconds=[10 * one, *[one] * (new_tokens - 2), 3 * one])

    module = sys.modules["llmcompress.evaluation.generation_latency"]
    monkeypatch.setattr(module, "generate_greedily", scripted)
    found = measure_generation(models, prompt_tokens=4, new_tokens=6, batch_size=3, seconds=0.0, progress=False)
    base = found["base"]
    assert (base.first_token_ms, base.token_ms, base.repeats) == (40.0, 4.0, 12)
    assert base.token_p90_ms == pytest.approx(np.percentile([4.0] * 48 + [12.0] * 12, 90))
    assert base.tokens_per_second == pytest.approx(3 / 0.004)
    faster = generation_speedup(base, found["half"])
    assert (faster.first_token.ratio, faster.token.ratio) == (2.0, 2.0)
    assert GenerationLatency.model_validate_json(base.model_dump_json()) == base


def test_generation_refuses_what_it_cannot_time() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert mamba.can_generate()
    assert not generates(mamba)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM keeps no cache"):
        measure_generation({"a": mamba})
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification does not generate"):
        measure_generation({"a": tiny_model("bert")})
    with pytest.raises(ConfigError, match=r"at most 1024 together for GPT2LMHeadModel, got 1020 \+ 8"):
        measure_generation({"a": tiny_model("gpt2")}, prompt_tokens=1020, new_tokens=8)
    with pytest.raises(ConfigError, match=r"new_tokens must be an integer in \[2, inf\), got 1"):
        measure_generation({"a": tiny_model("gpt2")}, new_tokens=1)
    with pytest.raises(MissingInputError, match="is empty"):
        measure_generation({})


def test_what_is_measured_by_default() -> None:
    llama, bert = {"a": tiny_model("llama")}, {"a": tiny_model("bert")}
    assert plan_costs(llama).generation == ((128, 16),)
    assert plan_costs(llama, latency=False).generation == ()
    assert plan_costs(bert).generation == plan_costs({**llama, "b": bert["a"]}).generation == ()
    assert plan_costs(bert).latency == ((1, 128), (8, 128))
    with pytest.raises(UnsupportedModelError, match="does not generate"):
        plan_costs(bert, generation=True)
    with pytest.raises(ConfigError, match=r"generation must be .* got \(8, 1\)"):
        plan_costs(llama, generation=[(8, 1)])
    with pytest.raises(ConfigError, match=r"latency must be True, False, or \(rows, tokens\) pairs .* got 8"):
        plan_costs(llama, latency=(8, 128))
    with pytest.raises(ConfigError, match="threads must be an integer"):
        plan_costs(llama, threads=0)
    with pytest.raises(ConfigError, match="memory must be True or False, got 'no'"):
        plan_costs(llama, memory="no")
    for seconds in ("1", -1, math.nan, None):
        with pytest.raises(ConfigError, match=r"seconds must be a number in \[0, inf\), got"):
            measure_latency(bert["a"], seconds=seconds)
        with pytest.raises(ConfigError, match=r"seconds must be a number in \[0, inf\), got"):
            measure_generation(llama, prompt_tokens=8, new_tokens=4, seconds=seconds)


def test_compare_carries_generation_threads_and_flops(tokenizer) -> None:
    models = {"base": tiny_model("llama"), "other": tiny_model("llama", seed=1)}
    task = lc.LanguageModeling(["the cat sat on the mat"] * 4, window=16)
    found = lc.compare(
        models, task, tokenizer=tokenizer, latency=[(1, 8)], generation=[(6, 4)], threads=2, progress=False
    )
    one, change = found["other"].evaluation, found["other"].change
    assert [(told.prompt_tokens, told.new_tokens, told.threads) for told in one.generation] == [(6, 4, 2)]
    assert one.latency[0].threads == 2
    assert one.latency[0].interop_threads == torch.get_num_interop_threads()
    assert change.generation[0].token.low <= change.generation[0].token.ratio <= change.generation[0].token.high
    assert (one.flops.tokens, one.flops.count) == (8, _expected(models["other"].config, 8))
    assert lc.Comparison.from_json(found.to_json()) == found
    text = str(one)
    assert "not realised" in text
    assert "first token 1x(6+4)" in text


# Energy


def _zone(root: Path, folder: str, name: str, microjoules: int, most: int = 1_000_000) -> Path:
    zone = root / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(name + "\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{most}\n")
    return zone


@pytest.fixture
def powercap(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(energy_module, "POWERCAP", tmp_path)
    return tmp_path


def test_energy_is_what_the_counters_say_across_their_wrap(powercap) -> None:
    package = _zone(powercap, "intel-rapl:0", "package-0", 900_000)
    memory = _zone(powercap, "intel-rapl:0:1", "dram", 0)
    for folder, name in [("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")]:
        _zone(powercap, folder, name, 0)
    counters = find_counters(CPU)
    assert [counter.name for counter in counters] == ["RAPL 0 package-0", "RAPL 0:1 dram"]

    def one_pass() -> None:
        for zone, spent in ((package, 150_000), (memory, 50_000)):
            file = zone / "energy_uj"
            file.write_text(str((int(file.read_text()) + spent) % 1_000_000))

    found = measure_energy({"a": one_pass}, {"a": counters}, seconds=0.0)["a"]
    assert found.joules == pytest.approx(0.2)  # the package's counter has begun again on the way
    assert (found.passes, found.counters) == (2, ("RAPL 0 package-0", "RAPL 0:1 dram"))


def test_energy_is_absent_without_a_readable_counter(powercap) -> None:
    assert find_counters(CPU) == []
    assert measure_latency(tiny_model("bert"), tokens=8, seconds=0.01).energy is None
    _zone(powercap, "intel-rapl:0", "package-0", 5)
    assert measure_latency(tiny_model("bert"), tokens=8, seconds=0.01).energy.joules == 0.0
    locked = _zone(powercap, "intel-rapl:1", "package-1", 5)
    (locked / "energy_uj").unlink()
    (locked / "energy_uj").mkdir()  # unreadable even for root: one package of two would not be the whole
    assert find_counters(CPU) == []


def test_a_gpu_is_read_by_its_uuid_and_needs_its_own_counter(powercap, monkeypatch) -> None:
    _zone(powercap, "intel-rapl:0", "package-0", 5)
    asked: list[str] = []
    state = {"millijoules": 7000}

    class NVMLError(Exception):
        pass

    def handle(uuid: str) -> str:
        asked.append(uuid)
        return "handle"

    def consumed(found: str) -> int:
        state["millijoules"] += 500
        return state["millijoules"]

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=consumed,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="GPU", uuid="12-ab"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_counters(torch.device("cuda:0")) == []  # the processor's share alone would mislead
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    counters = find_counters(torch.device("cuda:0"))
    assert [counter.name for counter in counters] == ["NVML GPU", "RAPL 0 package-0"]
    assert asked == ["GPU-12-ab"]
    before = counters[0].read()
    assert counters[0].since(before) == pytest.approx(0.5)


# Turns and ratios


def test_every_round_goes_there_and_back_and_begins_with_anyone() -> None:
    order: list[str] = []
    for _ in range(40):
        take_turns(order.append, ["a", "b", "c"], seconds=0.0, title="", progress=False)
    rounds = [order[start : start + 6] for start in range(0, len(order), 6)]
    assert len(rounds) == 40 * 6
    assert all(one == one[::-1] and sorted(one[:3]) == ["a", "b", "c"] for one in rounds)
    begins = [sum(one[0] == name for one in rounds) for name in "abc"]
    assert min(begins) > 40  # 80 expected; fewer than 40 has a probability of 1e-8


def test_the_interval_of_equal_models_holds_one_under_long_bursts(monkeypatch) -> None:
    # A neighbour that slows everything threefold for stretches of several turns, and heavy-tailed noise on top.
    random = np.random.default_rng(0)
    held, runs = 0, 2000
    for _ in range(runs):
        rounds = int(random.integers(6, 30))
        burst = 1 + 2 * (np.cumsum(random.random(4 * rounds) < 0.15) % 2)
        times = (burst * np.exp(0.05 * random.standard_t(2, 4 * rounds))).reshape(-1, 4)
        outer, inner = times[:, [0, 3]], times[:, [1, 2]]
        swap = random.random(rounds) < 0.5
        ours = np.where(swap[:, None], inner, outer).ravel()
        theirs = np.where(swap[:, None], outer, inner).ravel()
        found = ratio_of(ours.tolist(), theirs.tolist())
        held += found.low <= 1 <= found.high
    assert held / runs > 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs)


def test_one_rule_for_quick_and_slow_models_of_a_comparison(monkeypatch) -> None:
    models = {"slow": tiny_model("bert"), "quick": tiny_model("bert", seed=1)}
    pace = {id(models["slow"]): 80.0, id(models["quick"]): 20.0}
    calls: list[float] = []

    def one_pass(model, inputs) -> float:
        calls.append(pace[id(model)])
        return calls[-1]

    monkeypatch.setattr(latency_module, "QUICK_MS", 50.0)
    monkeypatch.setattr(latency_module, "_timed_pass", one_pass)
    found = latency_module.measure_latencies(models, tokens=8, seconds=0.0, progress=False)
    assert found["slow"].repeats == found["quick"].repeats == 3 * 12
    assert calls.count(80.0) == calls.count(20.0)


# Machine and memory


def test_the_machine_tells_the_settings_in_force() -> None:
    torch.set_num_threads(2)
    assert machine().settings["intra-op threads"] == "2"
    torch.set_num_threads(1)
    assert machine().settings["intra-op threads"] == "1"
    assert machine().settings["inter-op threads"] == str(torch.get_num_interop_threads())
