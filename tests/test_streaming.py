"""compress_checkpoint: the bytes of lc.compress with two blocks in memory; killed anywhere, it ends with the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from llmcompress.streaming import residence, tensors
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

CHAIN = [{"name": "sparsegpt_pruning", "block_size": 8}, "dynamic_quantization"]


@pytest.fixture(autouse=True)
def everything_is_big(monkeypatch):
    """Have even the smallest matrices of the tiny models rest on disk, and one of their two blocks at least."""
    monkeypatch.setattr(residence, "_SMALL_BYTES", 64)
    monkeypatch.setattr(residence, "_AT_ONCE", 1)


def folder_of(family: str, path: Path, *, shard: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(family).to(dtype).save_pretrained(path, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(source: Path, out: Path, steps=CHAIN, **options):
    data = tiny_data(tiny_model("llama"))
    return lc.compress_checkpoint(source, out, steps, data=data, progress=False, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_state(one, other) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", ["wanda_pruning"]),
        ("llama", CHAIN),
        ("opt", ["sparsegpt_pruning"]),
        ("gpt2", ["magnitude_pruning", "dynamic_quantization"]),
        ("bert", [{"name": "wanda_pruning", "allocation": "owl"}, "dynamic_quantization"]),
        ("t5", [{"name": "wanda_pruning", "inputs": "dense"}]),
    ],
)
def test_the_folder_holds_what_compress_gives(family, steps, tmp_path):
    source = folder_of(family, tmp_path / "in", shard="100KB")
    data = tiny_data(tiny_model(family))
    report = lc.compress_checkpoint(source, tmp_path / "out", steps, data=data, progress=False)
    result = lc.compress(lc.load(source), steps, data=data, progress=False)
    result.save_pretrained(tmp_path / "memory")
    same_state(lc.load(tmp_path / "out"), lc.load(tmp_path / "memory"))
    told = [(step.touched, step.left, step.footprint) for step in report.steps]
    assert told == [(step.touched, step.left, step.footprint) for step in result.report.steps]
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "memory"))
    assert ours == theirs
    assert not (tmp_path / "out.partial").exists()


def test_an_ended_process_goes_on_where_it_was_at_every_point(tmp_path, monkeypatch):
    source = folder_of("llama", tmp_path / "in")
    run(source, tmp_path / "whole")
    settle = tensors._settle
    left = 0

    def stop_or_settle(draft: Path, file: Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        settle(draft, file)

    monkeypatch.setattr(tensors, "_settle", stop_or_settle)
    attempts = 0
    while not (tmp_path / "out").exists():
        # Stopped behind one, two or three files: between tensors and the note that they are finished, and after it.
        left, attempts = 1 + attempts % 3, attempts + 1
        assert attempts < 30
        try:
            run(source, tmp_path / "out")
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
    assert attempts > 8
    assert content(tmp_path / "out") == content(tmp_path / "whole")


KILLED = """
import os, signal, sys
import llmcompress as lc
from llmcompress.streaming import tensors
from llmcompress.testing import tiny_data, tiny_model
settle, left = tensors._settle, int(sys.argv[3])
def kill_or_settle(draft, file):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    settle(draft, file)
tensors._settle = kill_or_settle
steps = [{"name": "sparsegpt_pruning", "block_size": 8}, "dynamic_quantization"]
lc.compress_checkpoint(sys.argv[1], sys.argv[2], steps, data=tiny_data(tiny_model("llama")), progress=False)
"""


def test_kill_9_in_the_second_block(tmp_path):
    source = folder_of("llama", tmp_path / "in")
    # Before the tensors of the second block are there under their name: run, base, and two files of the first block.
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), "4"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    files = {path.name for path in (tmp_path / "out.partial" / "0-sparsegpt_pruning").iterdir()}
    assert files == {"block-00000.safetensors", "block-00000.json", "block-00001.safetensors.draft"}
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
