"""What unstructured pruning costs: peak memory on a 1 B-parameter Llama, seconds as the blocks grow in number.

    python benchmarks/pruning_cost.py --threads 1            # about 2.2 GB of weights in bfloat16, some minutes

Each measurement runs in a process of its own: the model is built there with random weights, the resident memory is read
before the step, and its highest value from the kernel afterwards. `lc.compress(..., inplace=True)` is what is measured,
with all checks and the report. Prints Markdown; fails where a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from _machine import describe_machine
from llmcompress.data import Example
from llmcompress.testing import tiny_tokenizer

STEPS = {
    "magnitude": lambda: lc.MagnitudePruning(sparsity=0.5),
    "magnitude, global": lambda: lc.MagnitudePruning(sparsity=0.5, scope="global"),
    "Wanda": lambda: lc.WandaPruning(sparsity=0.5),
    "Wanda, OWL": lambda: lc.WandaPruning(sparsity=0.5, allocation="owl"),
    "SparseGPT": lambda: lc.SparseGPTPruning(sparsity=0.5),
}
# Highest memory of the process over the bytes of the model.
LIMITS = {"magnitude, global": 1.15, "Wanda": 1.3}
# The shape of TinyLlama 1.1B.
BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}


def llama(shape: dict[str, int], blocks: int, vocabulary: int) -> LlamaForCausalLM:
    """Return a random Llama in bfloat16, built in it so that no float32 copy ever exists."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=blocks, vocab_size=vocabulary))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def measure(
    name: str, shape: dict[str, int], blocks: int, vocabulary: int, texts: int, tokens: int
) -> dict[str, float]:
    """Prune once, in this process, and return bytes and seconds."""
    process = psutil.Process()
    imports = process.memory_info().rss
    model = llama(shape, blocks, vocabulary)
    size = sum(parameter.nbytes for parameter in model.parameters())
    before = process.memory_info().rss
    data = [Example("".join(chr(97 + (row * 7 + at * at) % 26) for at in range(tokens))) for row in range(texts)]
    _forget_peak()
    start = time.perf_counter()
    result = lc.compress(model, STEPS[name](), data=data, tokenizer=tiny_tokenizer(), inplace=True, progress=False)
    return {
        "parameters": model.num_parameters(),
        "model": size,
        "imports": imports,
        "before": before,
        "peak": _peak(),
        "seconds": time.perf_counter() - start,
        "step_seconds": result.report.steps[0].seconds,
        "zeros": result.report.steps[0].footprint.zeros,
    }


def _forget_peak() -> None:
    # Linux: the peak of the process is reset to what it holds now.
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def in_a_process(arguments: argparse.Namespace, name: str, size: str, blocks: int) -> dict[str, float]:
    """Run `measure` in a fresh Python."""
    command = [sys.executable, __file__, "--threads", str(arguments.threads), "--texts", str(arguments.texts)]
    command += ["--tokens", str(arguments.tokens), "--child", json.dumps([name, size, blocks])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}, {blocks} blocks: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=["magnitude, global", "Wanda"])
    parser.add_argument("--blocks", type=int, default=22, help="of the large model")
    parser.add_argument("--sizes", type=int, nargs="*", default=[4, 8, 16], help="numbers of blocks to time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, size, blocks = json.loads(arguments.child)
        shape, vocabulary = (BILLION, 32000) if size == "billion" else (SMALL, 128)
        print(json.dumps(measure(name, shape, blocks, vocabulary, arguments.texts, arguments.tokens)))
        return
    print(f"# Cost of unstructured pruning\n\n{describe_machine()}")
    print(f"- random Llama in bfloat16, {arguments.texts} texts of {arguments.tokens} tokens, inplace=True, 50 %\n")
    print("| step | parameters | model | imports | before the step | peak | peak / model | less imports | zeros | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    failed = []
    for name in arguments.only:
        found = in_a_process(arguments, name, "billion", arguments.blocks)
        ratio, own = found["peak"] / found["model"], (found["peak"] - found["imports"]) / found["model"]
        columns = [f"{found[key] / 1e6:.0f} MB" for key in ("model", "imports", "before", "peak")]
        print(
            f"| {name} | {found['parameters'] / 1e9:.2f} B | {' | '.join(columns)} | {ratio:.3f} | {own:.3f} | "
            f"{found['zeros']:.2%} | {found['step_seconds']:.0f} |",
            flush=True,
        )
        if own > LIMITS.get(name, float("inf")):
            failed.append(f"{name}: {own:.3f} times the model's bytes, limit {LIMITS[name]}")
    if arguments.sizes:
        print("\nSeconds of the step by number of blocks (hidden size 512), and for each block:\n")
        print(f"| step | {' | '.join(f'{blocks} blocks' for blocks in arguments.sizes)} | a block |")
        print(f"|---|{'---|' * (len(arguments.sizes) + 1)}")
        for name in ("Wanda", "SparseGPT"):
            seconds = [in_a_process(arguments, name, "small", blocks)["step_seconds"] for blocks in arguments.sizes]
            each = [f"{spent / blocks:.3f}" for spent, blocks in zip(seconds, arguments.sizes, strict=True)]
            print(f"| {name} | {' | '.join(f'{spent:.2f}' for spent in seconds)} | {' / '.join(each)} |", flush=True)
    sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
