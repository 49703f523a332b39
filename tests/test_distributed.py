"""Distillation in two processes, as `accelerate launch` starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_distillation.py")


def launch(folder, *, processes, batch_size):
    folder.mkdir()
    arguments = [SCRIPT, folder, batch_size, "llama"]
    command = [sys.executable]
    if processes > 1:
        # `--cpu` would start one process, whatever the number; so launched, they run where the model is, on the CPU.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
        command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    done = subprocess.run(
        [str(part) for part in (*command, *arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(file) for file in sorted(folder.glob("rank*.safetensors"))]


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_as_one_process_with_the_same_global_batch(tmp_path):
    from transformers import LlamaForCausalLM

    from llmcompress.testing import tiny_model

    first, second = launch(tmp_path / "two", processes=2, batch_size=4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "two" / "saved").state_dict()
    assert all(torch.equal(loaded[name], first[name]) for name in first)

    (alone,) = launch(tmp_path / "one", processes=1, batch_size=8)
    start = tiny_model("llama", seed=1).state_dict()
    moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    apart = max(float((alone[name] - first[name]).abs().max()) for name in alone)
    assert moved > 1e-2
    assert apart < 1e-3 * moved
    pruned = next(tensor for name, tensor in first.items() if "down_proj" in name)
    assert bool((pruned[:, ::2] == 0).all())
    assert float((pruned[:, 1::2] != 0).float().mean()) > 0.99
