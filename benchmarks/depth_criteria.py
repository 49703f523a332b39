"""Which blocks each criterion of DepthPruning takes from two trained Llamas of five blocks, and what that costs.

    python benchmarks/depth_criteria.py [folder of the assets]

Loss in nats a token on the first 100,000 characters of tinystories (non-overlapping windows of 256 tokens, the first
60), calibrated on 64 texts of 1,200 characters from offset 400,000, cut to 256 tokens. "best" is the best of all
choices on the evaluation text itself, which no criterion can know. Nothing is trained afterwards.
"""

import itertools
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmcompress as lc
from _machine import describe_machine
from llmcompress.anatomy.stacks import find_stacks

CRITERIA = ("block_influence", "angular_distance", "perplexity", "last")
ASSETS = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "shared" / "assets"
TEXT = next((ASSETS / "tinystories").glob("*.txt")).read_text().replace("\n\n", "\n")
CALIBRATION = [TEXT[400_000 + i * 1200 : 400_000 + (i + 1) * 1200] for i in range(64)]


@torch.inference_mode()
def loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    windows = [ids[start : start + 256][None] for start in range(0, min(len(ids) - 256, 256 * 60), 256)]
    return sum(float(model(input_ids=window, labels=window).loss) for window in windows) / len(windows)


def main() -> None:
    print(describe_machine())
    for name in ("babyllama-tok105-hf", "stories260K-hf"):
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
        model = AutoModelForCausalLM.from_pretrained(ASSETS / name).eval()
        ids = tokenizer(TEXT[:100_000], return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        depth = len(find_stacks(model)[0])
        print(f"\n{name}: {depth} blocks, loss {loss(model, ids):.4f}\n")
        print("| kept | criterion | blocks kept | loss | seconds |\n|---|---|---|---|---|")
        for layers in range(depth - 1, 1, -1):
            for criterion in CRITERIA:
                context = lc.Context(
                    data=[lc.Example(text) for text in CALIBRATION], tokenizer=tokenizer, progress=False
                )
                step = lc.DepthPruning(layers=layers, criterion=criterion, max_length=256)
                begin = time.perf_counter()
                pruned = step.compress(AutoModelForCausalLM.from_pretrained(ASSETS / name).eval(), context)
                seconds = time.perf_counter() - begin
                kept = list(context.history[0].kept)
                print(f"| {layers} | {criterion} | {kept} | {loss(pruned, ids):.4f} | {seconds:.1f} |")
            found = []
            for kept in itertools.combinations(range(depth), layers):
                fresh = AutoModelForCausalLM.from_pretrained(ASSETS / name).eval()
                found.append((loss(lc.DepthPruning(layers=kept).compress(fresh, lc.Context()), ids), list(kept)))
            print(f"| {layers} | best | {min(found)[1]} | {min(found)[0]:.4f} | |")


if __name__ == "__main__":
    main()
