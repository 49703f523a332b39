"""Training itself: goes on after a kill with the same weights, stops early with the best, takes less memory."""

import copy
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import llmcompress as lc
from forks import needs_fork, wait_status
from llmcompress import resume
from llmcompress.compressor import Context
from llmcompress.data import Example
from llmcompress.distillation.checkpoints import last_checkpoint
from llmcompress.distillation.keep_best import KeepBest
from llmcompress.distillation.trainer import DistillationTrainer
from llmcompress.distillation.zeros import HeldZeros, pruned_weights
from llmcompress.testing import tiny_model, tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "by"]


def texts(count=24):
    import random

    draw = random.Random(0)
    return [(" ".join(draw.choices(WORDS, k=draw.randint(2, 6))), draw.randint(0, 1)) for _ in range(count)]


def run(resume_dir=None):
    """Prune and distil with dropout, accumulation and two and a half epochs: all that a restart could lose count of."""
    torch.set_num_threads(1)
    distil = lc.KnowledgeDistillation(
        epochs=2.5, batch_size=4, gradient_accumulation=2, learning_rate=1e-2, alpha=0.5, max_length=24,
        precision="fp32", early_stopping=lc.EarlyStopping(evaluations=4, patience=9, held_out=0.2),
    )  # fmt: skip
    chain = [lc.MagnitudePruning(pattern="2:4"), distil]
    return lc.compress(
        tiny_model("bert"), chain, data=texts(), tokenizer=tiny_tokenizer(), resume_dir=resume_dir, progress=False
    )


@needs_fork
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = run()
    assert max(module.p for module in whole.model.modules() if isinstance(module, torch.nn.Dropout)) > 0
    restore, done = HeldZeros.restore, []

    def kill(self):
        restore(self)
        done.append(None)
        if len(done) == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(HeldZeros, "restore", kill)
        assert wait_status(lambda: run(tmp_path)) == signal.SIGKILL
    (unfinished,) = tmp_path.glob("*.unfinished")
    kept = last_checkpoint(unfinished)
    assert kept is not None
    assert not [file.name for file in kept.iterdir() if file.name == "training_args.bin"]
    (kept.parent / "checkpoint-99").mkdir()  # one that the kill left half written
    again = run(tmp_path)
    assert again.report.steps[1].touched[-1] == whole.report.steps[1].touched[-1]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("scores", [None, (3.0, 1.0, 2.0, 2.5, 0.5)], ids=["the end", "an early stop"])
