"""Milliseconds a token of a Llama that writes: `python benchmarks/decode_llama.py --threads 2`.

Random weights, 150 million by default, 1.1 billion with `--size 1b`. Each engine has a process of its own and generates
greedily behind a prompt, with transformers' own cache and with `lc.GrowingCache`; llama.cpp, where llama-cpp-python and
gguf are installed, with its own. A turn takes the time of a long answer less that of a short one, so that the prompt's
pass cancels out. All take turns in each round, their order drawn anew. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import _llama_cpp
import llmcompress as lc
from _int8_engines import dynamic, torch_ao
from _machine import describe_machine
from _turns import by_lot, cell
from _workers import Maker, Worker, workers
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


class Writing(NamedTuple):
    """What an engine is asked for.

    Attributes:
        prompt: its tokens.
        tokens: how many to write.
        growing: whether the cache grows in place; llama.cpp has one way only.
    """

    prompt: list[int]
    tokens: int
    growing: bool


Engine = Callable[[Writing], object]

MODELS: dict[str, Callable[[LlamaForCausalLM], torch.nn.Module]] = {
    "torch fp32": lambda model: model,
    "torch bf16": lambda model: copy.deepcopy(model).bfloat16(),
    "torch.ao quantize_dynamic (int8)": torch_ao,
    "llmcompress int8": dynamic,
    "llmcompress int4": int4,
}
PEER = "llama.cpp Q4_0"


def of_transformers(name: str, size: str, threads: int) -> Engine:
    """Return one of `MODELS`, which writes by `generate`."""
    model = MODELS[name](llama(size))

    def write(asked: Writing) -> object:
        cache = lc.GrowingCache(model.config) if asked.growing else None
        given, length = torch.tensor([asked.prompt]), asked.tokens
        return model.generate(
            given, max_new_tokens=length, min_new_tokens=length, do_sample=False, past_key_values=cache
        )

    return write


def of_llama_cpp(size: str, threads: int) -> Engine:
    """Return llama.cpp."""
    write = _llama_cpp.engine(SIZES[size], threads)
    return lambda asked: write(asked.prompt, asked.tokens)


def a_token(worker: Worker, asked: Writing, *, growing: bool) -> float:
    """Return the milliseconds of a token."""
    asked = asked._replace(growing=growing)
    short, long = (worker.milliseconds(asked._replace(tokens=tokens)) for tokens in (SHORT, SHORT + asked.tokens))
    return (long - short) / asked.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens that the answers stand behind")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--size", default="150m", choices=list(SIZES))
    parser.add_argument("--models", nargs="+", default=[*MODELS, PEER], choices=[*MODELS, PEER])
    arguments = parser.parse_args()
    makers: dict[str, Maker] = {
        name: partial(of_llama_cpp if name == PEER else partial(of_transformers, name), arguments.size)
        for name in arguments.models
    }
    print(f"# Decoding, a Llama of {weights(arguments.size) / 1e6:.0f} million weights\n\n{describe_machine()}")
    print(f"- threads of the engines: {arguments.threads}, each in a process of its own")
    print(f"- rounds: {arguments.rounds}; {arguments.tokens} tokens behind {arguments.prompt}")
    prompt = torch.randint(1000, 20000, (arguments.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    with workers(makers, arguments.threads) as engines:
        turns = {
            (name, growing): partial(a_token, worker, growing=growing)
            for name, worker in engines.items()
            for growing in ([False] if name == PEER else [False, True])
        }
        times = by_lot(turns, Writing(prompt, arguments.tokens, growing=False), arguments.rounds)
        names = list(engines)
    first = statistics.median(times[names[0], False])
    print("\nMedian milliseconds a token [10th, 90th percentile]; speed relative to the first.\n")
    print("| model | DynamicCache | GrowingCache |\n|---|---|---|")
    for name in names:
        cells = [cell(times[name, growing], first) if (name, growing) in times else "" for growing in (False, True)]
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


def weights(size: str) -> int:
    """Return how many weights a model has."""
    with torch.device("meta"):
        return llama(size).num_parameters()


if __name__ == "__main__":
    main()
