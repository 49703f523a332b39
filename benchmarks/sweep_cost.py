"""What a sweep saves: six chains that begin alike, swept, beside the same six run one by one.

A fine-tuned MiniLM on SST-2; two ways of making it smaller, each distilled for a few steps, then left as it is or
quantized in two ways. A sweep asks the teacher once for all its chains; run one by one, each keeps its own teacher's
answers, so that both learn from the same numbers. Prints processor seconds (of all processes), their ratio, and whether
both made the same weights.

    python benchmarks/sweep_cost.py --threads 1
    python benchmarks/sweep_cost.py --threads 1 --workers 2
"""

import argparse
import resource
import tempfile
from pathlib import Path

import torch

import llmcompress as lc
from _machine import describe_machine
from finetune import minilm_teacher
from llmcompress.data import load_examples

ROOT = Path(__file__).resolve().parent.parent


def chains(steps: int) -> dict[str, list[lc.Compressor]]:
    """Return six chains that have two beginnings."""
    distil = lc.KnowledgeDistillation(steps=steps, learning_rate=2e-4, max_length=64)
    begins = {"half FFN": lc.StructuredPruning(ffn=0.5), "3 of 6 layers": lc.DepthPruning(layers=(0, 2, 5))}
    ends = {"": [], ", int8": [lc.DynamicQuantization()], ", int4": [lc.WeightOnlyQuantization(group_size=32)]}
    return {f"{name}{end}": [first, distil, *last] for name, first in begins.items() for end, last in ends.items()}


def keeping_answers(steps: list[lc.Compressor], folder: Path) -> list[lc.Compressor]:
    """Return the same chain with its teacher's answers kept in `folder`, as exactly as a sweep keeps them."""
    kept = {"cache": lc.TeacherCache(folder=folder, dtype="float32")}
    return [step.model_copy(update=kept) if isinstance(step, lc.KnowledgeDistillation) else step for step in steps]


def seconds() -> float:
    """Return the processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets", help="folder of the data")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="folder of the fine-tuned teacher")
    parser.add_argument("--steps", type=int, default=60, help="of each distillation")
    parser.add_argument("--texts", type=int, default=1000, help="that are learned from, and that are scored")
    parser.add_argument("--workers", type=int, default=1, help="of the sweep")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe_machine())

    train = load_examples(arguments.assets / "sst2" / "train.tsv")
    texts = train[: arguments.texts]
    task = lc.TextClassification(load_examples(arguments.assets / "sst2" / "dev.tsv")[: arguments.texts])
    teacher, tokenizer = minilm_teacher(arguments.cache / "sst2-minilm", train, labels=2)
    asked = chains(arguments.steps)
    shared = {"data": texts, "tokenizer": tokenizer, "progress": False}

    with tempfile.TemporaryDirectory() as folder:
        begun = seconds()
        settings = {"workers": arguments.workers, "threads": arguments.threads, "latency": False}
        found = lc.sweep(teacher, asked, task, folder=folder, **settings, **shared)
        swept = seconds() - begun
        begun = seconds()
        results = {
            name: lc.compress(teacher, keeping_answers(steps, Path(folder, f"answers-{number}")), **shared)
            for number, (name, steps) in enumerate(asked.items())
        }
        lc.compare({"base": teacher, **results}, task, tokenizer=tokenizer, latency=False, progress=False)
        apart = seconds() - begun
        same = [name for name, result in results.items() if _equal(found.load(name), result.model)]
    print(found)
    print("\n| chains | apart, s | swept, s | swept / apart | the same weights |\n|---|---|---|---|---|")
    print(f"| {len(asked)} | {apart:.0f} | {swept:.0f} | {swept / apart:.0%} | {len(same)} of {len(asked)} |")


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    main()
