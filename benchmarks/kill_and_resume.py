"""A chain of four stages ended with SIGKILL at random moments, gone on with each time: are the last bytes the same?

The chain (cut channels, distil, prune 2:4, quantize to 4 bits, scored after each stage) runs in processes of its own,
forked from this one, which has imported everything and computed nothing. One is left alone. Then others are killed,
each at a moment drawn evenly over the time that the undisturbed one worked, and the next goes on in the same folder;
one that ends before its moment closes the round, and the next begins in a new folder. Every round is run to its end,
and all files of the result are compared with the undisturbed ones.

    python benchmarks/kill_and_resume.py                # 20 kills
    python benchmarks/kill_and_resume.py --kills 5 --seed 1
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

import llmcompress as lc
from llmcompress.testing import tiny_model, tiny_tokenizer

_BEASTS = ("cat", "dog", "bird", "fish")
_TEXTS = [f"{a} {b} sat on the {c}" for a in ("a", "the") for b in _BEASTS for c in ("mat", "rug")]


def work(stages: Path, out: Path) -> None:
    """Run the chain, and save the result."""
    torch.set_num_threads(1)
    steps = [
        lc.StructuredPruning(ffn=0.25),
        lc.KnowledgeDistillation(epochs=3, batch_size=2, max_length=24, precision="fp32"),
        lc.SparseGPTPruning(pattern="2:4"),
        lc.GPTQ(group_size=32),
    ]
    result = lc.compress(
        tiny_model("llama"),
        steps,
        data=_TEXTS,
        tokenizer=tiny_tokenizer(),
        task=lc.LanguageModeling(_TEXTS, window=24),
        gates=[lc.MaxPerplexityRatio(1e6)],
        resume_dir=stages,
        progress=False,
    )
    result.save_pretrained(out)


def start(stages: Path, out: Path) -> ForkProcess:
    """Start a process that runs the chain."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(stages, out))
    process.start()
    return process


def finish(process: ForkProcess) -> None:
    """Wait for a process that must succeed."""
    process.join()
    if process.exitcode:
        raise SystemExit("the chain failed; its traceback is above")


def files_of(out: Path) -> dict[str, bytes]:
    """Return what a result's folder holds, but for the file with the times that the steps took."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "llmcompress.json"}


def left_by(stages: Path) -> str:
    """Say how far the killed process got."""
    done = len(list(stages.glob("0[0-9]-*/stage.json")))
    inside = [path.name for folder in stages.glob("0*.unfinished") for path in folder.iterdir()]
    blocks = sum(name.startswith("block-") and name.endswith(".json") for name in inside)
    checkpoints = sum(name.startswith("checkpoint-") for name in inside)
    drafts = len(list(stages.glob(".0*")))
    return f"{done} stages, {blocks} blocks, {checkpoints} checkpoints, {drafts} half-written folders"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        begun = time.perf_counter()
        finish(start(place / "stages", place / "undisturbed"))
        span = time.perf_counter() - begun
        expected = files_of(place / "undisturbed")
        print(f"undisturbed: {span:.1f} s of work, {len(expected)} files\n", flush=True)
        print("| kill | folder | after | left behind |\n|---|---|---|---|")
        kills, rounds, differing = 0, 1, []

        def compare() -> None:
            found = files_of(place / f"out-{rounds}")
            odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            differing.extend(f"{rounds}/{name}" for name in odd)

        while kills < asked.kills:
            moment = draw.uniform(0, span)
            while True:
                stages = place / f"stages-{rounds}"
                process = start(stages, place / f"out-{rounds}")
                process.join(moment)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    kills += 1
                    print(f"| {kills} | {rounds} | {moment:.2f} s | {left_by(stages)} |", flush=True)
                    break
                finish(process)
                compare()
                rounds += 1
        finish(start(place / f"stages-{rounds}", place / f"out-{rounds}"))
        compare()
    print(f"\n{kills} kills in {rounds} folders; files of the results that differ: {', '.join(differing) or 'none'}")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
