"""A teacher's answers on disk: as good as the teacher, made once, resumed after a kill, never taken for another's."""

import copy
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock

import llmcompress as lc
from llmcompress.compressor import Context
from llmcompress.data import Span
from llmcompress.distillation import teachers
from llmcompress.distillation.answers import Answers, likeliest
from llmcompress.distillation.batches import collate, make_rows
from llmcompress.distillation.cache_store import Array, begin
from llmcompress.distillation.cached_teacher import cached_teacher
from llmcompress.distillation.heads import model_inputs
from llmcompress.distillation.losses.divergences import forward_kl, reverse_kl
from llmcompress.distillation.objective import Objective
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

FIELDS = {"batch_size": 8, "max_length": 24, "precision": "fp32", "learning_rate": 1e-3, "steps": 4}


def distil(original, *, student=None, data=None, **fields):
    context = Context(
        data=tiny_data(original, 24) if data is None else data,
        tokenizer=tiny_tokenizer(),
        teacher=original,
        progress=False,
    )
    start = tiny_model_of(original) if student is None else student
    return lc.KnowledgeDistillation(**{**FIELDS, **fields}).compress(start, context), context


def tiny_model_of(teacher):
    torch.manual_seed(5)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def moved(model, start):
    return torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]).detach()


def entries(folder):
    return sorted(path for path in Path(folder).iterdir() if path.is_dir())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_with_all_classes_a_cached_run_is_a_live_one(family, tmp_path):
    teacher = tiny_model(family)
    fields = {"features": {"hidden": 1.0, "embeddings": 0.1}, "alpha": 0.7}
    cache = lc.TeacherCache(folder=tmp_path, top_k=128, hidden=(0, 1, 2), dtype="float32")
    start = tiny_model_of(teacher)
    live, cached = (
        moved(distil(teacher, student=copy.deepcopy(start), **fields, **more)[0], start)
        for more in ({}, {"cache": cache})
    )
    assert float(live.norm()) > 1e-2
    assert float((live - cached).norm()) < 0.02 * float(live.norm())
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_answers_in_bfloat16_are_kept_too(dtype, tmp_path):
    # In which `precision="auto"` has the teacher answer on processors with AMX.
    original = tiny_model("bert")
    cache = lc.TeacherCache(folder=tmp_path, hidden=(1, 2), dtype=dtype)
    start = tiny_model_of(original)
    fields = {"precision": "bf16", "features": {"hidden": 1.0}}
    live, cached = (
        moved(distil(original, student=copy.deepcopy(start), **fields, **more)[0], start)
        for more in ({}, {"cache": cache})
    )
    assert float((live - cached).norm()) < 0.3 * float(live.norm())


def test_a_bucket_for_the_rest_is_one_class_more_by_brute_force():
    torch.manual_seed(0)
    ours, theirs = 3 * torch.randn(6, 9).double(), 3 * torch.randn(6, 9).double()
    answers = likeliest(theirs, 3, 2.0)
    for loss, turned in ((forward_kl, False), (reverse_kl, True)):
        total = 0.0
        for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
            p, q = ([math.exp(value / 2.0) for value in one] for one in (other, mine))
            p, q = ([value / sum(one) for value in one] for one in (p, q))
            best = sorted(range(9), key=lambda index: -p[index])[:3]
            rest = [index for index in range(9) if index not in best]
            p, q = ([one[index] for index in best] + [sum(one[index] for index in rest)] for one in (p, q))
            p, q = (q, p) if turned else (p, q)
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        found = loss(*answers.beside(ours, 2.0), temperature=2.0)
        assert float(found) == pytest.approx(4.0 * total / 6, rel=1e-4)


def test_the_rest_keeps_its_digits_where_the_likeliest_have_almost_all():
    logits = torch.tensor([[60.0, 0.0, 1.0]])
    kept = likeliest(logits, 1, 1.0)
    assert float(kept.logits[0, 1]) == pytest.approx(math.log(1 + math.e) - 60, rel=1e-5)
    ours, theirs = Answers(kept.logits, kept.tokens).beside(logits, 1.0)
    assert torch.allclose(ours, theirs)


