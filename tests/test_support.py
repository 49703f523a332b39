"""The support matrix: its checks on a few architectures, each mend of the anatomy, and a runner that nothing stops."""

import json
from pathlib import Path

import pytest

import llmcompress as lc
from llmcompress.cli import main
from llmcompress.support.checks import STRATEGIES, Subject, check
from llmcompress.support.entries import Entry, append_entries, read_entries
from llmcompress.support.matrix import choose_jobs, run
from llmcompress.support.page import page
from llmcompress.support.tiny_models import TASKS, NotBuiltError, build_tiny
from llmcompress.support.worker import Job, Outcome
from misbehaving import misbehave


def test_the_tasks_are_the_auto_mappings():
    assert TASKS["causal-lm"].classes["llama"] == "LlamaForCausalLM"
    assert TASKS["classification"].classes["bert"] == "BertForSequenceClassification"
    assert TASKS["seq2seq-lm"].classes["t5"] == "T5ForConditionalGeneration"


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ("causal-lm", "llama"),
        ("causal-lm", "gpt2"),
        ("causal-lm", "mixtral"),
        ("classification", "bert"),
        ("seq2seq-lm", "t5"),
    ],
)
def test_each_strategy(task, architecture):
    subject = Subject.of(build_tiny(task, architecture))
    assert (subject.reloads, subject.remarks) == (True, [])
    assert subject.generates == (task != "classification")
    for strategy in ("magnitude", "ffn", "heads", "depth", "quantization"):
        note = "loads with llmcompress" if (architecture, strategy) in {("gpt2", "heads"), ("bert", "heads")} else ""
        assert check(strategy, subject) == Outcome("verified", note)
    assert check("experts", subject).status == ("verified" if architecture == "mixtral" else "absent")


# What the matrix has shown of the anatomy, one architecture for each cause.
@pytest.mark.parametrize(
    ("architecture", "strategy", "status", "note"),
    [
        ("gemma3_text", "heads", "verified", ""),  # block 2 is not two key heads: its index stays
        ("megatron-bert", "heads", "verified", "loads with llmcompress"),  # all_head_size is no size of one head
        ("olmo2", "heads", "verified", ""),  # norms over all heads, as wide as the hidden size
        ("bitnet", "ffn", "verified", ""),  # a norm over the channels
        ("afmoe", "heads", "verified", ""),  # a gate beside the output projection
        ("qwen3_next", "heads", "verified", ""),  # a gate in q; linear attentions take turns, and stay
        ("jamba", "ffn", "verified", ""),  # blocks of two classes
        ("gpt_oss", "ffn", "verified", ""),  # a bias for each expert
        ("bloom", "ffn", "verified", "loads with llmcompress"),
        ("gemma3", "depth", "verified", ""),  # a tower of images
        ("mamba2", "depth", "verified", ""),  # two ends of a range are no list of two blocks
        ("diffllama", "heads", "refused", "what one head computes changes others"),
        ("bloom", "heads", "refused", "does not run with fewer"),
        ("kimi_linear", "heads", "refused", "a convolution runs over queries"),
        ("mamba", "heads", "refused", "no attention"),
        ("gpt_oss", "quantization", "verified", ""),  # experts the other way round, with biases
        ("dbrx", "quantization", "verified", "of the matrices stay in float"),  # experts of all kinds in one matrix
        ("mamba", "quantization", "verified", ""),  # weights read past their layer
        ("rwkv", "quantization", "verified", ""),  # weights divided at the first call
    ],
)
def test_what_the_matrix_has_shown(architecture, strategy, status, note):
    if architecture not in TASKS["causal-lm"].classes:
        pytest.skip(f"this transformers has no {architecture}")
    outcome = check(strategy, Subject.of(build_tiny("causal-lm", architecture)))
    assert outcome.status == status, outcome.note
    assert note in outcome.note


def test_no_cut_leaves_a_cache_without_attention():
    model = build_tiny("causal-lm", "recurrent_gemma")
    with pytest.raises(lc.UnsupportedModelError, match="Keep a block with an attention"):
        lc.compress(model, lc.DepthPruning(layers=(0,)), progress=False)


def test_a_wrong_result_and_a_crash_are_failures(monkeypatch):
    subject = Subject.of(build_tiny("causal-lm", "llama"))

    def breaks_weights(subject):
        from llmcompress.support.checks import _cut

        def compress(model, context):
            lc.StructuredPruning(ffn=0.5).compress(model, context)
            model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
            return model

        return _cut(subject, compress)

    monkeypatch.setitem(STRATEGIES, "ffn", breaks_weights)
    monkeypatch.setitem(STRATEGIES, "heads", lambda subject: 1 / 0)
    assert check("ffn", subject).status == "failed"
    assert "differs from the masked one" in check("ffn", subject).note
    assert check("heads", subject) == Outcome("failed", "ZeroDivisionError: division by zero")


