"""Distillation in two processes, as `accelerate launch` starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distributed_distillation

# `--cpu` would start one process, whatever the number; so launched, they run where the model is, on the CPU.
WHOLE = ["--multi_gpu"]
SHARDED = ["--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
SHARDED += ["--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", "false"]


def run(command, folder):
    """Run a command in a folder, and return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launch(folder, way, *, processes, batch_size):
    command = [sys.executable, "-m", "accelerate.commands.launch", *way, "--num_processes", processes]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    run([*command, distributed_distillation.__file__, folder, batch_size, "llama"], folder)


def weights(folder):
    return [load_file(file) for file in sorted(folder.glob("rank*.safetensors"))]


def losses(folder, rank=0):
    told = (folder / f"rank{rank}.txt").read_text()
    return [float(loss) for loss in told.split(";")[0].removeprefix("loss ").split(" -> ")]


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_as_one_process_with_the_same_global_batch(tmp_path):
    from transformers import LlamaForCausalLM

    from llmcompress.testing import tiny_model

    one = tmp_path / "one"
    one.mkdir()
    distributed_distillation.main(one, 8, "llama")
    (alone,) = weights(one)
    start = tiny_model("llama", seed=1).state_dict()
    moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    assert moved > 1e-2
    for name, way in (("whole", WHOLE), ("sharded", SHARDED)):
        two = tmp_path / name
        two.mkdir()
        launch(two, way, processes=2, batch_size=4)
        first, second = weights(two)
        assert all(torch.equal(first[name], second[name]) for name in first)
        loaded = LlamaForCausalLM.from_pretrained(two / "saved").state_dict()
        assert all(torch.equal(loaded[name], first[name]) for name in first)
        assert max(float((alone[name] - first[name]).abs().max()) for name in alone) < 1e-3 * moved
        assert losses(two) == losses(two, rank=1) == pytest.approx(losses(one), rel=1e-3)
        pruned = next(tensor for name, tensor in first.items() if "down_proj" in name)
        assert bool((pruned[:, ::2] == 0).all())
        assert float((pruned[:, 1::2] != 0).float().mean()) > 0.99


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path):
    from transformers import AutoModelForCausalLM

    from llmcompress.testing import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "texts.txt").write_text("\n\n".join(["a cat sat on a mat", "the dog ran"] * 8))
    script = Path(__file__).resolve().parent.parent / "examples" / "distributed" / "distill.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    command += ["teacher", "texts.txt", "student", "--student", "layers:1", "--steps", "2", "--max-length", "16"]
    told = run(command, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 1
    assert told.count("knowledge_distillation") == 1
    assert not list((tmp_path / "student.stages").glob("*.unfinished"))