def test_the_likeliest_tokens_teach_as_the_whole_vocabulary_does(tmp_path):
    teacher = tiny_model("llama")
    start = tiny_model_of(teacher)
    fields = {"alpha": 1.0, "steps": 60, "learning_rate": 3e-3}
    cache = lc.TeacherCache(folder=tmp_path, top_k=48)
    live, cached = (distil(teacher, student=copy.deepcopy(start), **fields, **m)[0] for m in ({}, {"cache": cache}))
    inputs = tiny_tokenizer()([example.text for example in tiny_data(teacher, 24)], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        target = teacher(**inputs).logits.log_softmax(-1)
        gaps = [
            float((target.exp() * (target - model.eval()(**inputs).logits.log_softmax(-1))).sum(-1).mean())
            for model in (start, live, cached)
        ]
    assert gaps[1] < 0.5 * gaps[0]
    assert gaps[2] < gaps[1] + 0.1 * gaps[0]
    about = json.loads((entries(tmp_path)[0] / "about.json").read_text())
    assert about["arrays"]["tokens"] == {
        "dtype": "uint16",
        "width": 48,
        "entries": about["arrays"]["tokens"]["entries"],
    }
    assert sum(path.stat().st_size for path in entries(tmp_path)[0].glob("*.bin")) == pytest.approx(
        about["arrays"]["answers"]["entries"] * (49 * 2 + 48 * 2), abs=100
    )


def test_a_pass_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    teacher = tiny_model("bert")
    asked = []
    original = teachers.LiveTeacher.__call__

    def counted_call(self, batch, limit=[2]):  # noqa: B006 - the limit is meant to be one object
        if len(asked) == limit[0]:
            limit[0] = -1
            raise KeyboardInterrupt
        asked.append(batch["row"].tolist())
        return original(self, batch)

    monkeypatch.setattr(teachers.LiveTeacher, "__call__", counted_call)
    cache = lc.TeacherCache(folder=tmp_path, dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, cache=cache)
    assert [path.suffix for path in entries(tmp_path)] == [".partial"]
    before = len(asked)
    start = tiny_model_of(teacher)
    resumed = moved(distil(teacher, student=copy.deepcopy(start), cache=cache)[0], start)
    rows = [row for batch in asked[before:] for row in batch]
    assert len(rows) == 24 - 8  # only the first batch, whose files tell what is there, is asked again
    asked.clear()
    live = moved(distil(teacher, student=copy.deepcopy(start))[0], start)
    assert float((live - resumed).norm()) < 0.02 * float(live.norm())
    asked.clear()
    distil(teacher, cache=cache)
    assert asked == []


def test_of_several_that_ask_at_once_one_writes_and_the_others_wait(tmp_path):
    teacher, passes = tiny_model("bert"), []
    objective = Objective("classification")
    rows = make_rows("classification", teacher, tiny_tokenizer(), tiny_data(teacher, 16), max_length=24, labelled=False)

    @contextmanager
    def live():
        passes.append(1)
        time.sleep(0.3)
        with teachers.asking([teachers.Member(teacher, 1.0, objective)], autocast=False) as ask:
            yield ask

    def read(_):
        found = cached_teacher(
            live, lc.TeacherCache(folder=tmp_path), "entry", {}, rows, objective,
            collator=collator, temperature=1.0, batch_size=8, progress=False,
        )  # fmt: skip
        return found(collator(rows)).answers.logits

    collator = partial(collate, "classification", pad=0)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(read, range(3)))
    assert len(passes) == 1
    with torch.no_grad():
        expected = teacher(**model_inputs(collator(rows))).logits
    assert all(torch.allclose(one.float(), expected, atol=1e-3) for one in answers)


def test_an_entry_belongs_to_one_teacher_one_set_of_rows_and_one_temperature(tmp_path):
    teacher = tiny_model("llama")
    cache = lc.TeacherCache(folder=tmp_path, top_k=8)
    distil(teacher, cache=cache, steps=1)
    distil(teacher, cache=cache, steps=2, learning_rate=1e-2, alpha=0.2, student=tiny_model("llama", seed=4))
    assert len(entries(tmp_path)) == 1
    distil(tiny_model("llama", seed=1), cache=cache, steps=1)
    distil(teacher, cache=cache, steps=1, data=tiny_data(teacher, 8))
    distil(teacher, cache=cache, steps=1, temperature=3.0)
    assert len(entries(tmp_path)) == 4
    for path in entries(tmp_path):
        (path / "answers.bin").write_bytes(b"")
    with pytest.raises(lc.CheckpointError, match="damaged cache"):
        distil(teacher, cache=cache, steps=1)


