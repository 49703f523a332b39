"""The gallery of recipes, measured: writes the page docs/recipes.md.

Recipes `bert-*` are run on MiniLM fine-tuned on SST-2 (trained on first use, and kept), those of `llama-*` on a
character-level Llama of 0.9 M weights and tinystories. Each is scored beside the base on the same test examples.
Finished runs are kept in a file, the models beside it; a recipe that was changed is run again. Speed is measured apart,
on models that are there.

    python benchmarks/gallery.py                  # runs what is missing
    python benchmarks/gallery.py --time           # on a quiet machine: seconds a recipe
    python benchmarks/gallery.py --page           # writes the page from what was measured
"""

import argparse
from functools import partial
from pathlib import Path

import torch

import llmcompress as lc
from _machine import describe_machine
from _runs import Runs
from _tinystories import texts_of, training_texts
from finetune import minilm_teacher
from llmcompress.data import load_examples
from llmcompress.evaluation.latency import measure_latencies, speedup
from llmcompress.evaluation.scoring import paired_tests
from llmcompress.evaluation.units import bytes_text, ratio_text

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 64)


class Bench:
    """A base with the texts that recipes use and the task that they are scored on.

    Args:
        kind: `"bert"` or `"llama"`.
        options: the command line's.
    """

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        if kind == "bert":
            folder = options.assets / "sst2"
            splits = {split: load_examples(next(folder.glob(f"{split}*.tsv"))) for split in ("train", "test")}
            self.model, self.tokenizer = minilm_teacher(options.cache / "sst2-minilm", splits["train"], labels=2)
            self.data, self.metric = splits["train"], "accuracy"
            self.task = lc.TextClassification(splits["test"], max_length=64)
        else:
            from transformers import AutoTokenizer

            folder = options.assets / "babyllama-tok105-hf"
            self.model, self.tokenizer = lc.load(folder), AutoTokenizer.from_pretrained(folder)
            self.data, self.metric = training_texts(options.assets), "perplexity"
            self.task = lc.LanguageModeling([texts_of(options.assets)[0]], window=256, max_windows=60)
        self.base = self.evaluate(self.model, self.tokenizer)

    def evaluate(self, model: object, tokenizer: object) -> lc.Evaluation:
        """Score a model and tell its size."""
        return lc.evaluate(model, self.task, tokenizer=tokenizer, latency=False, progress=False)

    def measure(self, recipe: lc.Pipeline, folder: Path) -> dict:
        """Run the recipe, keep the model in `folder`, and return what it cost and gained."""
        found = lc.compress(
            self.model,
            recipe.steps,
            recover=recipe.recover,
            data=self.data,
            tokenizer=self.tokenizer,
            progress=False,
        )
        found.save_pretrained(folder)
        small = self.evaluate(found.model, found.tokenizer)
        tests = {test.metric: test for test in paired_tests(self.task, self.base.score, small.score)}
        test = tests[self.metric]
        return {
            "metric": self.metric,
            "base": self.base.score.value,
            "value": small.score.value,
            "change": [test.change, test.low, test.high],
            "bytes": [self.base.size.disk_bytes, small.size.disk_bytes],
            "zeros": found.report.steps[-1].footprint.zeros,
            "seconds": sum(record.seconds for record in found.report.steps),
        }

    def time(self, folder: Path) -> list[float]:
        """Return how many times as fast as the base the model in `folder` is, with the ends of the 95 % interval."""
        models = {"base": self.model, "small": lc.load(folder)}
        timed = measure_latencies(models, batch_size=SHAPE[0], tokens=SHAPE[1], seconds=2.0, progress=False)
        found = speedup(timed["base"], timed["small"])
        return [found.ratio, found.low, found.high]


def described(name: str, what: str, recipe: lc.Pipeline) -> dict:
    """Return what a run is known by: a recipe that was changed is run again."""
    return {"name": name, "what": what, "recipe": recipe.to_dict()}


