"""SST-2: students of a fine-tuned MiniLM, distilled, beside the same students fine-tuned without the teacher.

Both start from the same weights: what is left of the teacher. Distilled students learn what the teacher says of the
training set's sentences and of random spans of them; no label is read. Fine-tuned ones learn the sentences' labels.
Both are scored on dev twice an epoch, and the best weights on dev are the result. Recipes are chosen by what
`--split dev` prints, never on test. Prints a Markdown table: accuracy of each seed, the mean's share of the teacher's,
and the difference of the two ways, with its 95 % interval (paired by sentence; a sentence's seeds are drawn together).
`--curve` draws the accuracy on dev in the course of the trainings.

    python benchmarks/distillation_sst2.py --split dev --students "1 layer"
    python benchmarks/distillation_sst2.py --seeds 0 1 2 --threads 2 --curve curves.png
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmcompress as lc
from _machine import describe_machine
from _runs import Runs, Scores, difference
from finetune import minilm_teacher
from llmcompress.data import Example, load_examples

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("distilled", "fine-tuned")
SPLITS = ("dev", "test")

Run = dict[str, Any]
"""Of one training: `dev` and `test`, which sentences are right; `curve`, pairs of epoch and accuracy on dev."""


@dataclass(frozen=True)
class Student:
    """Which share of the teacher's accuracy a student should keep, which part of the teacher it is, and its recipes."""

    goal: float
    part: str
    distilled: Mapping[str, Any]
    fine_tuned: Mapping[str, Any]

    def training(self, way: str, epochs: float | None) -> lc.KnowledgeDistillation:
        """Return how it is trained: `"distilled"`, or `"fine-tuned"` without the teacher."""
        own = dict(self.distilled if way == "distilled" else self.fine_tuned)
        own["epochs"] = epochs or own["epochs"]
        return lc.KnowledgeDistillation(student=self.part, max_length=64, **own)


DISTILLED = {
    "alpha": 1.0,
    "features": {"hidden": 1.0},
    "augment": {"name": "random_spans", "copies": 5},
    "epochs": 2,
    "learning_rate": 2e-4,
    "batch_size": 8,
    "dropout": 0.0,
}
# One block cannot follow what its teacher has inside, and learns more from more texts.
LOGITS_ALONE = {
    "alpha": 1.0,
    "augment": {"name": "random_spans", "copies": 10},
    "epochs": 2,
    "learning_rate": 5e-4,
    "batch_size": 32,
    "dropout": 0.0,
}
FINE_TUNED = {"alpha": 0.0, "epochs": 3, "learning_rate": 2e-4, "batch_size": 16}
STUDENTS = {
    "3 layers": Student(0.995, "layers:0,2,4", {**DISTILLED, "epochs": 3}, FINE_TUNED),
    "2 layers": Student(0.98, "layers:0,3", {**DISTILLED, "epochs": 3}, FINE_TUNED),
    "1 layer": Student(0.95, "layers:2,", LOGITS_ALONE, FINE_TUNED),
    "width 0.5": Student(0.97, "width:0.5", DISTILLED, FINE_TUNED),
}


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[bool]:
    """Return which examples the model has right."""
    task = lc.TextClassification(examples, max_length=64)
    return lc.evaluate(model, task, tokenizer=tokenizer, latency=False, progress=False).score.right


def trained(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, list[Example]],
    step: lc.KnowledgeDistillation,
    seed: int,
    cache: Path,
) -> Run:
    """Train one student, keep its best weights on dev, and score them."""
    told: dict[str, Any] = {
        "early_stopping": lc.EarlyStopping(
            task=lc.TextClassification(data["dev"], max_length=64),
            patience=100,
            evaluations=max(round(2 * (step.epochs or 1)), 1),
        )
    }
    if step.alpha != 0:
        told["cache"] = lc.TeacherCache(folder=cache, hidden=range(1, 7))
    result = lc.compress(
        teacher, step.model_copy(update=told), data=data["train"], tokenizer=tokenizer, seed=seed, progress=False
    )
    course = next(action.reason for action in result.report.steps[0].touched if "; evaluated " in (action.reason or ""))
    points = [(int(at), float(score)) for score, at in re.findall(r"([\d.]+) at (\d+)", course)]
    curve = [(round(at / points[-1][0] * (step.epochs or 1), 3), score) for at, score in points]
    scored = {split: list(map(int, answers(result.model, tokenizer, data[split]))) for split in SPLITS}
    return {**scored, "curve": curve}


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


def draw(found: dict[tuple[str, str], list[Run]], teacher: float, file: Path) -> None:
    """Draw each student's accuracy on dev over the epochs, both ways: the mean over the seeds, and each seed."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in found))
    figure, places = pyplot.subplots(1, len(names), figsize=(3 * len(names), 2.8), sharey=True, squeeze=False)
    for name, place in zip(names, places[0], strict=True):
        place.axhline(100 * teacher, color="grey", linestyle=":", label="teacher")
        for way, color in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
            curves = [list(zip(*run["curve"], strict=True)) for run in found[name, way]]
            for epochs, scores in curves:
                place.plot(epochs, [100 * score for score in scores], color=color, alpha=0.3, linewidth=0.8)
            means = [100 * statistics.fmean(at) for at in zip(*(scores for _, scores in curves), strict=True)]
            place.plot(curves[0][0], means, color=color, marker=".", label=way)
        place.set(title=name, xlabel="epochs")
    places[0][0].set_ylabel("accuracy on dev, %")
    places[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps the teacher and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=float, help="instead of each recipe's own")
    parser.add_argument("--distilled", type=json.loads, default={}, help='over each recipe\'s own, as {"alpha": 0.9}')
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--split", default="test", choices=SPLITS, help="what is printed; recipes are chosen on dev")
    parser.add_argument("--curve", type=Path, help="a file for the curves, .png or .svg (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    data = {split: load_examples(options.assets / "sst2" / f"{split}.tsv") for split in ("train", *SPLITS)}
    teacher, tokenizer = minilm_teacher(options.cache / "sst2-minilm", data["train"], labels=2)
    # The students' embeddings stay the teacher's: they are half of the weights, and few of their words are met here.
    teacher.get_input_embeddings().requires_grad_(False)
    base = {split: statistics.fmean(answers(teacher, tokenizer, data[split])) for split in SPLITS}
    print(describe_machine())
    sizes = ", ".join(f"{len(rows)} of {split}" for split, rows in data.items())
    print(f"- sentences: {sizes}; teacher {base['dev']:.2%} on dev, {base['test']:.2%} on test\n", flush=True)

    runs = Runs(options.cache / "distillation-sst2.jsonl")
    found: dict[tuple[str, str], list[Run]] = {(name, way): [] for name in options.students for way in WAYS}
    for seed in options.seeds:
        for name, way in found:
            recipe = replace(STUDENTS[name], distilled={**STUDENTS[name].distilled, **options.distilled})
            step = recipe.training(way, options.epochs)

            def run(step: lc.KnowledgeDistillation = step, seed: int = seed) -> Run:
                return trained(teacher, tokenizer, data, step, seed, options.cache / "answers")

            found[name, way].append(runs.kept({"best on": "dev", "seed": seed, "step": str(step)}, run))
    print(f"On {options.split}:\n")
    print(
        "\n".join(rows({key: [run[options.split] for run in own] for key, own in found.items()}, base[options.split]))
    )
    if options.curve is not None:
        draw(found, base["dev"], options.curve)


if __name__ == "__main__":
    main()
