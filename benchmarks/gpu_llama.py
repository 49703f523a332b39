"""A Llama of random weights on a GPU, in bfloat16 and in few bits: `python benchmarks/gpu_llama.py`.

Milliseconds of a pass over 512 tokens, of one over eight such rows, and of a token that `generate` writes behind 128;
and the memory of the weights. Ours and bitsandbytes take turns in each round, their order drawn anew. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from functools import partial

import torch

import llmcompress as lc
from _int8_engines import dynamic
from _machine import describe_machine
from _turns import by_lot, print_table
from decode_llama import SHORT, SIZES, llama
from int8_llama import int4

TOKENS, PROMPT, WRITTEN = 512, 128, 48


def by(step: lc.Compressor) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Return what makes a quantized copy."""
    return lambda model: step.compress(copy.deepcopy(model), lc.Context())


MODELS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "torch bf16": lambda model: model,
    "llmcompress int8": dynamic,
    "llmcompress int4 (groups of 128)": int4,
    "llmcompress nf4": by(lc.WeightOnlyQuantization(codebook="nf4", overrides={"lm_head": 4})),
    "bitsandbytes nf4": by(lc.BitsAndBytesQuantization(kind="nf4", compute_dtype="bfloat16")),
    "bitsandbytes int8": by(lc.BitsAndBytesQuantization(kind="int8")),
}


@torch.inference_mode()
def a_pass(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the milliseconds of one pass over `ids`, behind one that is not timed."""
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def a_token(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the milliseconds of a token: of a long answer less a short one, so that the prompt's pass cancels out."""
    took = []
    for length in (SHORT, SHORT + WRITTEN):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return 1000 * (took[1] - took[0]) / WRITTEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--size", default="1b", choices=list(SIZES))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = llama(arguments.size).to(device="cuda", dtype=torch.bfloat16)
    print(f"# A Llama of {base.num_parameters() / 1e6:.0f} million weights on a GPU\n\n{describe_machine()}")
    print(f"- GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    print(f"- rounds: {arguments.rounds}, engines in turn, their order drawn anew each round", flush=True)
    engines, held = {}, {}
    for name, make in MODELS.items():
        before = torch.cuda.memory_allocated()
        try:
            engines[name] = make(base)
        except lc.CompressionError as error:
            print(f"- not run: {name}: {error}")
            continue
        a_pass(engines[name], torch.ones(1, PROMPT, dtype=torch.long, device="cuda"))
        gc.collect()
        held[name] = torch.cuda.memory_allocated() - before
    held["torch bf16"] = sum(tensor.nbytes for tensor in base.parameters())
    ids = torch.randint(1000, 20000, (8, TOKENS), generator=torch.Generator().manual_seed(0)).cuda()
    print("\nMedian milliseconds [10th, 90th percentile]; speed relative to the first.", flush=True)
    for told, take, given in (
        (f"1x{TOKENS}", a_pass, ids[:1]),
        (f"8x{TOKENS}", a_pass, ids),
        ("a token", a_token, ids[:1, :PROMPT]),
    ):
        times = by_lot({name: partial(take, one) for name, one in engines.items()}, given, arguments.rounds)
        print()
        print_table({told: times})
    print("\n| model | GB of weights, with copies for kernels |\n|---|---|")
    for name, size in held.items():
        print(f"| {name} | {size / 1e9:.2f} |")


if __name__ == "__main__":
    main()