def test_what_does_not_build_says_why():
    with pytest.raises(NotBuiltError, match=r".+"):
        build_tiny("classification", "canine")


def test_patterns():
    jobs = choose_jobs(["bert", "llama"], ["f*"], ["causal*"])
    assert jobs == [Job("causal-lm", "bert", ("ffn",)), Job("causal-lm", "llama", ("ffn",))]
    with pytest.raises(lc.NothingToCompressError, match=r"--strategy must match a strategy .* got 'nope'"):
        choose_jobs(["bert"], ["nope"])


def test_no_option_is_named_that_there_is_none_of():
    with pytest.raises(lc.NothingToCompressError, match=r"^ARCHITECTURE must match an .*; did you mean 'llama'\?"):
        choose_jobs(["lama"])


def test_a_status_that_there_is_none_of_is_refused(tmp_path):
    with pytest.raises(lc.ConfigError, match=r"--retry must be one of .*, got 'fialed'; did you mean 'failed'\?"):
        run([], tmp_path / "out.jsonl", retry=["fialed"], progress=False)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(lc.CheckpointError, match="it is a folder"):
        run([Job("causal-lm", "works", ("a",))], tmp_path, progress=False, examine=None)


@pytest.mark.parametrize("content", [b'{"precious": 1}', b"a note", b"\xff\xfe"])
def test_another_file_is_not_cut(tmp_path, content):
    out = tmp_path / "out.json"
    out.write_bytes(content)
    with pytest.raises(lc.ConfigError, match="line 1 is none"):
        run([Job("causal-lm", "works", ("a",))], out, workers=1, progress=False, examine=misbehave)
    assert out.read_bytes() == content


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmcompress.support.matrix.run", lambda *_, **__: pytest.fail("worked"))
    assert main(["support", "llama", "--out", str(tmp_path / "out.jsonl"), "--page", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_the_page_tells_what_was_not_checked():
    note = "loads with llmcompress; the dense model's cache is not checked (ValueError: no cache)"
    entries = [Entry("causal-lm", name, "OneForCausalLM", "heads", "verified", note) for name in ("a", "b")]
    entries.append(Entry("causal-lm", "c", "OneForCausalLM", "heads", "verified", "loads with llmcompress"))
    text = page(entries)
    assert text.count("yes\\* |") == 3
    assert text.endswith(
        "### Remarks\n\n- heads: a, b: the dense model's cache is not checked (ValueError: no cache)\n"
    )


def test_the_page_of_the_documentation_says_what_is_checked():
    committed = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    assert committed.startswith(page([]).partition("Made with")[0])


def test_a_worker_that_hangs_or_dies_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("llmcompress.support.matrix._START_SECONDS", 60.0)
    jobs = [Job("causal-lm", name, ("a", "b", "c")) for name in ("hangs", "dies", "works")]
    out = tmp_path / "out.jsonl"
    entries = run(jobs, out, workers=2, timeout=2, progress=False, examine=misbehave)
    found = {(entry.architecture, entry.strategy): (entry.status, entry.note) for entry in entries}
    assert found.pop(("hangs", "b")) == ("failed", "no answer within 2 s")
    assert found.pop(("dies", "b")) == ("failed", "its process ended with exit code 7")
    assert len(found) == 7
    assert all(status == "verified" for status, _ in found.values())

    # A line cut in half is asked again, and nothing else.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:20])
    again = run(jobs, out, workers=1, timeout=60, progress=False, examine=misbehave)
    assert {entry.key for entry in again} == {entry.key for entry in entries}
    assert len(out.read_text().splitlines()) == len(lines)
    assert all(json.loads(line) for line in out.read_text().splitlines())


def test_one_real_run_with_two_workers(tmp_path):
    jobs = choose_jobs(["bert", "t5"], ["ffn"], ["classification", "seq2seq-lm"])
    entries = run(jobs, tmp_path / "out.jsonl", workers=2, timeout=60, progress=False)
    assert [(entry.model, entry.status) for entry in entries] == [
        ("BertForSequenceClassification", "verified"),
        ("T5ForSequenceClassification", "verified"),
        ("T5ForConditionalGeneration", "verified"),
    ]
    assert run(jobs, tmp_path / "out.jsonl", progress=False, examine=None) == entries


def test_entries_of_other_versions_do_not_count(tmp_path):
    from dataclasses import replace

    out = tmp_path / "out.jsonl"
    entry = run([Job("causal-lm", "works", ("a",))], out, workers=1, progress=False, examine=misbehave)[0]
    append_entries(out, [replace(entry, strategy="b", versions={"torch": "1.0"})])
    assert list(read_entries(out)) == [entry.key]
    out.write_text("no entry\n")
    with pytest.raises(lc.ConfigError, match="line 1 is none"):
        read_entries(out)