def row(name: str, score: dict | None, timed: dict | None) -> str:
    """Return a recipe's line of the table."""
    if score is None:
        return f"| [{name}](#{name}) | not measured yet | | | | | |"
    found = score["found"]
    if found["metric"] == "accuracy":
        value = f"{found['value']:.2%}"
        change = "{:+.2f} [{:+.2f}, {:+.2f}] points".format(*(100 * part for part in found["change"]))
    else:
        value = f"{found['value']:.4f}"
        change = "{:.3f}x [{:.3f}, {:.3f}]".format(*found["change"])
    base, small = found["bytes"]
    speed = "" if timed is None else "{:.2f}x [{:.2f}, {:.2f}]".format(*timed["found"])
    cells = [f"[{name}](#{name})", value, change, bytes_text(small), ratio_text(base / small), f"{found['zeros']:.0%}"]
    return f"| {' | '.join([*cells, speed])} |"


def page(recipes: dict[str, lc.Pipeline], finished: Runs) -> str:
    """Return the page: a table for each base, and each recipe as it stands in its file."""
    parts = [HEAD]
    heads = ["recipe", "", "to the base, paired [95 %]", "on disk", "smaller", "zeros", "speed of the base's [95 %]"]
    machines = set()
    for kind, (title, metric) in KINDS.items():
        own = {
            name: finished.found(described(name, "score", recipe))
            for name, recipe in recipes.items()
            if name.startswith(kind)
        }
        base = next((run["found"] for run in own.values() if run is not None), None)
        if base is None:
            raise SystemExit(f"no recipe of {kind} is measured yet")
        told = f"{base['base']:.2%}" if metric == "accuracy" else f"{base['base']:.4f}"
        heads[1] = metric
        parts.append(f"## {title}\n\nThe base: {metric} {told}, {bytes_text(base['bytes'][0])} on disk.\n")
        lines = [f"| {' | '.join(heads)} |", "|:---|" + "---:|" * (len(heads) - 1)]
        for name, score in own.items():
            timed = finished.found(described(name, "time", recipes[name]))
            machines.update(run["machine"] for run in (score, timed) if run is not None)
            lines.append(row(name, score, timed))
        parts.append("\n".join(lines) + "\n")
    parts.append("Measured by `benchmarks/gallery.py` with\n\n" + "\n\n".join(sorted(machines)) + "\n\n## The files\n")
    for name in recipes:
        parts.append(f'### {name}\n\n```yaml title="recipes/{name}.yaml"\n--8<-- "recipes/{name}.yaml"\n```\n')
    return "\n".join(parts)


KINDS = {
    "bert": ("Classifiers: MiniLM on SST-2", "accuracy"),
    "llama": ("Language models: a Llama of 0.9 M weights on tinystories", "perplexity"),
}
HEAD = """# Recipes

Ten files in `recipes/` to start from, each for somebody; the comment at its top says for whom. They know no model: give
yours, and texts like those it will read.

```console
$ llmcompress compress my-classifier --recipe recipes/bert-cpu-serving.yaml --data texts.csv --out small
```

The numbers are those of two small models on one machine, one seed: they show what a recipe does, not what it will do
to your model. `--task` and `--task-data` measure that. Where a speed is given it is that of one row of 64 tokens; the
Llama here is too small for its time to tell anything, see [kernels](quantization.md) for larger ones.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps the classifier, runs and models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", help="names; all by default")
    parser.add_argument("--time", action="store_true", help="measure speed, of classifiers")
    parser.add_argument("--page", action="store_true", help="write docs/recipes.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    files = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    recipes = {name: lc.Pipeline.from_yaml(path) for name, path in files.items()}
    finished = Runs(options.cache / "gallery.jsonl")
    if options.page:
        (ROOT / "docs" / "recipes.md").write_text(page(recipes, finished), encoding="utf-8")
        return
    what, benches = "time" if options.time else "score", {}
    for name in options.recipes or recipes:
        kind, folder = name.partition("-")[0], options.cache / "gallery" / name
        run = described(name, what, recipes[name])
        if finished.found(run) is not None or (options.time and kind == "llama"):
            continue
        if kind not in benches:
            benches[kind] = Bench(kind, options)
        bench = benches[kind]
        found = bench.time(folder) if options.time else bench.measure(recipes[name], folder)
        finished.kept(run, partial(dict, found=found, machine=describe_machine()))
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