def test_what_a_teacher_reads_with_its_own_tokenizer_makes_another_entry(tmp_path):
    reader = tiny_tokenizer()
    reader.add_tokens(["é", "ö"])
    teacher = tiny_model("bert", seed=1)
    teacher.resize_token_embeddings(140, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "teacher")
    reader.save_pretrained(tmp_path / "teacher")
    cache = lc.TeacherCache(folder=tmp_path / "answers")
    for letter, count in (("é", 1), ("ö", 2), ("é", 2)):  # both are unknown to the student
        data = [lc.Example(f"{letter} cat", label=0), lc.Example(f"a {letter}", label=1)]
        distil(tiny_model("bert"), teacher=str(tmp_path / "teacher"), cache=cache, steps=1, data=data)
        assert len(entries(tmp_path / "answers")) == count


def test_a_teacher_in_memory_that_was_changed_is_another_one(tmp_path):
    teacher = tiny_model("bert", seed=1)
    step = lc.KnowledgeDistillation(teacher=teacher, cache=lc.TeacherCache(folder=tmp_path), **{**FIELDS, "steps": 1})
    model = tiny_model("bert")
    for count in (1, 2):
        context = Context(data=tiny_data(model, 8), tokenizer=tiny_tokenizer(), progress=False)
        step.compress(copy.deepcopy(model), context)
        assert len(entries(tmp_path)) == count
        with torch.no_grad():
            teacher.classifier.weight.mul_(2)


def test_hidden_states_are_kept_that_no_feature_compares_yet(tmp_path):
    teacher = tiny_model("t5")
    cache = lc.TeacherCache(folder=tmp_path, hidden=(0, 2))
    _, context = distil(teacher, cache=cache, steps=1)
    distil(teacher, cache=cache, steps=1, features={"hidden": 1.0}, layers="last")
    (entry,) = entries(tmp_path)
    about = json.loads((entry / "about.json").read_text())["arrays"]
    answers = about["answers"]["entries"] * cache.bytes_per_answer("seq2seq_lm", teacher.config.vocab_size)
    tokens = sum(about[f"hidden_{stack}_0"]["entries"] for stack in (0, 1))
    sizes = sum(path.stat().st_size for path in entry.glob("*.bin") if path.name != "done.bin")
    assert sizes == answers + tokens * cache.bytes_per_token(teacher.config.d_model)
    told = f"{answers // about['answers']['entries']} bytes an answer and {cache.bytes_per_token(64)} bytes a token"
    assert any(told in (action.reason or "") for action in context.told)
    planned = lc.KnowledgeDistillation(cache=cache, **FIELDS).plan(teacher, context)
    assert any(f"{told} that is read or written" == action.reason for action in planned)


