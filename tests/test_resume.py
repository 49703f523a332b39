"""Runs that stop anywhere go on with the same bytes; chains share a folder; nothing damaged is ever believed."""

import logging
import os
import random
import signal
import time

import pytest
import torch

import llmcompress as lc
from forks import begun, needs_fork
from llmcompress import checkpoint, kept_blocks, resume, run, tensor_files
from llmcompress.anatomy.turns import keeper_of
from llmcompress.locks import locked
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

PRUNE = lc.MagnitudePruning(sparsity=0.25)
CHAIN = [PRUNE, lc.WandaPruning(sparsity=0.5), lc.GPTQ(group_size=32)]


def compress(model, steps, folder=None, **inputs):
    given = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False, **inputs}
    return lc.compress(model, steps, resume_dir=folder, **given)


def same(ours, theirs):
    mine, others = ours.model.state_dict(), theirs.model.state_dict()
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    assert [one.touched for one in ours.report.steps] == [one.touched for one in theirs.report.steps]


def stopped(*_, **__):
    raise KeyboardInterrupt


def refused(*_, **__):
    pytest.fail("this was done already")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def whole(llama):
    return compress(llama, CHAIN)


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", lc.AWQ(group_size=32)),
        ("gpt2", lc.SparseGPTPruning(pattern="2:4")),
        ("llama", lc.WandaPruning(inputs="dense")),
    ],
)
def test_a_long_step_goes_on_behind_its_last_block(family, step, tmp_path, monkeypatch):
    model = tiny_model(family)
    expected = compress(model, step)
    write = kept_blocks.KeptBlocks._write

    def first_alone(self, block, entry):
        if block and self._numbers[block]:
            raise KeyboardInterrupt
        write(self, block, entry)

    with monkeypatch.context() as patch:
        patch.setattr(kept_blocks.KeptBlocks, "_write", first_alone)
        with pytest.raises(KeyboardInterrupt):
            compress(model, step, tmp_path)
    (unfinished,) = tmp_path.glob("*.unfinished")
    assert {path.name for path in unfinished.iterdir()} == {"block-00000.safetensors", "block-00000.json"}
    restored = []
    restore = kept_blocks.KeptBlocks.restore
    monkeypatch.setattr(
        kept_blocks.KeptBlocks, "restore", lambda self, block: (restored.append(block), restore(self, block))
    )
    result = compress(model, step, tmp_path)
    same(result, expected)
    assert len(restored) == 1
    assert not list(tmp_path.glob("*.unfinished"))
    assert type(keeper_of(result.model)).__name__ == "_Memory"
    assert result.report.steps[0].left == expected.report.steps[0].left


def test_unfinished_work_of_a_stage_that_is_finished_is_cleared_away(llama, tmp_path):
    compress(llama, CHAIN[:1], tmp_path)
    (stage,) = tmp_path.glob("00-*")
    left = stage.with_name(f"{stage.name}.unfinished")
    left.mkdir()
    compress(llama, CHAIN[:1], tmp_path)
    assert not left.exists()


def test_a_damaged_block_is_named_and_not_used(llama, tmp_path, monkeypatch):
    step = lc.WandaPruning()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress(llama, step, tmp_path)
    (block,) = tmp_path.glob("*.unfinished/block-00001.safetensors")
    content = bytearray(block.read_bytes())
    content[-5] ^= 1
    block.write_bytes(content)
    with pytest.raises(lc.CheckpointError, match=r"block-00001\.safetensors must have .* delete block-00001\.json"):
        compress(llama, step, tmp_path)
    block.with_suffix(".json").unlink()
    same(compress(llama, step, tmp_path), compress(llama, step))


@needs_fork
def test_killed_at_any_moment_it_ends_with_the_same_bytes(llama, whole, tmp_path):
    start = time.perf_counter()
    compress(llama, CHAIN, tmp_path / "timed")
    span = time.perf_counter() - start
    draw = random.Random(0)
    for _ in range(4):
        process = begun(lambda: compress(llama, CHAIN, tmp_path / "killed"))
        time.sleep(draw.uniform(0.05, 0.6) * span)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    result = compress(llama, CHAIN, tmp_path / "killed")
    same(result, whole)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("killed", "timed")]
    assert names[0] == names[1]
    for one in (tmp_path / "timed").glob("0*/*.safetensors"):
        assert (tmp_path / "killed" / one.parent.name / one.name).read_bytes() == one.read_bytes()


