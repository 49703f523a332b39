"""SST-2: students of a fine-tuned MiniLM, distilled, beside the same students fine-tuned without the teacher.

Both start from the same weights (what is left of the teacher) and see the same sentences for the same epochs at the
same learning rate; only the loss differs. Choose recipes with `--split dev`, never on test. Prints a Markdown table:
test accuracy of each seed, the mean's share of the teacher's, and the difference of the two ways, with its 95 %
interval (paired by sentence; a sentence's seeds are drawn together).

    python benchmarks/distillation_sst2.py --seeds 0 1 2 --threads 2
    python benchmarks/distillation_sst2.py --students "1 layer" --split dev --epochs 1
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmcompress as lc
from _machine import describe_machine
from _runs import Runs, Scores, difference
from finetune import minilm_teacher
from llmcompress.data import Example, load_examples

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("distilled", "fine-tuned")


@dataclass(frozen=True)
class Student:
    """Which share of the teacher's accuracy a student should keep, which part of the teacher it is, and its recipe."""

    goal: float
    part: str
    learning_rate: float
    epochs: float = 3

    def training(self, way: str, epochs: float | None, answers: Path) -> lc.KnowledgeDistillation:
        """Return how it is trained: `"distilled"`, or `"fine-tuned"` without the teacher."""
        taught = {"alpha": 0.0}
        if way == "distilled":
            cache = lc.TeacherCache(folder=answers, hidden=range(1, 7))
            taught = {"alpha": 0.5, "features": {"hidden": 1.0}, "cache": cache}
        return lc.KnowledgeDistillation(
            student=self.part,
            epochs=epochs or self.epochs,
            learning_rate=self.learning_rate,
            max_length=64,
            **taught,
        )


STUDENTS = {
    "3 layers": Student(0.995, "layers:0,2,5", 2e-4),
    "2 layers": Student(0.98, "layers:0,5", 3e-4),
    "1 layer": Student(0.95, "layers:1", 5e-4),
    "width 0.5": Student(0.97, "width:0.5", 5e-4),
}


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[bool]:
    """Return which examples the model has right."""
    task = lc.TextClassification(examples, max_length=64)
    return lc.evaluate(model, task, tokenizer=tokenizer, latency=False, progress=False).score.right


def rows(found: dict[tuple[str, str], list[Scores]], teacher: float) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| student | way | accuracy of each seed, % | mean | of the teacher's | goal | points to fine-tuned [95 %] |"
    yield "|---|---|---|---|---|---|---|"
    for (name, way), runs in found.items():
        scores = [statistics.fmean(right) for right in runs]
        goal, gain = "", ""
        if way == "distilled":
            goal = f"{STUDENTS[name].goal:.1%}"
            test = difference(runs, found[name, "fine-tuned"])
            gain = f"{100 * test.change:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}]"
        mean = statistics.fmean(scores)
        each = ", ".join(f"{100 * score:.2f}" for score in scores)
        yield f"| {name} | {way} | {each} | {mean:.2%} | {mean / teacher:.2%} | {goal} | {gain} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps the teacher and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=float, help="instead of each recipe's own")
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--split", default="test", choices=["dev", "test"], help="recipes are chosen on dev")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    data = {split: load_examples(options.assets / "sst2" / f"{split}.tsv") for split in ("train", options.split)}
    train, scored = data["train"], data[options.split]
    teacher, tokenizer = minilm_teacher(options.cache / "sst2-minilm", train, labels=2)
    # The students' embeddings stay the teacher's: they are half of the weights, and few of their words are met here.
    teacher.get_input_embeddings().requires_grad_(False)
    base = statistics.fmean(answers(teacher, tokenizer, scored))
    print(describe_machine())
    print(f"- {len(train)} sentences to train, {len(scored)} of {options.split} to score on; teacher {base:.2%}\n")

    runs = Runs(options.cache / "distillation-sst2.jsonl")
    found: dict[tuple[str, str], list[Scores]] = {(name, way): [] for name in options.students for way in WAYS}
    for seed in options.seeds:
        for name, way in found:
            step = STUDENTS[name].training(way, options.epochs, options.cache / "answers")
            what = {"split": options.split, "seed": seed, "step": str(step.model_copy(update={"cache": None}))}

            def run(step: lc.KnowledgeDistillation = step, seed: int = seed) -> list[bool]:
                result = lc.compress(teacher, step, data=train, tokenizer=tokenizer, seed=seed, progress=False)
                return answers(result.model, tokenizer, scored)

            found[name, way].append(runs.scores(what, run))
    print("\n".join(rows(found, base)), flush=True)


if __name__ == "__main__":
    main()
