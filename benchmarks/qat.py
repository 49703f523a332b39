"""What quantization-aware training recovers: a trained Llama in few bits, rounded to nearest, and trained for it first.

Scored on the first 60 windows of 256 tokens of tinystories, in nats a token (lower is better); trained on another part
of the same stories. All linear layers but the head, groups of 32, scales of 16 bits. The quantized layers multiply in
float, so that only the weights differ.

    python benchmarks/qat.py --threads 1 --steps 200 --assets FOLDER
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from _machine import describe_machine
from _tinystories import loss, texts_of, token_ids, training_texts

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--model", default="babyllama-tok105-hf")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe_machine())
    folder = arguments.assets / arguments.model
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    text, _ = texts_of(arguments.assets)
    ids = token_ids(tokenizer, text)
    data = training_texts(arguments.assets)
    rate = arguments.learning_rate
    print(f"- {arguments.steps} steps of {arguments.batch} windows of 256 tokens, learning rate {rate:g}\n")
    print(f"| bits | rounded | trained for it | dense {loss(model, ids):.4f}, minutes of training |")
    print("|---|---|---|---|", flush=True)
    for bits in arguments.bits:
        step = lc.WeightOnlyQuantization(bits=bits, group_size=32, compute="float")
        train = lc.KnowledgeDistillation(
            quantize_for=step,
            steps=arguments.steps,
            alpha=1.0,
            temperature=1.0,
            learning_rate=rate,
            batch_size=arguments.batch,
        )
        start = time.perf_counter()
        cells = [
            loss(lc.compress(model, chain, data=data, tokenizer=tokenizer, progress=False).model, ids)
            for chain in (step, [train, step])
        ]
        minutes = (time.perf_counter() - start) / 60
        print(f"| int{bits} | {cells[0]:.4f} | {cells[1]:.4f} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
