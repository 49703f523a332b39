"""Few bits a weight and what they cost: rounding, HQQ, GPTQ and AWQ on trained Llamas, without any training after them.

Scored on the first 60 windows of 256 tokens of tinystories, calibrated on 64 texts of 1,200 characters from another
part, cut to 256 tokens; all linear layers but the head; weights exactly as they are stored, activations in float.
Prints the loss in nats a token (lower is better), and in brackets the stored bits a weight, scales and zero points
included.

    python benchmarks/quantization_quality.py --threads 1
    python benchmarks/quantization_quality.py --reference FILE --peer-python VENV/bin/python
    python benchmarks/quantization_quality.py --models --classifier

`--reference` is a script that prints rows such as `gptq int4 0.7474 int3 0.8128`, run and shown beside. `--peer-python`
is an interpreter that has llm-compressor and hqq, which quantize the same model on the same token ids in a process of
its own. `--classifier` quantizes a MiniLM that was fine-tuned on SST-2; accuracy, higher is better.
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
from llmcompress.quantization.modules import QuantizedModule

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("babyllama-tok105-hf", "stories260K-hf")
BITS = (4, 3, 2)
GROUP = 32
CALIBRATED = {"max_length": 256, "samples": 64}
STRATEGIES = {
    "round to nearest": (lc.WeightOnlyQuantization, {}),
    "round to nearest, symmetric": (lc.WeightOnlyQuantization, {"symmetric": True}),
    "MSE": (lc.WeightOnlyQuantization, {"fit": "mse"}),
    "HQQ": (lc.WeightOnlyQuantization, {"fit": "hqq"}),
    "AWQ": (lc.AWQ, CALIBRATED),
    "GPTQ": (lc.GPTQ, CALIBRATED),
    "GPTQ, whole zero points": (lc.GPTQ, {**CALIBRATED, "fine_zeros": False}),
    "GPTQ, symmetric": (lc.GPTQ, {**CALIBRATED, "symmetric": True}),
}
CODEBOOKS = ("nf4", "fp4")


def ours(folder: Path, calibration: list[str], ids: torch.Tensor, group: int) -> None:
    """Print a row for each strategy."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def cell(step: lc.Compressor) -> str:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        result = lc.compress(model, step, data=calibration, tokenizer=tokenizer, inplace=True, progress=False)
        return f"{loss(result.model, ids):.4f} ({stored_bits(result.model):.2f})"

    for name, (strategy, more) in STRATEGIES.items():
        fields = {"group_size": group, "compute": "float", "indivisible": "pad", **more}
        cells = [cell(strategy(bits=bits, **fields)) for bits in BITS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for book in CODEBOOKS:
        step = lc.WeightOnlyQuantization(codebook=book, group_size=group, compute="float", indivisible="pad")
        print(f"| {book} | {cell(step)} | | |", flush=True)


def stored_bits(model: torch.nn.Module) -> float:
    """Return the bits on disk of the quantized layers, over their weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    stored = sum(tensor.nbytes for layer in layers for name, tensor in layer.state_dict().items() if name != "bias")
    return (
        8
        * stored
        / sum(layer.rows * layer.columns if hasattr(layer, "grid") else layer.weight.numel() for layer in layers)
    )


def peers(python: str, folder: Path, calibration: list[torch.Tensor], ids: torch.Tensor, group: int) -> None:
    """Print a row for each method of the other libraries, run by another interpreter."""
    rows = [row[:256].tolist() for row in calibration]
    asked = {"model": str(folder), "calibration": rows, "ids": ids.tolist(), "group_size": group, "bits": BITS}
    for name, found in ask(python, {**asked, "threads": torch.get_num_threads()}).items():
        cells = [f"{found[str(bits)]:.4f}" if str(bits) in found else "" for bits in BITS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def ask(python: str, asked: dict) -> dict:
    """Have `peer_quantizers.py` answer in a process of another interpreter."""
    with tempfile.TemporaryDirectory() as place:
        question = Path(place, "question.json")
        question.write_text(json.dumps(asked))
        script = Path(__file__).with_name("peer_quantizers.py")
        done = subprocess.run([python, script, question], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the peers failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def reference(script: Path) -> None:
    """Print the rows of an independent script."""
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        name, *words = line.split()
        if name in ("rtn", "gptq"):
            print(f"| reference {name} | {words[1]} | {words[3]} | |", flush=True)


def classifier(assets: Path, cache: Path) -> None:
    """Print the accuracy on SST-2's test set of a fine-tuned MiniLM, quantized in every way."""
    data = {split: load_examples(next((assets / "sst2").glob(f"{split}*.tsv"))) for split in ("train", "test")}
    teacher, tokenizer = minilm_teacher(cache / "sst2-minilm", data["train"], labels=2)
    task = lc.TextClassification(data["test"], max_length=64)
    steps: dict[str, lc.Compressor | None] = {
        "float32": None,
        "int8 dynamic": lc.DynamicQuantization(),
        "int8 dynamic, tensor": lc.DynamicQuantization(activations="tensor"),
        "int8 static": lc.StaticQuantization(),
        "int8 static, SmoothQuant": lc.StaticQuantization(smooth=0.5),
        "int8 static, outliers in float": lc.StaticQuantization(outliers=0.05),
    }
    plain = {"group_size": GROUP, "compute": "float"}
    for bits in (4, 3):
        steps[f"round to nearest, int{bits}"] = lc.WeightOnlyQuantization(bits=bits, **plain)
        steps[f"MSE, int{bits}"] = lc.WeightOnlyQuantization(bits=bits, fit="mse", **plain)
        steps[f"HQQ, int{bits}"] = lc.WeightOnlyQuantization(bits=bits, fit="hqq", **plain)
        steps[f"AWQ, int{bits}"] = lc.AWQ(bits=bits, max_length=64, **plain)
        steps[f"GPTQ, int{bits}"] = lc.GPTQ(bits=bits, max_length=64, **plain)
    steps["nf4"] = lc.WeightOnlyQuantization(codebook="nf4", **plain)
    print(
        f"\nMiniLM on SST-2, {len(data['test'])} test sentences:\n\n"
        "| | accuracy | points | answers changed | bits a weight | on disk |\n|---|---|---|---|---|---|"
    )
    base = None
    for name, step in steps.items():
        model, bits_told = teacher, "32"
        if step is not None:
            model = lc.compress(teacher, step, data=data["train"], tokenizer=tokenizer, progress=False).model
            bits_told = f"{stored_bits(model):.2f}"
        found = lc.evaluate(model, task, tokenizer=tokenizer, latency=False, progress=False)
        score = found.score
        base = score if base is None else base
        # With two classes an answer that changed is right where it was wrong, or the other way round.
        changed = sum(now != then for now, then in zip(score.right, base.right, strict=True))
        points, size = 100 * (score.value - base.value), f"{found.size.disk_bytes / 1e6:.1f} MB"
        print(f"| {name} | {score.value:.2%} | {points:+.2f} | {changed} | {bits_told} | {size} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--group", type=int, default=GROUP)
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
        print(f"\n{name}, dense {dense:.4f} nats a token, groups of {options.group}:\n")
        print(f"| | {' | '.join(f'int{bits}' for bits in BITS)} |\n|{'---|' * (len(BITS) + 1)}", flush=True)
        ours(folder, calibration, ids, options.group)
        if options.reference and number == 0:
            reference(options.reference)
        if options.peer_python:
            peers(options.peer_python, folder, [token_ids(tokenizer, text) for text in calibration], ids, options.group)
    if options.classifier:
        classifier(options.assets, options.cache)


if __name__ == "__main__":
    main()
