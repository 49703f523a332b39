"""Launched by test_distributed.py in several processes: distils a tiny model, and each writes what it ended with.

One launch serves all: to import what trains takes each process longer than to train.
"""

import os
import random
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType
from safetensors.torch import save_file

import llmcompress as lc
from llmcompress.compressor import Context
from llmcompress.data import Example
from llmcompress.testing import tiny_model, tiny_tokenizer

TEXTS = [("a fine film", 1), ("a dull film", 0)]
HALF = lc.MagnitudePruning(sparsity=0.5)
CHAINS = {"sparse": HALF, "sparse, int8": [HALF, lc.DynamicQuantization()]}


@contextmanager
def sharding_on_cpus():
    """Have accelerate shard on CPUs, which it leaves to GPUs alone, though torch can (gloo)."""
    prepare = AcceleratorState.__init__

    def prepare_sharded(self, *args, fsdp_plugin=None, **settings):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", prepare_sharded)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        yield
    AcceleratorState._reset_state()


def distil(folder: Path, batch_size: int, family: str) -> None:
    torch.set_num_threads(1)
    teacher, student = tiny_model(family), tiny_model(family, seed=1)
    with torch.no_grad():
        next(p for n, p in student.named_parameters() if "down_proj" in n)[:, ::2] = 0
    # Eight windows, the last one short: each step takes them all, so that the global batch is the same however many
    # processes share it, and a mean of the processes' means would not be the mean over the tokens.
    data = [Example("".join(random.Random(0).choices("abcdefgh ", k=8 * 16 - 11)))]
    step = lc.KnowledgeDistillation(
        steps=4,
        batch_size=batch_size,
        max_length=16,
        features={"hidden": 1.0, "relations": 1.0},
        learning_rate=1e-2,
        precision="fp32",
    )
    context = Context(data=data, tokenizer=tiny_tokenizer(), teacher=teacher, progress=False)
    student = step.compress(student, context)
    state = PartialState()
    save_file(
        {name: tensor.contiguous() for name, tensor in student.state_dict().items() if name != "lm_head.weight"},
        folder / f"rank{state.process_index}of{state.num_processes}.safetensors",
    )
    (folder / f"rank{state.process_index}.txt").write_text(context.told[-1].reason)
    if state.is_main_process:
        student.save_pretrained(folder / "saved")
    state.wait_for_everyone()


def sweep(folder: Path) -> None:
    """Run chains that begin alike, each process with a worker beside it."""
    found = lc.sweep(
        tiny_model("bert"),
        CHAINS,
        lc.TextClassification(TEXTS),
        data=TEXTS,
        tokenizer=tiny_tokenizer(),
        folder=folder,
        latency=False,
        progress=False,
    )
    (folder / f"seen by {PartialState().process_index}.txt").write_text(", ".join(found.folders))


def main(whole: Path, sharded: Path, swept: Path, example: str, *arguments: str) -> None:
    """Distil with whole models, as `accelerate launch` without `--use_fsdp` has it; sharded; sweep; run the example."""
    assert os.environ.pop("ACCELERATE_USE_FSDP") == "true"
    distil(whole, 4, "llama")
    AcceleratorState._reset_state()
    with sharding_on_cpus():
        distil(sharded, 4, "llama")
    sweep(swept)
    sys.argv = [example, *arguments]
    runpy.run_path(example, run_name="__main__")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
