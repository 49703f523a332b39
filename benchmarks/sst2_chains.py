"""SST-2: what structure a fine-tuned MiniLM can lose and, distilled, still answer as it did; chains beside the teacher.

Prints a Markdown table: test accuracy with its interval, the difference to the teacher on the same sentences (paired),
its ratio to the teacher's accuracy, bytes on disk, and how many times smaller the word embeddings are.

    python benchmarks/sst2_chains.py --seeds 0 1 2 --threads 2
    python benchmarks/sst2_chains.py --chains "3 of 6 layers" vocabulary
"""

import argparse
from pathlib import Path

import torch

import llmcompress as lc
from _machine import describe_machine
from finetune import minilm_teacher
from llmcompress.data import load_examples

ROOT = Path(__file__).resolve().parent.parent


def chains(epochs: float, tokens: int) -> dict[str, list[lc.Compressor]]:
    """Return the chains by name; pruning first, then recovery by distillation, quantization last."""
    distil = lc.KnowledgeDistillation(epochs=epochs, features={"hidden": 1.0}, learning_rate=2e-4, max_length=64)
    vocabulary = lc.VocabularyPruning(keep=tokens, alphabet="seen")
    half, three = lc.StructuredPruning(ffn=0.5), lc.DepthPruning(layers=(0, 2, 5))
    int8 = lc.DynamicQuantization()
    return {
        "half FFN": [half, distil],
        "half FFN, not distilled": [half],
        "3 of 6 layers": [three, distil],
        "3 of 6 layers, not distilled": [three],
        "vocabulary": [vocabulary],
        "int8": [int8],
        "int8, static": [lc.StaticQuantization(max_length=64)],
        "int8, static, smoothed": [lc.StaticQuantization(smooth=0.5, max_length=64)],
        "3 of 6 layers, int8": [three, distil, int8],
        "vocabulary, 3 of 6 layers, int8": [vocabulary, three, distil, int8],
        "vocabulary, half FFN, 3 of 6 layers, int8": [vocabulary, half, three, distil, int8],
    }


def row(entry: object, teacher: object, seed: int, tables: tuple[int, int]) -> str:
    """Return one line of the table."""
    score, size = entry.evaluation.score, entry.evaluation.size
    low, high = score.intervals["accuracy"]
    kept = score.value / teacher.evaluation.score.value
    paired = ""
    if entry.change is not None:
        test = next(one for one in entry.change.tests[0] if one.metric == "accuracy")
        paired = f"{100 * test.change:+.2f} [{100 * test.low:+.2f}, {100 * test.high:+.2f}]"
    cells = [entry.name, str(seed), f"{score.value:.2%} [{low:.2%}, {high:.2%}]", paired, f"{kept:.2%}"]
    return f"| {' | '.join([*cells, f'{size.disk_bytes / 1e6:.1f} MB', f'{tables[0] / tables[1]:.2f}x'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps the teacher and finished stages")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--tokens", type=int, default=8000, help="tokens that vocabulary pruning keeps")
    parser.add_argument("--chains", nargs="+", help="which of the chains; all by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = options.assets / "sst2"
    data = {split: load_examples(next(folder.glob(f"{split}*.tsv"))) for split in ("train", "test")}
    teacher, tokenizer = minilm_teacher(options.cache / "sst2-minilm", data["train"], labels=2)
    task = lc.TextClassification(data["test"], max_length=64)
    known = chains(options.epochs, options.tokens)
    chosen = {name: known[name] for name in options.chains or known}
    print(describe_machine())
    rows = {side: len(data[side]) for side in data}
    print(f"- {rows['train']} sentences to train, {rows['test']} to test; distilled for {options.epochs:g} epochs\n")
    heads = ["model", "seed", "accuracy [95 %]", "points to the teacher, paired [95 %]", "of the teacher's", "on disk"]
    print(f"| {' | '.join([*heads, 'embeddings smaller'])} |")
    print("|---|---|---|---|---|---|---|", flush=True)
    tokens = teacher.get_input_embeddings().weight.shape[0]
    first = True
    for seed in options.seeds:
        for name, steps in chosen.items():
            result = lc.compress(
                teacher, steps, data=data["train"], tokenizer=tokenizer, seed=seed, resume_dir=options.cache / "stages"
            )
            found = lc.compare({"teacher": teacher, name: result}, task, tokenizer=tokenizer, latency=False)
            if first:
                print(row(found.base, found.base, seed, (tokens, tokens)), flush=True)
                first = False
            kept = result.model.get_input_embeddings().weight.shape[0]
            print(row(found.candidates[0], found.base, seed, (tokens, kept)), flush=True)


if __name__ == "__main__":
    main()
