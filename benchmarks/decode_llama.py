"""Milliseconds a token of a Llama that writes: `python benchmarks/decode_llama.py --threads 2`.

Random weights, 150 million by default, 1.1 billion with `--size 1b`. Each engine generates greedily behind a prompt,
with transformers' own cache and with `lc.GrowingCache`; a turn takes the time of a long answer less that of a short
one, so that the prompt's pass cancels out. All take turns in each round, their order drawn anew. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from _int8_engines import dynamic, torch_ao
from _machine import describe_machine
from _turns import cell
from int8_llama import int4

SIZES = {
    "150m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2560,
        "layers": 12,
        "heads": 12,
        "groups": 12,
    },
    "1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "layers": 22, "heads": 32, "groups": 4},
}
SHORT = 2


def llama(size: str) -> LlamaForCausalLM:
    """Return a model with random weights."""
    sizes = dict(SIZES[size])
    config = LlamaConfig(
        num_hidden_layers=sizes.pop("layers"),
        num_attention_heads=sizes.pop("heads"),
        num_key_value_heads=sizes.pop("groups"),
        max_position_embeddings=8192,
        eos_token_id=None,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


MODELS: dict[str, Callable[[LlamaForCausalLM], torch.nn.Module]] = {
    "torch fp32": lambda model: model,
    "torch bf16": lambda model: copy.deepcopy(model).bfloat16(),
    "torch.ao quantize_dynamic (int8)": torch_ao,
    "llmcompress int8": dynamic,
    "llmcompress int4": int4,
}


def milliseconds(model: torch.nn.Module, ids: torch.Tensor, tokens: int, *, growing: bool) -> float:
    """Return the time of a token, of `tokens` in one answer."""
    spent = []
    for length in (SHORT, SHORT + tokens):
        cache = lc.GrowingCache(model.config) if growing else None
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, past_key_values=cache)
        spent.append(time.perf_counter() - start)
    return 1000 * (spent[1] - spent[0]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens that the answers stand behind")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--size", default="150m", choices=list(SIZES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    base = llama(arguments.size)
    print(f"# Decoding, a Llama of {base.num_parameters() / 1e6:.0f} million weights\n\n{describe_machine()}")
    print(f"- rounds: {arguments.rounds}; {arguments.tokens} tokens behind {arguments.prompt}\n")
    models = {name: MODELS[name](base) for name in arguments.models}
    engines = [(name, growing) for name in models for growing in (False, True)]
    ids = torch.randint(1000, 20000, (1, arguments.prompt))
    times: dict[tuple[str, bool], list[float]] = {engine: [] for engine in engines}
    order = random.Random(0)
    with torch.inference_mode():
        for round_ in range(arguments.rounds + 1):
            for name, growing in order.sample(engines, len(engines)):
                one = milliseconds(models[name], ids, arguments.tokens, growing=growing)
                if round_:
                    times[name, growing].append(one)
    first = statistics.median(times[engines[0]])
    print("Median milliseconds a token [10th, 90th percentile]; speed relative to the first.\n")
    print("| model | DynamicCache | GrowingCache |\n|---|---|---|")
    for name in models:
        cells = [cell(times[name, growing], first) for growing in (False, True)]
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
