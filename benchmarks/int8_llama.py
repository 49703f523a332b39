"""int8 and 4 bits against their peers on a Llama of 150 million random weights: `python benchmarks/int8_llama.py`.

Two passes: `prefill`, 128 tokens, logits of the last; and `decode`, one token behind 128 that are in the cache. Each
engine has a process of its own, and all take turns in each round. Prints Markdown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from _int8_engines import Engine, dynamic, eager, onnx_int8, static, torch_ao
from _workers import command_line, print_turns

_TOKENS = 128
_CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2560,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=1024,
)


def main() -> None:
    arguments = command_line(__doc__, "passes", "prefill,decode", "which passes")
    with torch.device("meta"):
        weights = LlamaForCausalLM(_CONFIG).num_parameters()
    columns = {name: (name, inputs_of(name)) for name in arguments.passes.split(",")}
    title = f"int8 and 4 bits, a Llama of {weights / 1e6:.0f} million weights"
    print_turns(title, {name: partial(engine, name) for name in ENGINES}, columns, arguments)


def engine(name: str, threads: int) -> Callable[[tuple[str, dict[str, torch.Tensor]]], object]:
    """Return one of `ENGINES`, in its own process: it is given the name of a pass, and its inputs."""
    passes = ENGINES[name](LlamaForCausalLM(_CONFIG).eval(), threads)
    return lambda given: passes[given[0]](given[1])


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Return ids and mask, and for `decode` the keys and values of each layer too."""
    source = torch.Generator().manual_seed(1)
    if name == "prefill":
        ids = torch.randint(1000, 20000, (1, _TOKENS), generator=source)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape = 1, _CONFIG.num_key_value_heads, _TOKENS, _CONFIG.hidden_size // _CONFIG.num_attention_heads
    past = {
        f"{part}_{layer}": torch.randn(shape, generator=source)
        for layer in range(_CONFIG.num_hidden_layers)
        for part in ("key", "value")
    }
    ids, mask = torch.randint(1000, 20000, (1, 1), generator=source), torch.ones(1, _TOKENS + 1, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, **past}


class _Prefill(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**given, use_cache=False, logits_to_keep=1).logits


class _Decode(_Prefill):
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor, **named: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        parts = past or tuple(named.values())
        cache = DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)))
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = self.model(**given, past_key_values=cache, use_cache=True).logits
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def torch_engines(model: torch.nn.Module) -> dict[str, Engine]:
    return {"prefill": eager(_Prefill(model)), "decode": eager(_Decode(model))}


def int4(model: torch.nn.Module) -> torch.nn.Module:
    """Return ours in 4 bits, the head too, as in int8."""
    step = lc.WeightOnlyQuantization(group_size=128, symmetric=True, overrides={"lm_head": 4})
    return step.compress(copy.deepcopy(model), lc.Context())


def onnx_engines(model: torch.nn.Module, threads: int) -> dict[str, Engine]:
    engines = {}
    for name, wrapped in (("prefill", _Prefill(model)), ("decode", _Decode(model))):
        example = inputs_of(name)
        present = [f"present_{key}" for key in example if key.startswith(("key_", "value_"))]
        engines[name] = onnx_int8(wrapped.eval(), example, ["logits", *present], {}, threads)
    return engines


ENGINES: dict[str, Callable[[Any, int], dict[str, Engine]]] = {
    "torch fp32 eager": lambda model, threads: torch_engines(model),
    "llmcompress int8 (token)": lambda model, threads: torch_engines(dynamic(model)),
    "llmcompress int8 (tensor)": lambda model, threads: torch_engines(dynamic(model, "tensor")),
    "llmcompress int8 (static)": lambda model, threads: torch_engines(static(model)),
    "llmcompress int4 (groups of 128)": lambda model, threads: torch_engines(int4(model)),
    "torch.ao quantize_dynamic": lambda model, threads: torch_engines(torch_ao(model)),
    "ONNX Runtime int8": onnx_engines,
}

if __name__ == "__main__":
    main()
