"""Distillation in two processes, as `accelerate launch` starts them."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import distributed_distillation


def launch(folder, *, processes, batch_size):
    # `--cpu` would start one process, whatever the number; so launched, they run where the model is, on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    done = subprocess.run(
        [str(part) for part in (*command, distributed_distillation.__file__, folder, batch_size, "llama")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder):
    return [load_file(file) for file in sorted(folder.glob("rank*.safetensors"))]


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_as_one_process_with_the_same_global_batch(tmp_path):
    from transformers import LlamaForCausalLM

    from llmcompress.testing import tiny_model

    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    launch(two, processes=2, batch_size=4)
    first, second = weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = LlamaForCausalLM.from_pretrained(two / "saved").state_dict()
    assert all(torch.equal(loaded[name], first[name]) for name in first)

    one.mkdir()
    distributed_distillation.main(one, 8, "llama")
    (alone,) = weights(one)
    start = tiny_model("llama", seed=1).state_dict()
    moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    apart = max(float((alone[name] - first[name]).abs().max()) for name in alone)
    assert moved > 1e-2
    assert apart < 1e-3 * moved
    pruned = next(tensor for name, tensor in first.items() if "down_proj" in name)
    assert bool((pruned[:, ::2] == 0).all())
    assert float((pruned[:, 1::2] != 0).float().mean()) > 0.99
