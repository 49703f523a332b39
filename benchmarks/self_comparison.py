"""A model compared with itself, again and again: `python benchmarks/self_comparison.py`.

The ratio is 1 by construction, so every 95 % interval that does not hold 1 is a false alarm: at most 2 of 20 may be.
Run it while other processes work: that is what the interval must withstand. Prints Markdown; fails if too many miss.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from _machine import describe_machine
from llmcompress.evaluation.generation_latency import generation_speedup, measure_generation
from llmcompress.evaluation.latency import measure_latencies, speedup
from llmcompress.evaluation.turns import Ratio

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL_LLAMA = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 8, "intermediate_size": 352}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the two, a run")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--copy", action="store_true", help="compare with a copy, whose weights lie elsewhere")
    parser.add_argument("--generation", action="store_true", help="time generation of a small Llama instead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model: PreTrainedModel
    if arguments.generation:
        model, shape = LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA, vocab_size=512)), "small Llama, 64 + 16 tokens"
    else:
        model, shape = BertForSequenceClassification(BertConfig(**MINILM)), f"MiniLM's shape, 1x{arguments.tokens}"
    models = {"model": model, "itself": copy.deepcopy(model) if arguments.copy else model}
    torch.set_num_threads(arguments.threads)
    kind = "a copy of itself" if arguments.copy else "itself"
    print(f"# A model against {kind}: {shape}, random weights\n\n{describe_machine()}")
    print(f"- {arguments.seconds:g} s for each of the two, a run\n")
    print("| run | what | ratio | 95 % interval | holds 1 | rounds | median ms | spread (p10 to p90 of turns) |")
    print("|---|---|---|---|---|---|---|---|")
    held: dict[str, list[bool]] = {}
    for run in range(1, arguments.runs + 1):
        for what, found, turns in measured(models, arguments):
            holds = found.low <= 1 <= found.high
            held.setdefault(what, []).append(holds)
            low, *_, high = statistics.quantiles(turns, n=10)
            print(
                f"| {run} | {what} | {found.ratio:.4f} | [{found.low:.4f}, {found.high:.4f}] | "
                f"{'yes' if holds else 'NO'} | {len(turns) // 2} | {statistics.median(turns):.2f} | "
                f"{low:.2f} to {high:.2f} |",
                flush=True,
            )
    print()
    for what, holding in held.items():
        print(f"{what}: {sum(holding)} of {len(holding)} intervals hold 1.")
    sys.exit(0 if all(sum(holding) >= 0.9 * len(holding) for holding in held.values()) else 1)


def measured(
    models: dict[str, PreTrainedModel], arguments: argparse.Namespace
) -> list[tuple[str, Ratio, tuple[float, ...]]]:
    if arguments.generation:
        timed = measure_generation(models, prompt_tokens=64, new_tokens=16, seconds=arguments.seconds, progress=False)
        base, other = timed["model"], timed["itself"]
        ratios = generation_speedup(base, other)
        return [
            ("first token", ratios.first_token, base.turns_first_token_ms),
            ("further token", ratios.token, base.turns_token_ms),
        ]
    times = measure_latencies(models, tokens=arguments.tokens, seconds=arguments.seconds, progress=False)
    return [("forward pass", speedup(times["model"], times["itself"]), times["model"].turns_ms)]


if __name__ == "__main__":
    main()
