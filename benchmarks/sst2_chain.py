"""SST-2: a MiniLM teacher, a student of half its depth distilled from it, and the student in int8.

Prints the test accuracy of each with its 95 % Wilson interval, its ratio to the teacher's, bytes on disk and seconds.

    python benchmarks/sst2_chain.py --seeds 0 1 2 --threads 2
"""

import argparse
import time
from pathlib import Path

import torch
from scipy.stats import binomtest

import llmcompress as lc
from finetune import minilm_teacher
from llmcompress.anatomy.footprint import disk_bytes
from llmcompress.data import Example, encode, load_examples
from llmcompress.distillation.batches import collate

ROOT = Path(__file__).resolve().parent.parent


@torch.inference_mode()
def correct(model: torch.nn.Module, tokenizer: object, examples: list[Example], batch_size: int = 32) -> int:
    """Count the examples that `model` classifies as labelled."""
    order = sorted(examples, key=lambda example: len(example.text))
    rows = encode(order, tokenizer)
    right = 0
    for at in range(0, len(rows), batch_size):
        batch = collate("classification", rows[at : at + batch_size], pad=tokenizer.pad_token_id)
        labels = torch.tensor([int(example.label) for example in order[at : at + batch_size]])
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right


def report(name: str, seed: int, right: int, teacher: int, total: int, size: int, seconds: float) -> None:
    """Print one line of the table."""
    interval = binomtest(right, total).proportion_ci(method="wilson")
    print(
        f"{name:<24} seed {seed}  accuracy {right / total:6.2%} [{interval.low:.2%}, {interval.high:.2%}]  "
        f"of the teacher {right / teacher:7.2%}  {size / 1e6:5.1f} MB  {seconds:6.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--student", default="layers:3")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--hidden", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = options.assets / "sst2"
    data = {split: load_examples(next(folder.glob(f"{split}*.tsv"))) for split in ("train", "test")}
    start = time.perf_counter()
    teacher, tokenizer = minilm_teacher(options.cache / "sst2-minilm", data["train"], labels=2)
    seconds, total = time.perf_counter() - start, len(data["test"])
    best = correct(teacher, tokenizer, data["test"])
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {options.threads} threads, {capability}, {total} test rows")
    report("teacher", 0, best, best, total, disk_bytes(teacher), seconds)
    step = lc.KnowledgeDistillation(
        epochs=options.epochs,
        student=options.student,
        alpha=options.alpha,
        hidden=options.hidden,
        temperature=options.temperature,
        learning_rate=options.learning_rate,
        max_length=64,
    )
    print(step)
    for seed in options.seeds:
        result = lc.compress(teacher, step, data=data["train"], tokenizer=tokenizer, seed=seed)
        student, seconds = result.model, result.report.steps[0].seconds
        report("student", seed, correct(student, tokenizer, data["test"]), best, total, disk_bytes(student), seconds)
        result = lc.compress(student, lc.DynamicQuantization(), seed=seed)
        small, seconds = result.model, result.report.steps[0].seconds
        report("student, int8", seed, correct(small, tokenizer, data["test"]), best, total, disk_bytes(small), seconds)


if __name__ == "__main__":
    main()
