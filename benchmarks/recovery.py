"""What distillation gives back after each strategy: a language model compressed, then taught by its original.

At most 300 steps, one seed. Scored on the first 60 windows of 256 tokens of tinystories, in nats a token (lower is
better); calibrated and trained on other parts of the same stories. Pruned models are distilled as they are, their zeros
held; quantized ones are trained for the rounding before it is done (`quantize_for`), and then rounded. Prints how much
of what a strategy lost comes back: 100 % is the original.

    python benchmarks/recovery.py --model stories260K-hf --threads 1 --assets FOLDER
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from _machine import describe_machine
from _runs import Runs
from _tinystories import loss, texts_of, token_ids, training_texts
from llmcompress.compressor import Rounds

ROOT = Path(__file__).resolve().parent.parent


def strategies() -> dict[str, lc.Compressor]:
    """Return what the model is compressed by, by the name in the table."""
    group = {"group_size": 32, "indivisible": "pad", "compute": "float"}
    return {
        "half of the FFN channels": lc.StructuredPruning(ffn=0.5),
        "half of the heads": lc.StructuredPruning(heads=0.5),
        "one block less": lc.DepthPruning(ratio=0.2),
        "magnitude, 50 %": lc.MagnitudePruning(sparsity=0.5),
        "magnitude, 2:4": lc.MagnitudePruning(pattern="2:4"),
        "Wanda, 50 %": lc.WandaPruning(sparsity=0.5),
        "Wanda, 2:4": lc.WandaPruning(pattern="2:4"),
        "SparseGPT, 50 %": lc.SparseGPTPruning(sparsity=0.5),
        "SparseGPT, 2:4": lc.SparseGPTPruning(pattern="2:4"),
        "int8, dynamic": lc.DynamicQuantization(),
        "int4, rounded": lc.WeightOnlyQuantization(bits=4, **group),
        "int3, rounded": lc.WeightOnlyQuantization(bits=3, **group),
        "int2, rounded": lc.WeightOnlyQuantization(bits=2, **group),
        "int4, GPTQ": lc.GPTQ(bits=4, **group),
        "int3, GPTQ": lc.GPTQ(bits=3, **group),
        "int4, AWQ": lc.AWQ(bits=4, **group),
    }


def distillation(options: argparse.Namespace, *, rounded: bool = False) -> lc.KnowledgeDistillation:
    """Return the training that gives back what was lost; gentler where it is for a rounding, which does less harm."""
    return lc.KnowledgeDistillation(
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=options.rounded_rate if rounded else options.learning_rate,
        alpha=1.0,
        temperature=1.0,
    )


def recovered(step: lc.Compressor, options: argparse.Namespace) -> lc.Pipeline:
    """Return the step and the training that makes up for it: behind pruning, before quantization."""
    teach = distillation(options, rounded=step.terminal)
    if step.terminal and not isinstance(step, Rounds):
        # GPTQ and AWQ round by more than the weights: the model is trained for the plain grid of as many bits.
        plain = lc.WeightOnlyQuantization(bits=step.bits, group_size=step.group_size, indivisible=step.indivisible)
        return lc.Pipeline(steps=[teach.model_copy(update={"quantize_for": plain}), step])
    return lc.Pipeline(steps=[step], recover=teach)


def main() -> None:
    known = strategies()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps finished runs")
    parser.add_argument("--model", default="babyllama-tok105-hf")
    parser.add_argument("--strategies", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="after pruning")
    parser.add_argument("--rounded-rate", type=float, default=2e-4, help="before quantization")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = options.assets / options.model
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, data = token_ids(tokenizer, texts_of(options.assets)[0]), training_texts(options.assets)
    dense = loss(teacher, ids)
    runs = Runs(options.cache / "recovery.jsonl")

    def scored(chain: lc.Pipeline) -> float:
        what = {"model": options.model, "steps": [str(step) for step in chain.flatten()]}

        def run() -> list[float]:
            return [loss(lc.compress(teacher, chain, data=data, tokenizer=tokenizer, progress=False).model, ids)]

        return runs.scores(what, run)[0]

    print(describe_machine())
    print(f"- {options.model}, {dense:.4f}; at most {options.steps} steps of {options.batch} windows of 256 tokens\n")
    print("| strategy | NLL | distilled | comes back of what was lost |\n|---|---|---|---|", flush=True)
    for name in options.strategies:
        before, after = scored(lc.Pipeline(steps=[known[name]])), scored(recovered(known[name], options))
        share = (before - after) / (before - dense)
        print(f"| {name} | {before:.4f} | {after:.4f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
