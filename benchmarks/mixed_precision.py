"""Bits chosen layer by layer against the same bits everywhere: loss, KL, and how well the damages of layers add up.

Trained Llamas, round to nearest (or GPTQ, AWQ: `--strategy`) in groups of 32, all linear layers but the head; stored
bits a weight with scales and zero points. Loss: the first 60 windows of 256 tokens of tinystories, nats a token; KL to
the float model: on the same. Bits are chosen on other texts (32 of 256 tokens).

    python benchmarks/mixed_precision.py --assets FOLDER --out mixed-precision.md
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from _machine import describe_machine
from _tinystories import loss, texts_of, token_ids

MODELS = ("babyllama-tok105-hf", "stories260K-hf")
BITS = (2, 3, 4, 5, 6, 8)
TARGETS = (3.0, 3.5, 3.59375, 4.0, 4.5, 4.625)
UNIFORM = (3, 4)
GROUP, WINDOW, WINDOWS = 32, 256, 60


@torch.inference_mode()
def kl(base: torch.nn.Module, model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the mean KL(base || model) of the next token over the windows, in nats."""
    found = []
    for at in range(0, min(len(ids) - WINDOW, WINDOW * WINDOWS), WINDOW):
        tokens = ids[at : at + WINDOW][None]
        ours, theirs = (one(input_ids=tokens).logits[0].log_softmax(-1) for one in (base, model))
        found.append((ours.exp() * (ours - theirs)).sum(-1).mean())
    return float(torch.stack(found).mean())


def rounded(
    base: torch.nn.Module, bits: int | dict[str, int], strategy: str, texts: list[str], tokenizer: object
) -> torch.nn.Module:
    """Return the model with weights of `bits`, or of bits by layer, as floats."""
    own = {"bits": bits} if isinstance(bits, int) else {"overrides": bits}
    if strategy != "weight_only_quantization":
        own |= {"samples": len(texts), "max_length": WINDOW}
    step = lc.compressors.get(strategy)(group_size=GROUP, indivisible="pad", **own)
    return lc.dequantize(lc.compress(base, step, data=texts, tokenizer=tokenizer, progress=False).model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--method", choices=("fisher", "kl"), default="fisher")
    strategies = ("weight_only_quantization", "gptq", "awq")
    parser.add_argument("--strategy", choices=strategies, default=strategies[0], help="rounds with the chosen bits")
    parser.add_argument("--random", type=int, default=12, help="random choices of bits to check the sums on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="where to draw the heat map of the first model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [describe_machine(), ""]
    for name in MODELS:
        base = AutoModelForCausalLM.from_pretrained(arguments.assets / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.assets / name)
        text, texts = texts_of(arguments.assets)
        ids = token_ids(tokenizer, text)
        start = time.perf_counter()
        found = lc.sensitivity(
            base, texts, tokenizer=tokenizer, bits=BITS, group_size=GROUP, indivisible="pad", progress=False,
            method=arguments.method,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if arguments.plot and name == MODELS[0]:
            found.plot(arguments.plot)
        lines += [f"{name}: float loss {loss(base, ids):.4f}; sensitivity by {found.method} in {seconds:.0f} s", ""]
        lines += ["| bits | stored a weight | loss | KL | sum of damages |", "|---|---:|---:|---:|---:|"]
        choices = [(f"{bits} everywhere", bits) for bits in UNIFORM]
        choices += [(f"auto, at most {target:g}", found.allocate(target)) for target in TARGETS]
        pairs = []
        for label, bits in sorted(choices, key=lambda one: found.bits_a_weight(one[1])):
            model = rounded(base, bits, arguments.strategy, texts, tokenizer)
            pairs.append((found.predicted(bits), kl(base, model, ids)))
            told = f"{loss(model, ids):.4f} | {pairs[-1][1]:.4f} | {pairs[-1][0]:.4f}"
            lines.append(f"| {label} | {found.bits_a_weight(bits):.3f} | {told} |")
            print(lines[-1], flush=True)
        drawn = random.Random(0)
        for _ in range(arguments.random):
            widths = {layer: drawn.choice(BITS) for layer in found.layers}
            model = rounded(base, widths, arguments.strategy, texts, tokenizer)
            pairs.append((found.predicted(widths), kl(base, model, ids)))
        logs = np.log(np.array(pairs))
        ratio = np.exp(logs[:, 1] - logs[:, 0])
        lines += [
            "",
            f"Sum against the KL of all together, {len(pairs)} choices of bits: correlation of the logarithms "
            f"{np.corrcoef(logs.T)[0, 1]:.3f}; KL over sum {ratio.min():.2f} to {ratio.max():.2f}.",
            "",
        ]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
