"""Peak memory of a run as `lc.plan` foretells it, against the resident bytes of a fresh process (Linux).

python benchmarks/plan_memory.py            each step in a process of its own
python benchmarks/plan_memory.py STEP       one step, given as JSON, in this one
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

STEPS = [
    {"name": "magnitude_pruning"},
    {"name": "structured_pruning"},
    {"name": "depth_pruning", "layers": 5, "criterion": "last"},
    {"name": "dynamic_quantization"},
    {"name": "weight_only_quantization"},
    {"name": "bitsandbytes_quantization"},
    {"name": "wanda_pruning"},
    {"name": "gptq"},
    {"name": "sparsegpt_pruning"},
    {"name": "awq"},
    {"name": "knowledge_distillation", "steps": 2, "batch_size": 4, "max_length": 64, "precision": "fp32"},
]


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def measure(step: dict) -> None:
    # What is imported on the way does not count: a tiny run comes first.
    tiny, tokenizer = tiny_model("llama"), tiny_tokenizer()
    small = {**step, "layers": 1} if "layers" in step else step
    lc.compress(tiny, small, data=tiny_data(tiny), tokenizer=tokenizer, progress=False)
    before = resident("VmRSS")
    sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()
    data = ["the quick brown fox jumps over the lazy dog again and again " * 4] * 32
    planned = lc.plan(model, step, data=data, tokenizer=tokenizer).steps[0]
    Path("/proc/self/clear_refs").write_text("5")
    seconds = lc.compress(model, step, data=data, tokenizer=tokenizer, progress=False).report.steps[0].seconds
    peak = resident("VmHWM") - before
    print(
        f"{planned.name:26} {peak / 1e6:8.0f} MB measured {planned.peak_bytes / 1e6:8.0f} MB planned "
        f"{planned.peak_bytes / peak:6.2f}   {seconds:8.1f} s measured {planned.rough_seconds:8.1f} s planned",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        measure(json.loads(sys.argv[1]))
    else:
        for step in STEPS:
            subprocess.run([sys.executable, __file__, json.dumps(step)], check=True, stderr=subprocess.DEVNULL)
