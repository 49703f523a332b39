"""Distillation in two processes, as `accelerate launch` starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import distributed_distillation
import llmcompress as lc
from llmcompress.testing import tiny_model, tiny_tokenizer

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "distributed" / "distill.py"
LAUNCH = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
LAUNCH += ["--fsdp_reshard_after_forward", "true", "--fsdp_cpu_ram_efficient_loading", "false"]
LAUNCH += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What two processes end with, whole and sharded, beside one process; their sweep; what the example leaves."""
    folder = tmp_path_factory.mktemp("distributed")
    for name in ("one", "whole", "sharded", "swept"):
        (folder / name).mkdir()
    tiny_model("llama").save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    (folder / "texts.txt").write_text("\n\n".join(["a cat sat on a mat", "the dog ran"] * 8))
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--main_process_port", "0"]
    command += [distributed_distillation.__file__, "whole", "sharded", "swept"]
    command += [str(EXAMPLE), "teacher", "texts.txt", "student"]
    command += ["--student", "layers:1", "--steps", "2", "--max-length", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed.txt").write_text(done.stdout)
    distributed_distillation.distil(folder / "one", 8, "llama")
    return folder


def weights(folder):
    return [load_file(file) for file in sorted(folder.glob("rank*.safetensors"))]


def losses(folder, rank=0):
    told = (folder / f"rank{rank}.txt").read_text()
    return [float(loss) for loss in told.split(";")[0].removeprefix("loss ").split(" -> ")]


@pytest.mark.parametrize("way", ["whole", "sharded"])
def test_two_processes_end_with_the_same_weights_and_as_one_process_with_the_same_global_batch(ended, way):
    one, two = ended / "one", ended / way
    (alone,) = weights(one)
    start = tiny_model("llama", seed=1).state_dict()
    moved = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    assert moved > 1e-2
    first, second = weights(two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = LlamaForCausalLM.from_pretrained(two / "saved").state_dict()
    assert all(torch.equal(loaded[name], first[name]) for name in first)
    assert max(float((alone[name] - first[name]).abs().max()) for name in alone) < 1e-3 * moved
    assert losses(two) == losses(two, rank=1) == pytest.approx(losses(one), rel=1e-3)
    pruned = next(tensor for name, tensor in first.items() if "down_proj" in name)
    assert bool((pruned[:, ::2] == 0).all())
    assert float((pruned[:, 1::2] != 0).float().mean()) > 0.99


def test_a_sweep_of_two_processes_makes_what_each_chain_makes_alone(ended):
    for name, steps in distributed_distillation.CHAINS.items():
        alone = lc.compress(tiny_model("bert"), steps, tokenizer=tiny_tokenizer(), progress=False)
        swept = lc.load(next((ended / "swept").glob(f"*/{name}"))).state_dict()
        assert all(torch.equal(tensor, swept[key]) for key, tensor in alone.model.state_dict().items())
    for rank in (0, 1):
        assert (ended / "swept" / f"seen by {rank}.txt").read_text() == ", ".join(distributed_distillation.CHAINS)


def test_the_example_runs_in_two_processes(ended):
    assert AutoModelForCausalLM.from_pretrained(ended / "student").config.num_hidden_layers == 1
    assert (ended / "printed.txt").read_text().count("knowledge_distillation") == 1
    assert not list((ended / "student.stages").glob("*.unfinished"))