def test_a_run_that_was_killed_behind_its_last_step_takes_no_further_one(tmp_path, monkeypatch, scores):
    teacher = tiny_model("bert")
    step = lc.KnowledgeDistillation(
        steps=5, batch_size=4, max_length=24, learning_rate=1e-2, precision="fp32",
        early_stopping={"evaluations": 5, "patience": 2},
    )  # fmt: skip
    if scores is not None:
        monkeypatch.setattr(DistillationTrainer, "loss_on", lambda self, held: scores[self.state.global_step - 1])
    given = {"data": texts(), "tokenizer": tiny_tokenizer(), "progress": False}
    whole = lc.compress(teacher, step, **given)
    if scores is not None:
        assert "evaluated 3 at 1, 1 at 2, 2 at 3, 2.5 at 4; the best kept" in whole.report.steps[0].touched[-1].reason

    def kill(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            lc.compress(teacher, step, resume_dir=tmp_path, **given)
    again = lc.compress(teacher, step, resume_dir=tmp_path, **given)
    assert again.report.steps[0].touched == whole.report.steps[0].touched
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def distil(student, teacher, data=None, **fields):
    step = lc.KnowledgeDistillation(
        **{"steps": 6, "batch_size": 8, "max_length": 24, "precision": "fp32", "learning_rate": 3e-3, **fields}
    )
    context = Context(
        data=lc.load_examples(data or texts()), tokenizer=tiny_tokenizer(), teacher=teacher, progress=False
    )
    step.plan(student, context)
    return step.compress(student, context), context


def test_the_best_student_is_given_back_and_training_stops_without_a_better_one():
    teacher = tiny_model("bert")
    task = lc.TextClassification(texts())
    step = {"alpha": 0.0, "steps": 60, "learning_rate": 1e-2}
    stop = lc.EarlyStopping(task=task, patience=2, evaluations=30)
    student, context = distil(copy.deepcopy(teacher), teacher, early_stopping=stop, **step)
    told = context.told[-1].reason
    scores = [float(one.split(" at ")[0]) for one in told.split("evaluated ")[1].split(";")[0].split(", ")]
    found = task.evaluate(student, tiny_tokenizer(), progress=False).value
    assert found == pytest.approx(max(scores), abs=1e-3)
    assert len(scores) < 30
    assert scores.index(max(scores)) == len(scores) - 3
    assert found > task.evaluate(teacher, tiny_tokenizer(), progress=False).value


@pytest.mark.parametrize("higher", [True, False])
def test_a_score_that_is_no_number_is_worse_than_any_other(tmp_path, higher):
    model = torch.nn.Linear(1, 1)
    scores = iter([float("nan"), 0.5, float("nan"), 0.7 if higher else 0.3])
    keep = KeepBest(lc.EarlyStopping(evaluations=4, patience=2), model, lambda: (next(scores), higher))
    state = SimpleNamespace(max_steps=4, global_step=0, log_history=[])
    control, args = SimpleNamespace(should_training_stop=False), SimpleNamespace(output_dir=tmp_path, process_index=0)
    kept = []
    for step in range(1, 5):
        state.global_step = step
        torch.nn.init.constant_(model.weight, step)
        keep.on_step_end(args, state, control)
        keep.on_train_end(args, state, control)
        kept.append(model.weight.item())
    assert kept == [1, 2, 2, 4]
    assert not control.should_training_stop


@pytest.mark.parametrize(("steps", "evaluations", "expected"), [(11, 10, 10), (6, 4, 4), (3, 10, 3), (7, 1, 1)])
def test_there_are_as_many_evaluations_as_are_asked_for_and_the_last_is_at_the_end(
    tmp_path, steps, evaluations, expected
):
    keep = KeepBest(lc.EarlyStopping(evaluations=evaluations, patience=99), torch.nn.Linear(1, 1), lambda: (1.0, True))
    state = SimpleNamespace(max_steps=steps, global_step=0, log_history=[])
    for step in range(1, steps + 1):
        state.global_step = step
        keep.on_step_end(SimpleNamespace(output_dir=tmp_path, process_index=0), state, SimpleNamespace())
    at = [entry["step"] for entry in state.log_history]
    assert len(at) == expected
    assert at[-1] == steps
    distances = [later - earlier for earlier, later in zip([0, *at], at, strict=False)]
    assert max(distances) - min(distances) <= 1


def test_rows_too_few_to_hold_one_out_are_refused_before_the_teacher_is_asked(tmp_path):
    with pytest.raises(lc.ConfigError, match=r"EarlyStopping.held_out must have at least 2 rows to split, got 1"):
        distil(
            tiny_model("bert"), tiny_model("bert"), data=texts(1), early_stopping={},
            cache=lc.TeacherCache(folder=str(tmp_path / "answers")),
        )  # fmt: skip
    assert not (tmp_path / "answers").exists()


def test_a_recipe_tells_the_task_that_decides(tmp_path):
    file = tmp_path / "dev.tsv"
    file.write_text("good\t1\nbad\t0\n")
    step = lc.KnowledgeDistillation(steps=1, early_stopping=lc.EarlyStopping(task=lc.TextClassification(file)))
    recipe = step.to_dict()
    assert recipe["early_stopping"]["task"] == {"name": "text_classification", "data": str(file)}
    assert lc.compressors.create(recipe).to_dict() == recipe
    bare = lc.KnowledgeDistillation(steps=1, early_stopping=lc.EarlyStopping(task=lc.TextClassification([("good", 1)])))
    with pytest.raises(lc.ConfigError, match="must be passed as an object where its data is no file"):
        lc.compressors.create(bare.to_dict())
    with pytest.raises(lc.UnsupportedModelError, match="LanguageModeling needs"):
        distil(tiny_model("bert"), tiny_model("bert"), early_stopping={"task": lc.LanguageModeling(["a text to read"])})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_activations_that_are_computed_again_give_the_same_weights(family):
    teacher = tiny_model(family)
    kept, again = (
        distil(
            copy.deepcopy(teacher), tiny_model(family, seed=1), features={"hidden": 1.0}, gradient_checkpointing=wanted
        )[0]
        for wanted in (False, True)
    )
    moved = max(float((a - b).abs().max()) for a, b in zip(kept.parameters(), teacher.parameters(), strict=True))
    apart = max(float((a - b).abs().max()) for a, b in zip(kept.parameters(), again.parameters(), strict=True))
    assert apart < 1e-3 * moved
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.modules())
    assert set(vars(again)) == set(vars(teacher))