def test_a_reader_of_questions_learns_squared_errors_from_a_cache_as_live(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = transformers.BertForQuestionAnswering(transformers.BertConfig(**sizes, intermediate_size=32)).eval()
    data = [lc.Example("who", "a cat sat", Span(2, 5)), lc.Example("who", "on a mat there sat a dog", Span(21, 24))]
    start = tiny_model_of(teacher)
    fields = {"soft": "mse", "alpha": 1.0, "max_length": 32, "data": data * 4, "dropout": 0.0}
    live, cached = (
        moved(distil(teacher, student=copy.deepcopy(start), **fields, **more)[0], start)
        for more in ({}, {"cache": lc.TeacherCache(folder=tmp_path)})
    )
    assert float(live.norm()) > 1e-2
    assert float((live - cached).norm()) < 0.05 * float(live.norm())


def test_entries_that_were_not_read_for_days_go_and_those_being_written_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "about.json").write_text("{}")
    cache = lc.TeacherCache(folder=tmp_path)
    distil(tiny_model("bert"), cache=cache, steps=1)
    distil(tiny_model("bert", seed=1), cache=cache, steps=1)
    first, second = [path for path in entries(tmp_path) if path.name != "mine"]
    long_ago = time.time() - 40 * 86_400
    for path in (first, second):
        os.utime(path / "about.json", (long_ago, long_ago))
    distil(tiny_model("bert"), cache=cache, steps=1)  # reads one of the two
    (gone,) = cache.remove_entries(unused_days=30)
    assert gone in (first, second)
    assert not gone.exists()
    (kept,) = {first, second} - {gone}
    with FileLock(kept.with_suffix(".lock")):
        assert cache.remove_entries() == []
    assert cache.remove_entries() == [kept]
    assert (tmp_path / "mine").exists()
    with pytest.raises(lc.ConfigError, match="unused_days must be at least 0"):
        cache.remove_entries(unused_days=-1)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mine", {}),
        ("0123456789abcdef01234567", {"rows": None}),
        ("0123456789abcdef01234567", {"arrays": None}),
        ("0123456789abcdef01234567", {"done.bin": None}),
        ("0123456789abcdef01234567", {"thesis.txt": "years of work"}),
        (".partial", {}),
    ],
)
def test_a_folder_that_is_no_entry_is_never_deleted(name, files, tmp_path):
    about = {"format_version": 1, "rows": 1, "arrays": {"answers": {}}}
    there = {"answers.bin": "", "done.bin": "", **files}
    about = {key: value for key, value in about.items() if key not in files}
    folder = tmp_path / name
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps(about))
    for file, text in there.items():
        if text is not None:
            (folder / file).write_text(text)
    assert lc.TeacherCache(folder=tmp_path).remove_entries() == []
    assert folder.exists()


def test_a_pass_that_was_killed_is_an_entry_that_can_be_deleted(tmp_path):
    folder = tmp_path / "0123456789abcdef01234567.partial"
    begin(folder, {"answers": Array("float16", 2, 3)}, 3, {})
    assert lc.TeacherCache(folder=tmp_path).remove_entries() == [folder]
    assert not folder.exists()


def test_a_teacher_whose_answers_are_there_is_not_loaded(tmp_path, monkeypatch):
    tiny_model("bert", seed=1).save_pretrained(tmp_path / "teacher")
    fields = {"teacher": str(tmp_path / "teacher"), "cache": lc.TeacherCache(folder=tmp_path / "cache")}
    teacher = tiny_model("bert")
    first, context = distil(teacher, student=copy.deepcopy(teacher), **fields)
    assert any("bytes" in (action.reason or "") for action in context.told)

    def refuse(*_):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("llmcompress.distillation.teaching.load_source", refuse)
    again, _ = distil(teacher, student=copy.deepcopy(teacher), **fields)
    assert torch.equal(first.classifier.weight, again.classifier.weight)


def test_what_a_cache_cannot_do_is_refused_in_the_plan(tmp_path):
    cache = lc.TeacherCache(folder=tmp_path, top_k=8)

    def refused(match, family="llama", error=lc.ConfigError, cache=cache, **fields):
        model = tiny_model(family)
        context = Context(tokenizer=tiny_tokenizer(), teacher=copy.deepcopy(model), data=tiny_data(model))
        with pytest.raises(error, match=match):
            lc.KnowledgeDistillation(cache=cache, **fields).plan(model, context)

    refused(r"TeacherCache.hidden must hold the hidden states \(1, 2\)", features={"hidden": 1.0})
    refused("keeps no relations", "bert", features={"relations": 1.0})
    refused("temperature must be one number", temperature=[4.0, 1.0])
    refused("soft must be", soft="mse")
    outside, within = (lc.TeacherCache(folder=tmp_path, hidden=hidden) for hidden in ((1, 99), (1,)))
    refused(r"hidden must name hidden states from 0 to 2 .* got \(1, 99\)", "bert", cache=outside)
    several = ["original", tiny_model("bert", seed=1)]
    refused("hidden must be left out with several teachers", "bert", cache=within, teacher=several)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("folder must be a folder, got .* is a file", "bert", cache=lc.TeacherCache(folder=folder))
    with pytest.raises(lc.ConfigError, match=r"TeacherCache.folder must name a folder, got ''"):
        lc.TeacherCache(folder="")
    with pytest.raises(lc.ConfigError, match=r"TeacherCache.hidden must name"):
        lc.TeacherCache(folder="x", hidden=(1, 1))
    with pytest.raises(lc.ConfigError, match=r"TeacherCache.top_k must be in \[1, inf\)"):
        lc.TeacherCache(folder="x", top_k=0)
