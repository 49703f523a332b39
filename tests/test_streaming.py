"""compress_checkpoint: the bytes of lc.compress with two blocks in memory; killed anywhere, it ends with the same."""

from __future__ import annotations

import json
import os
import platform
import signal
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from forks import needs_fork, wait_status
from llmcompress import tensor_files as tensors
from llmcompress.anatomy.layers import weight_layers
from llmcompress.anatomy.turns import in_turns, keeper_of, let_go
from llmcompress.compressor import Action
from llmcompress.errors import CheckpointError, CompressionError, ConfigError, UnsupportedModelError
from llmcompress.kept_blocks import KeptBlocks
from llmcompress.streaming import residence
from llmcompress.streaming.folder import open_folder
from llmcompress.streaming.opening import open_empty, open_model
from llmcompress.streaming.run import locked
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
        ("gpt2", ["weight_only_quantization"]),
        ("llama", [{"name": "gptq", "group_size": 32}]),
        ("llama", [{"name": "awq", "group_size": 32, "overrides": {"lm_head": 8}}]),
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


@needs_fork
def test_kill_9_in_the_second_block(tmp_path, monkeypatch):
    source = folder_of("llama", tmp_path / "in")
    settle = tensors._settle
    # Before the tensors of the second block are there under their name: run, base, and two files of the first block.
    left = 4

    def kill_or_settle(draft, file):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        settle(draft, file)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_settle", kill_or_settle)
        assert wait_status(lambda: run(source, tmp_path / "out")) == signal.SIGKILL
    files = {path.name for path in (tmp_path / "out.partial" / "0-sparsegpt_pruning").iterdir()}
    assert files == {"block-00000.safetensors", "block-00000.json", "block-00001.safetensors.draft"}
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", torch.float32), ("llama", torch.bfloat16)])
def test_blocks_that_are_otherwise_on_disk_are_converted_one_by_one(family, dtype, tmp_path):
    source = folder_of(family, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    run(source, tmp_path / "out")
    result = lc.compress(lc.load(source), CHAIN, data=tiny_data(tiny_model("llama")), progress=False)
    result.save_pretrained(tmp_path / "memory")
    same_state(lc.load(tmp_path / "out"), lc.load(tmp_path / "memory"))
    names = [set(open_folder_names(tmp_path / name)) for name in ("out", "memory")]
    assert names[0] == names[1]


def open_folder_names(path: Path) -> list[str]:
    return list(open_folder(path).stored)


def test_only_one_block_is_in_memory_and_the_rest_are_views_of_files(tmp_path):
    folder = open_folder(folder_of("llama", tmp_path / "in"))
    model, stored = open_model(folder, open_empty(folder), tmp_path / "scratch")
    assert stored.keys() == model.state_dict().keys()
    with residence.Residence(model, stored) as weights:
        layers = [layer.weight for layer in weight_layers(model) if layer.place == "block"]
        assert all(mapped(weight) for weight in layers)
        model(torch.arange(4, 12)[None])
        assert [mapped(weight) for weight in layers] == [True] * 7 + [False] * 7
        weights.hold("model.layers.0")
        model(torch.arange(4, 12)[None])
        assert not any(mapped(weight) for weight in layers[:7])
        weights.release("model.layers.0")
        weights.rest()
        assert all(mapped(weight) for weight in layers)
        # A view may be written to: the file never shows it.
        before = (tmp_path / "in" / "model.safetensors").read_bytes()
        layers[0].data.zero_()
        let_go(layers[0])
        assert not layers[0].any()
        assert (tmp_path / "in" / "model.safetensors").read_bytes() == before
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a call for it")
def test_a_block_that_leaves_gives_the_heap_back(tmp_path):
    folder = open_folder(folder_of("llama", tmp_path / "in"))
    model, stored = open_model(folder, open_empty(folder), tmp_path / "scratch")
    with residence.Residence(model, stored) as weights:
        # Too small for pages of their own, as the codes and scales of many layers are.
        pieces = [torch.ones(10_000) for _ in range(2000)]
        del pieces[:-1]  # one stays at the top, above all that is free
        before = anonymous_bytes()
        model(torch.arange(4, 12)[None])
        weights.rest()
        assert anonymous_bytes() < before - 60e6


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def mapped(weight: torch.Tensor) -> bool:
    return getattr(weight, "_llmcompress_mapping", None) is not None


def test_memory_is_aligned_whatever_the_file_is(tmp_path):
    # Products of unaligned float32 weights with one row differ in the last bits.
    folder = open_folder(folder_of("bert", tmp_path / "in"))
    assert any(one.start % 64 for one in folder.stored.values())
    assert all(one.read().data_ptr() % 64 == 0 for one in folder.stored.values() if one.nbytes > 256)


def test_another_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    source = folder_of("llama", tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr("llmcompress.streaming.compress_checkpoint.assemble", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "magnitude_pruning")
    with pytest.raises(CheckpointError, match=r"unfinished run with other steps; call with the same .* out\.partial"):
        run(source, tmp_path / "out", "dynamic_quantization")
    with pytest.raises(CheckpointError, match="unfinished run with another seed"):
        run(source, tmp_path / "out", "magnitude_pruning", seed=1)
    (source / "model.safetensors").touch()  # another time, the same bytes
    report = run(source, tmp_path / "out", "magnitude_pruning")
    before = content(tmp_path / "out")
    # Called once more, it finds that all is done.
    assert run(source, tmp_path / "out", "magnitude_pruning").steps[0].touched == report.steps[0].touched
    assert content(tmp_path / "out") == before
    with pytest.raises(CheckpointError, match=r"result of a run with other steps; .* choose another folder_out"):
        run(source, tmp_path / "out", "dynamic_quantization")
    tiny_model("llama", seed=1).save_pretrained(source)
    with pytest.raises(CheckpointError, match="another folder_in"):
        run(source, tmp_path / "out", "magnitude_pruning")


def stopped(*_, **__):
    raise KeyboardInterrupt


def test_two_at_once_are_refused(tmp_path):
    source = folder_of("llama", tmp_path / "in")
    with locked(tmp_path / "out.partial"), pytest.raises(CheckpointError, match="another process is at work"):
        run(source, tmp_path / "out", "magnitude_pruning")
    run(source, tmp_path / "out", "magnitude_pruning")


def test_a_full_disk_leaves_a_folder_to_go_on_with(tmp_path, monkeypatch):
    source = folder_of("llama", tmp_path / "in")
    with monkeypatch.context() as patch:
        save_file, left = tensors.save_file, [1]

        def full(content, file, **options):
            save_file(content, file, **options)
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")

        patch.setattr(tensors, "save_file", full)
        with pytest.raises(CheckpointError, match=r"block-00001.*No space left.*make room, and call again"):
            run(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").rglob("*.draft"))
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_steps_that_need_the_whole_model_are_refused_before_work(tmp_path):
    source = folder_of("llama", tmp_path / "in")
    for step in (lc.MagnitudePruning(scope="global"), lc.StructuredPruning(ffn=0.5)):
        with pytest.raises(UnsupportedModelError, match=r"does not work one block at a time.*lc\.compress"):
            run(source, tmp_path / "out", step)
    with pytest.raises(ConfigError, match=r"folder_in must be a folder, got LlamaForCausalLM[^;]*; lc\.compress"):
        run(tiny_model("llama"), tmp_path / "out", "magnitude_pruning")
    with pytest.raises(ConfigError, match="another folder than folder_in"):
        run(source, source, "magnitude_pruning")
    with pytest.raises(ConfigError, match="another folder than the working folder"):
        run(source, ".", "magnitude_pruning")
    with pytest.raises(ConfigError, match=r"compress_checkpoint\.seed must be an integer in .*, got -1"):
        run(source, tmp_path / "out", "magnitude_pruning", seed=-1)
    with pytest.raises(CheckpointError, match=r"folder with config\.json"):
        run(tmp_path / "nothing", tmp_path / "out", "magnitude_pruning")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_inputs_that_cannot_be_streamed_are_refused(tmp_path):
    source = folder_of("llama", tmp_path / "in")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="does not have the bytes that its header tells"):
        run(source, tmp_path / "out", "magnitude_pruning")
    (source / "model.safetensors").write_bytes(whole[:4])
    with pytest.raises(CheckpointError, match="is no safetensors file, or was cut"):
        run(source, tmp_path / "out", "magnitude_pruning")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors, but pytorch_model\.bin"):
        run(source, tmp_path / "out", "magnitude_pruning")
    lc.compress(tiny_model("llama"), "dynamic_quantization", progress=False).save_pretrained(tmp_path / "int8")
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        run(tmp_path / "int8", tmp_path / "out", "magnitude_pruning")


def test_a_damaged_block_is_named(tmp_path, monkeypatch):
    source = folder_of("llama", tmp_path / "in")
    monkeypatch.setattr("llmcompress.streaming.compress_checkpoint.assemble", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", "magnitude_pruning")
    block = tmp_path / "out.partial" / "0-magnitude_pruning" / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors must have \d+ bytes .*got \d+ bytes.*delete"):
        run(source, tmp_path / "out", "magnitude_pruning")


class Corrects(lc.Compressor):
    """Says in each block's turn something else than its plan."""

    @property
    def in_turns(self) -> bool:
        return True

    def plan(self, model, context):
        layers = [layer.name for layer in weight_layers(model) if layer.place == "block"]
        return [Action(path=name, does="planned") for name in layers]

    def compress(self, model, context):
        for _, own in in_turns(model, [layer for layer in weight_layers(model) if layer.place == "block"]):
            context.tell(Action(path=own[0].name, does="corrected"), instead=True)
        return model

    def to_dict(self):
        return {"name": "corrects"}


def test_what_was_corrected_before_a_stop_stays_so(tmp_path, monkeypatch):
    source = folder_of("llama", tmp_path / "in")
    expected = run(source, tmp_path / "whole", Corrects()).steps[0].touched
    assert [action.does for action in expected].count("corrected") == 2
    assert len(expected) == 14
    write, left = KeptBlocks._write, [1]

    def stop_or_write(self, block, entry):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, block, entry)

    with monkeypatch.context() as patch:
        patch.setattr(KeptBlocks, "_write", stop_or_write)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", Corrects())
    assert sorted(run(source, tmp_path / "out", Corrects()).steps[0].touched, key=str) == sorted(expected, key=str)


class ChangesAfterwards(lc.Compressor):
    @property
    def in_turns(self) -> bool:
        return True

    def compress(self, model, context):
        layers = [layer for layer in weight_layers(model) if layer.place == "block"]
        for _ in in_turns(model, layers):
            pass
        with torch.no_grad():
            layers[0].weight.add_(1)
        return model

    def to_dict(self):
        return {"name": "changes_afterwards"}


def test_a_step_that_changes_a_block_after_its_turn_is_found_out(tmp_path):
    source = folder_of("llama", tmp_path / "in")
    with pytest.raises(CompressionError, match=r"changed model\.layers\.0 after its turn"):
        run(source, tmp_path / "out", ChangesAfterwards())


def test_in_memory_there_is_no_keeper():
    model = tiny_model("llama")
    keeper = keeper_of(model)
    assert not keeper.is_finished("model.layers.0")
    let_go(model.lm_head.weight)
    layers = weight_layers(model)
    groups = dict(in_turns(model, layers))
    assert list(groups) == ["model.layers.0", "model.layers.1", ""]
    assert sum(map(len, groups.values())) == len(layers)


def test_a_folder_of_the_users_own_is_not_taken_for_the_beginnings_of_a_run(tmp_path):
    source = folder_of("llama", tmp_path / "in")
    own = tmp_path / "out.partial"
    own.mkdir()
    (own / "thesis.txt").write_text("years")
    with pytest.raises(
        CheckpointError, match=r"out\.partial is where the unfinished run would be, and holds something else"
    ):
        run(source, tmp_path / "out", "magnitude_pruning")
    assert (own / "thesis.txt").read_text() == "years"


def test_a_link_as_the_place_of_the_result(tmp_path):
    source, target, link = folder_of("llama", tmp_path / "in"), tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    run(source, link, "magnitude_pruning")
    assert link.is_symlink()
    assert lc.load(target).config.model_type == "llama"