def test_low_rank_changes_are_added_to_the_weights_and_leave_the_rest_alone():
    pytest.importorskip("peft")
    teacher = tiny_model("llama")
    student = tiny_model("llama", seed=1)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    zeros = {name: int(zero.sum()) for name, _, zero in pruned_weights(student)}
    attributes = set(vars(student))
    result, context = distil(student, teacher, alpha=1.0, steps=30, lora=lc.LoRA(rank=4))
    assert {name: int(zero.sum()) for name, _, zero in pruned_weights(result)} == zeros
    assert [name for name, _ in result.named_parameters()] == [
        n for n in before if n in dict(result.named_parameters())
    ]
    assert set(vars(result)) == attributes
    assert all(parameter.requires_grad for parameter in result.parameters())
    for name, tensor in result.state_dict().items():
        change = tensor - before[name]
        assert bool(change.any()) == ("_proj" in name), name
        if "_proj" in name and "up_proj" not in name:
            assert int(torch.linalg.matrix_rank(change, tol=1e-5)) <= 4
    losses = [float(loss) for loss in context.told[-1].reason.split(";")[0].removeprefix("loss ").split(" -> ")]
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(lc.ConfigError, match="must have lora or quantize_for, got both"):
        lc.KnowledgeDistillation(lora={}, quantize_for="dynamic_quantization")
    with pytest.raises(lc.NothingToCompressError, match="whose name ends as one of"):
        lc.KnowledgeDistillation(steps=1, lora={"targets": ["nowhere"]}).plan(student, Context())


def test_the_dropout_of_low_rank_changes_is_their_own(monkeypatch):
    pytest.importorskip("peft")
    seen, teach = [], DistillationTrainer.teach

    def look(self, inputs):
        shares = {name: module.p for name, module in self.model.named_modules() if isinstance(module, torch.nn.Dropout)}
        seen.append({"lora" in name: share for name, share in shares.items()})
        return teach(self, inputs)

    monkeypatch.setattr(DistillationTrainer, "teach", look)
    distil(tiny_model("bert"), tiny_model("bert"), steps=1, dropout=0.0, lora=lc.LoRA(rank=2, dropout=0.3))
    assert seen == [{False: 0.0, True: 0.3}]


def test_without_peft_low_rank_changes_are_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(lc.MissingInputError, match=r"pip install llmcompress\[lora\]"):
        distil(tiny_model("llama"), tiny_model("llama"), lora={})


def test_a_loss_of_nan_names_its_rows():
    data = [Example("a", label=0.5), Example("bb", label=1e30), Example("cc", label=0.5)]
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32, num_labels=1))
    with pytest.raises(lc.CompressionError, match=r"got inf at step \d of 9 on the rows 1;"):
        distil(model, model, data=data, alpha=0.0, epochs=3, steps=None, batch_size=1)