@pytest.mark.parametrize("where", ["stage", "block", "score"])
def test_a_full_disk_is_told_and_leaves_a_folder_that_goes_on(llama, tmp_path, monkeypatch, where):
    steps, task = CHAIN[:2], lc.LanguageModeling(["the cat sat on the mat"], window=8)
    with monkeypatch.context() as patch:
        left = [0 if where == "score" else 1]

        def full(own):
            def write(*args, **more):
                found = own(*args, **more)
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                return found

            return write

        target = {"stage": (checkpoint, "seal"), "block": (tensor_files, "save_file"), "score": (tensor_files, "sync")}
        patch.setattr(*target[where], full(getattr(*target[where])))
        with pytest.raises(lc.CheckpointError, match=r"cannot be written: .*No space left on device; make room"):
            compress(llama, steps, tmp_path, task=task)
    assert not [path for path in tmp_path.rglob("*") if "draft" in path.name]
    same(compress(llama, steps, tmp_path, task=task), compress(llama, steps))


def test_a_stage_is_not_taken_where_a_file_that_its_step_names_has_changed(tmp_path):
    step = lc.KnowledgeDistillation(steps=1, max_length=8, teacher=str(tmp_path / "teacher"), alpha=1.0)
    given = {"data": ["a cat sat"] * 4, "tokenizer": tiny_tokenizer(), "progress": False}
    for seed in (1, 1, 2):
        tiny_model("bert", seed=seed).save_pretrained(tmp_path / "teacher")
        lc.compress(tiny_model("bert"), step, resume_dir=tmp_path / "stages", **given)
    assert len(list((tmp_path / "stages").glob("00-*"))) == 2


