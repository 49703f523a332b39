"""SST-2: `lc.fit` on a fine-tuned MiniLM, by size, by speed, and for a target that cannot be met.

Prints what was found for each goal: bytes, speed, the loss on the examples held out with its interval, seconds by the
clock and of the processor; every chain that was tried; and the accuracy on all test sentences beside the teacher's.

    python benchmarks/fit_sst2.py --threads 2
    python benchmarks/fit_sst2.py --goals size --budget "10 min"

On a machine that others use, `--clock processor` counts the processor's time over the threads instead of the clock's.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

import llmcompress as lc
from _machine import describe_machine
from finetune import minilm_teacher
from llmcompress.data import load_examples
from llmcompress.fitting import budget

ROOT = Path(__file__).resolve().parent.parent
GOALS = {
    "size": {"size": "10 MB", "max_drop": 0.02},
    "speed": {"speedup": 5, "max_drop": 0.02},
    "impossible": {"size": "500 KB", "max_drop": 0},
}


def _shared_out(threads: int) -> float:
    return time.process_time() / threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps the teacher and what was found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", default="15 min")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="which one the budget is of")
    parser.add_argument("--goals", nargs="+", choices=GOALS, default=list(GOALS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.clock == "processor":
        # Of a machine that others use as well: what its threads had, as if all of them had been busy all the time.
        budget.now = partial(_shared_out, options.threads)

    folder = options.assets / "sst2"
    data = {split: load_examples(next(folder.glob(f"{split}*.tsv"))) for split in ("train", "test")}
    teacher, tokenizer = minilm_teacher(options.cache / "sst2-minilm", data["train"], labels=2)
    task = lc.TextClassification(data["test"], max_length=64)
    base = lc.evaluate(teacher, task, tokenizer=tokenizer, latency=False, progress=False).score.value
    print(describe_machine())
    print(f"- budget {options.budget} by the {options.clock} clock, seed {options.seed}")
    print(f"- the teacher: {base:.2%} on all {len(data['test'])} test sentences\n", flush=True)
    for name in options.goals:
        begin, processor = time.perf_counter(), time.process_time()
        found = lc.fit(
            teacher, task, data["train"], tokenizer=tokenizer, budget=options.budget, seed=options.seed, **GOALS[name]
        )
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        score = lc.evaluate(found.model, task, tokenizer=found.tokenizer, latency=False, progress=False).score.value
        asked = ", ".join(f"{key}={value!r}" for key, value in GOALS[name].items())
        print(f"## fit({asked})\n\n{found.sentence}\n")
        print(f"- {seconds:.0f} s by the clock, {processor:.0f} s of the processor")
        print(f"- {score:.2%} on all test sentences, {score / base:.2%} of the teacher's\n")
        print(found.table.markdown(), flush=True)
        print(f"\n- {'; '.join(f'{stage} {spent:.0f} s' for stage, spent in found.stages)}\n", flush=True)
        found.recipe.to_yaml(options.cache / f"fit-{name}.yaml")


if __name__ == "__main__":
    main()
