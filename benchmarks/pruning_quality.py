"""Zeros and what they cost: magnitude, Wanda and SparseGPT on trained Llamas, without any training after them.

Scored on the first 60 windows of 256 tokens of tinystories, calibrated on 64 texts of 1,200 characters from another
part, cut to 256 tokens; all linear layers but the head. Prints the loss in nats a token; lower is better.

    python benchmarks/pruning_quality.py --threads 1
    python benchmarks/pruning_quality.py --reference FILE --peer-python VENV/bin/python
    python benchmarks/pruning_quality.py --models --classifier

`--reference` is a script that prints rows such as `wanda 50 % 2.0095 2:4 3.1038`, run and shown beside. `--peer-python`
is an interpreter that has llm-compressor, which prunes the same model on the same token ids in a process of its own.
`--classifier` prunes a MiniLM that was fine-tuned on SST-2, and an int8 version of each; accuracy, higher is better.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from _machine import describe_machine
from _tinystories import loss, texts_of, token_ids
from finetune import minilm_teacher
from llmcompress.data import load_examples

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("babyllama-tok105-hf", "stories260K-hf")
FIELDS = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "60 %, OWL": {"sparsity": 0.6, "allocation": "owl"},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
STRATEGIES = {
    "magnitude": (lc.MagnitudePruning, {}),
    "Wanda, pruned inputs": (lc.WandaPruning, {"max_length": 256, "inputs": "pruned"}),
    "Wanda": (lc.WandaPruning, {"max_length": 256}),
    "SparseGPT": (lc.SparseGPTPruning, {"max_length": 256}),
    "SparseGPT, dense inputs": (lc.SparseGPTPruning, {"max_length": 256, "inputs": "dense"}),
}


def ours(folder: Path, calibration: list[str], ids: torch.Tensor) -> None:
    """Print a row for each strategy."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, (strategy, more) in STRATEGIES.items():
        cells = []
        for fields in FIELDS.values():
            if "allocation" in fields and strategy is lc.MagnitudePruning:
                cells.append("")
                continue
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            try:
                step = strategy(**fields, **more)
                lc.compress(model, step, data=calibration, tokenizer=tokenizer, inplace=True, progress=False)
            except lc.ConfigError:  # M does not divide the inputs of every layer
                cells.append("refused")
                continue
            cells.append(f"{loss(model, ids):.4f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def peer(python: str, folder: Path, calibration: list[torch.Tensor], ids: torch.Tensor) -> None:
    """Print a row for each modifier of llm-compressor, run by another interpreter."""
    with tempfile.TemporaryDirectory() as place:
        question = Path(place, "question.json")
        rows = [row[:256].tolist() for row in calibration]
        question.write_text(json.dumps({"model": str(folder), "calibration": rows, "ids": ids.tolist()}))
        script = Path(__file__).with_name("peer_llmcompressor.py")
        done = subprocess.run([python, script, question], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llm-compressor failed: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    for name, found in answer["losses"].items():
        cells = [f"{found[key]:.4f}" if key in found else "" for key in FIELDS]
        print(f"| llm-compressor {answer['version']} {name} | {' | '.join(cells)} |", flush=True)


def reference(script: Path) -> None:
    """Print the rows of an independent script."""
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        name, *words = line.split()
        if name in ("magnitude", "wanda", "sparsegpt"):
            print(f"| reference {name} | {words[2]} | | | {words[4]} | |", flush=True)


def classifier(assets: Path, cache: Path) -> None:
    """Print the accuracy on SST-2's test set of a fine-tuned MiniLM with zeros, and of the same in int8."""
    data = {split: load_examples(next((assets / "sst2").glob(f"{split}*.tsv"))) for split in ("train", "test")}
    teacher, tokenizer = minilm_teacher(cache / "sst2-minilm", data["train"], labels=2)
    task = lc.TextClassification(data["test"], max_length=64)
    fields = {name: FIELDS[name] for name in ("50 %", "60 %", "2:4", "4:8")}
    dense = lc.evaluate(teacher, task, tokenizer=tokenizer, latency=False, progress=False).score.value
    print(f"\nMiniLM on SST-2, dense {dense:.2%} of {len(data['test'])} test sentences right; zeros, then int8:\n")
    print(f"| strategy | {' | '.join(fields)} |\n|{'---|' * (len(fields) + 1)}", flush=True)
    for name in ("magnitude", "Wanda", "SparseGPT"):
        strategy, more = STRATEGIES[name]
        cells = []
        for one in fields.values():
            found = []
            for steps in ([strategy(**one, **more)], [strategy(**one, **more), lc.DynamicQuantization()]):
                result = lc.compress(teacher, steps, data=data["train"], tokenizer=tokenizer, progress=False)
                found.append(
                    lc.evaluate(result.model, task, tokenizer=tokenizer, latency=False, progress=False).score.value
                )
            cells.append(f"{found[0]:.2%}, {found[1]:.2%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--classifier", action="store_true")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps the fine-tuned classifier")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(describe_machine())
    text, calibration = texts_of(options.assets)
    for number, name in enumerate(options.models):
        folder = options.assets / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = token_ids(tokenizer, text)
        dense = loss(AutoModelForCausalLM.from_pretrained(folder).eval(), ids)
        print(f"\n{name}, dense {dense:.4f} nats a token:\n")
        print(f"| strategy | {' | '.join(FIELDS)} |\n|{'---|' * (len(FIELDS) + 1)}", flush=True)
        ours(folder, calibration, ids)
        if options.reference and number == 0:
            reference(options.reference)
        if options.peer_python:
            peer(options.peer_python, folder, [token_ids(tokenizer, text) for text in calibration], ids)
    if options.classifier:
        classifier(options.assets, options.cache)


if __name__ == "__main__":
    main()