def test_a_damaged_stage_is_made_again(llama, tmp_path, caplog):
    steps = [PRUNE, lc.MagnitudePruning(sparsity=0.5)]
    expected = compress(llama, steps, tmp_path)
    last = sorted(tmp_path.glob("0*"))[-1]
    names = {path.name for path in last.iterdir()}
    assert {"stage.json", "llmcompress.json", "config.json", "model.safetensors"} <= names
    for name in sorted(names):
        content = bytearray((last / name).read_bytes())
        content[len(content) // 2] ^= 1
        for damaged in (content, content[:-1])[: 1 + (name == "stage.json")]:
            (last / name).write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                same(compress(llama, steps, tmp_path), expected)
            assert "this stage is made again" in caplog.text
    (last / "stage.json").unlink()
    with pytest.raises(lc.CheckpointError, match=r"is no stage of a run \(it has no stage\.json\)"):
        compress(llama, steps, tmp_path)


def test_chains_share_a_folder_and_their_beginning(llama, tmp_path, monkeypatch):
    packed = lc.WeightOnlyQuantization(group_size=32)
    shared = compress(llama, [PRUNE, "dynamic_quantization"], tmp_path)
    before = {path.name for path in tmp_path.glob("0*")}
    with monkeypatch.context() as patch:
        patch.setattr(lc.MagnitudePruning, "compress", refused)
        other = compress(llama, [PRUNE, packed], tmp_path)
        patch.setattr(lc.DynamicQuantization, "compress", refused)
        same(compress(llama, [PRUNE, "dynamic_quantization"], tmp_path), shared)
    same(other, compress(llama, [PRUNE, packed]))
    after = {path.name for path in tmp_path.glob("0*")}
    assert before < after
    assert len(after) == 3
    # Whatever goes into a stage is part of its name.
    words = tiny_tokenizer()
    words.add_tokens("cat")
    for change in ({"data": ["another text"]}, {"seed": 1}, {"tokenizer": words}):
        compress(llama, PRUNE, tmp_path, **change)
    monkeypatch.setattr(resume, "library_versions", lambda: {"torch": "9"})
    compress(llama, PRUNE, tmp_path)
    compress(tiny_model("llama", seed=1), PRUNE, tmp_path)
    assert len({path.name for path in tmp_path.glob("0*")}) == 3 + 5


def test_one_stage_is_worked_on_by_one_process(llama, tmp_path):
    compress(llama, PRUNE, tmp_path)
    # A lock file that a killed process left is no lock.
    (lock,) = (tmp_path / "locks").iterdir()
    (stage,) = tmp_path.glob("0*")
    with locked(lock, "busy"):
        # What is finished is only read: any number of processes may.
        compress(llama, [PRUNE, "dynamic_quantization"], tmp_path)
        stage.rename(tmp_path / "away")
        with pytest.raises(lc.BusyError, match=rf"another process is at work on {stage.name}"):
            compress(llama, PRUNE, tmp_path)
        # Another chain of the same folder goes on.
        compress(llama, lc.MagnitudePruning(sparsity=0.75), tmp_path)
    compress(llama, PRUNE, tmp_path)


def test_stages_nobody_uses_are_removed_and_nothing_else(llama, tmp_path):
    compress(llama, PRUNE, tmp_path)
    compress(llama, lc.MagnitudePruning(sparsity=0.75), tmp_path)
    old, new = tmp_path.glob("0*")
    (tmp_path / "00-mine").mkdir()
    (tmp_path / f"{new.name[:-1]}").mkdir()
    half = tmp_path / f"..{old.name}.draft.0123.draft"
    half.mkdir()
    ago = time.time() - 3 * 86_400
    for path in (half, old, *old.iterdir()):
        os.utime(path, (ago, ago))
    assert lc.remove_stages(tmp_path, unused_days=2) == [half, old]
    with locked(tmp_path / "locks" / f"{new.name}.lock", "busy"):
        assert lc.remove_stages(tmp_path) == []
    assert lc.remove_stages(tmp_path) == [new]
    assert (tmp_path / "00-mine").is_dir()
    with pytest.raises(lc.ConfigError, match="must have a folder"):
        lc.remove_stages(tmp_path / "nothing")


def test_scores_are_kept_and_judged_anew(llama, tmp_path, monkeypatch):
    texts = ["the cat sat on the mat and the dog sat on the rug"]
    task, steps = lc.LanguageModeling(texts, window=8), CHAIN[:2]
    gates = [lc.MaxPerplexityRatio(100), lc.MinAgreement(1e-6)]
    first = compress(llama, steps, tmp_path, task=task, gates=gates).report
    asked = []
    monkeypatch.setattr(run, "score_models", lambda *a, **m: (asked.append(a), score_models(*a, **m))[1])
    score_models = lc.evaluation.scoring.score_models
    monkeypatch.setattr(resume, "load", lambda *_: pytest.fail("loaded before it is needed"))
    # All that the gates ask about is on disk, and judged by other bounds; the base comes back, for the first one fails.
    strict = compress(llama, steps, tmp_path, task=task, gates=[lc.MaxPerplexityRatio(1e-3), gates[1]])
    assert strict.report.rolled_back.step["name"] == "magnitude_pruning"
    assert strict.report.rolled_back.score == first.steps[0].score
    assert strict.report.rolled_back.fidelity == first.steps[0].fidelity
    assert asked == []
    monkeypatch.undo()
    monkeypatch.setattr(run, "score_models", lambda *a, **m: (asked.append(a), score_models(*a, **m))[1])
    again = compress(llama, steps, tmp_path, task=task, gates=gates).report
    assert [one.verdicts for one in again.steps] == [one.verdicts for one in first.steps]
    assert again.base_score == first.base_score
    assert asked == []
    # Another task is another question; without one there is no score.
    other = compress(llama, steps, tmp_path, task=lc.LanguageModeling(texts, window=12)).report
    assert len(asked) == 3
    assert other.steps[0].score != first.steps[0].score
    assert compress(llama, steps, tmp_path).report.steps[0].score is None


def test_a_roll_back_comes_from_the_folder(llama, tmp_path):
    task = lc.LanguageModeling(["the cat sat on the mat and the dog sat on the rug"], window=8)
    steps = [lc.MagnitudePruning(sparsity=0.01), lc.MagnitudePruning(sparsity=0.99)]
    for _ in range(2):
        found = compress(llama, steps, tmp_path, task=task, gates=lc.MinAgreement(0.9))
        assert found.report.rolled_back.step["sparsity"] == 0.99
        same(found, compress(llama, steps[:1]))


def test_a_stage_with_folders_in_it_is_kept(llama, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    step = lc.VocabularyPruning(round_to=1)
    first = compress(llama, step, tmp_path, tokenizer=tokenizer)
    again = compress(llama, step, tmp_path, tokenizer=tokenizer)
    same(first, again)
    assert again.tokenizer.chat_template == tokenizer.chat_template
