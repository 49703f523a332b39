"""Latency and memory: typed, sane, and the model left as it was. No test here depends on how fast the machine is."""

from __future__ import annotations

import pytest
import torch

from llmcompress.errors import CheckpointError, CompressionError, ConfigError, MissingInputError
from llmcompress.evaluation import latency as latency_module
from llmcompress.evaluation.cost import measure_costs, plan_costs
from llmcompress.evaluation.latency import Latency, measure_latencies, measure_latency, speedup
from llmcompress.evaluation.machine import Machine, machine
from llmcompress.evaluation.memory import Memory, measure_memory
from llmcompress.testing import FAMILIES, tiny_model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_timed(family: str) -> None:
    found = measure_latency(tiny_model(family), batch_size=2, tokens=8, warmup=1, seconds=0.0)
    assert 0 < found.median_ms <= found.p90_ms <= found.p99_ms
    assert found.tokens_per_second == pytest.approx(16 / found.median_ms * 1000)
    assert (found.batch_size, found.tokens, found.warmup, found.device, found.dtype) == (2, 8, 1, "cpu", "float32")


def test_an_encoder_decoder_classifier_can_be_timed() -> None:
    from transformers import T5Config, T5ForSequenceClassification

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    assert measure_latency(T5ForSequenceClassification(config), tokens=6, seconds=0.0).median_ms > 0


def test_modes_and_threads_are_given_back() -> None:
    model = tiny_model("bert").train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    found = measure_latency(model, tokens=8, seconds=0.0, threads=2)
    assert found.threads == 2
    assert torch.get_num_threads() == 1
    assert [module.training for module in model.modules()] == modes


def test_models_take_turns_there_and_back(monkeypatch) -> None:
    models = {"a": tiny_model("bert"), "b": tiny_model("bert")}
    names = {id(model): name for name, model in models.items()}
    order: list[str] = []
    clock = {"a": 4.0, "b": 1.0}

    def one_pass(model, inputs) -> float:
        order.append(names[id(model)])
        clock["a"], clock["b"] = clock["a"] * 1.001, clock["b"] * 1.001  # the machine gets slower all the time
        return clock[names[id(model)]]

    monkeypatch.setattr(latency_module, "_timed_pass", one_pass)
    found = measure_latencies(models, tokens=8, warmup=0, seconds=0.0, progress=False)
    rounds = {"".join(order[start : start + 16]) for start in range(0, len(order), 16)}
    assert len(order) == 6 * 16
    assert rounds <= {"aaaabbbbbbbbaaaa", "bbbbaaaaaaaabbbb"}
    faster = speedup(found["a"], found["b"])
    assert faster.ratio == pytest.approx(4.0, rel=1e-3)  # one order alone would be off by 0.4 %
    assert faster.low <= faster.ratio <= faster.high


def test_percentiles_of_known_times(monkeypatch) -> None:
    times = iter([100.0, *range(1, 1000)])
    monkeypatch.setattr(latency_module, "_timed_pass", lambda model, inputs: float(next(times)))
    found = measure_latency(tiny_model("bert"), tokens=8, warmup=1, seconds=0.0)
    # Slow at the warm-up: one pass a turn, two turns a round, six rounds: 1 to 12.
    assert (found.repeats, found.median_ms, found.mean_ms) == (12, 6.5, 6.5)
    assert found.p90_ms == pytest.approx(10.9)


def test_bad_requests_are_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ConfigError, match="tokens must be at most 512"):
        measure_latency(model, tokens=513)
    with pytest.raises(ConfigError, match=r"batch_size must be an integer in \[1, inf\), got 0"):
        measure_latency(model, batch_size=0)
    with pytest.raises(MissingInputError, match="is empty"):
        measure_latencies({})
    one = measure_latency(model, tokens=8, seconds=0.0)
    other = measure_latency(model, tokens=4, seconds=0.0)
    with pytest.raises(ConfigError, match="timed together"):
        speedup(one, other)


def test_latency_and_machine_survive_json() -> None:
    found = measure_latency(tiny_model("bert"), tokens=8, seconds=0.0)
    assert Latency.model_validate_json(found.model_dump_json()) == found
    assert Machine.model_validate_json(machine().model_dump_json()) == machine()
    assert machine().torch == torch.__version__


def test_memory_is_measured_in_a_fresh_process_and_sees_the_model_and_the_activations() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    # 100 MB of weights that a pass reads (an embedding's rows are not): more than the libraries' own memory moves by.
    sizes = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 24_000}
    big = BertConfig(vocab_size=64, **sizes)
    model = BertForSequenceClassification(big)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    ballast = torch.ones(100_000_000)  # a peak of the parent must not count as the child's
    found = measure_memory(model, tokens=16)
    del ballast
    many = measure_memory(model, batch_size=81, tokens=16)
    assert isinstance(found, Memory)
    assert found.load_peak_bytes > found.baseline_bytes
    assert 0.9 * weights < found.model_bytes < 3 * weights
    assert found.cuda_peak_bytes is None
    # The intermediate activations alone, of 80 more rows of 16 tokens; GELU holds its input and its output.
    inner = 80 * 16 * 24_000 * 4
    assert inner < many.inference_peak_bytes - found.inference_peak_bytes < 4 * inner
    assert abs(many.load_peak_bytes - found.load_peak_bytes) < inner


def test_memory_of_a_model_for_short_texts(monkeypatch) -> None:
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.utils import logging

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    with pytest.raises(ConfigError, match="tokens must be at most 64 for BertForSequenceClassification, got 128"):
        measure_memory(model)
    shown = []
    save = model.save_pretrained
    logging.enable_progress_bar()
    monkeypatch.setattr(
        model, "save_pretrained", lambda folder: shown.append(logging.is_progress_bar_enabled()) or save(folder)
    )
    plan = plan_costs({"short": model}, latency=False, memory=True)
    found = measure_costs({"short": model}, {"short": model}, plan, progress=False)["short"].memory
    assert found is not None
    assert found.tokens == 64
    assert shown == [False]
    assert logging.is_progress_bar_enabled()


def test_memory_refuses_what_is_no_folder_and_reports_a_broken_one(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="must be a model or its folder"):
        measure_memory(tmp_path / "absent")
    tiny_model("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CompressionError, match="in a fresh process"):
        measure_memory(tmp_path)
