"""What each importance of structured pruning costs a trained Llama, without any training after it.

The protocol of the quality tables: babyllama-tok105, scored on the first 60 windows of 256 tokens of tinystories,
calibrated on 64 texts of 1,200 characters from another part, cut to 256 tokens. Prints the loss in nats a token.

    python benchmarks/importance.py --threads 1
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from _machine import describe_machine
from _tinystories import loss, texts_of, token_ids

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "FFN 25 %": {"ffn": 0.25},
    "FFN 50 %": {"ffn": 0.5},
    "heads 25 %": {"heads": 0.25, "uniform": False},  # LlamaConfig knows no 6 heads of a hidden size of 128
    "heads 50 %": {"heads": 0.5},
    "FFN 50 %, 4 rounds": {"ffn": 0.5, "rounds": 4},
    "FFN 50 %, global": {"ffn": 0.5, "scope": "global", "uniform": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random-seeds", type=int, default=5, help="random is a mean over so many seeds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.assets / "babyllama-tok105-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text, calibration = texts_of(options.assets)
    ids = token_ids(tokenizer, text)
    print(describe_machine(), f"\n- dense: {loss(model, ids):.4f} nats a token\n")
    print("| importance |", " | ".join(FIELDS), "| s |")
    print("|---" * (len(FIELDS) + 2) + "|")
    for importance in lc.importances.list():
        cells, seconds = [], 0.0
        for fields in FIELDS.values():
            step = lc.StructuredPruning(importance=importance, max_length=256, **fields)
            losses = []
            for seed in range(options.random_seeds if importance == "random" else 1):
                context = lc.Context([lc.Example(text) for text in calibration], tokenizer, seed=seed, progress=False)
                pruned = copy.deepcopy(model)
                start = time.perf_counter()
                step.compress(pruned, context)
                seconds = max(seconds, time.perf_counter() - start)
                losses.append(loss(pruned, ids))
            cells.append(f"{sum(losses) / len(losses):.4f}")
        print(f"| {importance} |", " | ".join(cells), f"| {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
