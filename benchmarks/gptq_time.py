"""Seconds that GPTQ takes on a random Llama of 150 M parameters, beside llm-compressor's in a process of its own.

    python benchmarks/gptq_time.py --threads 1 --peer-python VENV/bin/python

Both quantize the same folder to 4 bits in groups of 128 on the same tokens, in turns; loading is not counted.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from _machine import describe_machine
from llmcompress.testing import tiny_tokenizer
from quantization_quality import ask

GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=options.layers, tie_word_embeddings=False, **sizes)
    rows = torch.randint(3, 100, (options.samples, options.tokens)).tolist()
    times: dict[str, list[float]] = {"llmcompress": [], "llmcompress, refinements=0": [], "llm-compressor": []}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)  # llm-compressor wants one beside the model
        asked = {"model": folder, "calibration": rows, "group_size": GROUP, "threads": options.threads}
        for _ in range(options.rounds):
            times["llmcompress"].append(ours(folder, rows))
            times["llmcompress, refinements=0"].append(ours(folder, rows, refinements=0))
            if options.peer_python:
                answer = ask(options.peer_python, {**asked, "time_only": True})
                times["llm-compressor"].append(answer["seconds"])
    print(f"{describe_machine()}\n- {options.samples} rows of {options.tokens} tokens, {options.layers} blocks\n")
    for name, seconds in times.items():
        if seconds:
            spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
            print(f"| {name} | {statistics.median(seconds):.1f} s | {spread} |")


def ours(folder: str, rows: list[list[int]], **fields: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(row) for row in rows]
    step = lc.GPTQ(group_size=GROUP, samples=len(rows), max_length=len(rows[0]), **fields)
    start = time.perf_counter()
    step.compress(model, lc.Context(data=lc.load_examples(texts), tokenizer=tokenizer, progress=False))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
