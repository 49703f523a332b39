import random

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer


def _compress(model, steps, **inputs):
    return lc.compress(model, steps, progress=False, **inputs)


@pytest.fixture
def bert():
    return tiny_model("bert")


def test_steps_by_object_name_and_dict(bert):
    result = _compress(bert, [{"name": "magnitude_pruning", "sparsity": 0.25}, "dynamic_quantization"])
    assert [record.step["name"] for record in result.report.steps] == ["magnitude_pruning", "dynamic_quantization"]
    assert result.report.steps[0].step["sparsity"] == 0.25
    text = str(result)
    assert "magnitude_pruning" in text
    assert "left alone" in text
    assert "<table" in result._repr_html_()


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (["magnitude_prunning"], lc.UnknownNameError, "did you mean 'magnitude_pruning'"),
        ([{"name": "magnitude_pruning", "sparsity": 1.5}], lc.ConfigError, r"sparsity must be in \(0, 1\), got 1\.5"),
        ([{"name": "magnitude_pruning", "sparsity": True}], lc.ConfigError, "sparsity must be a number, got True"),
        ([{"name": "magnitude_pruning", "sparsit": 0.5}], lc.ConfigError, "did you mean 'sparsity'"),
        ([lc.DynamicQuantization(), lc.MagnitudePruning()], lc.PipelineOrderError, "put DynamicQuantization last"),
        ([lc.DynamicQuantization(), lc.DynamicQuantization()], lc.PipelineOrderError, "cannot follow"),
        (
            [lc.Pipeline(steps=[lc.DynamicQuantization()]), lc.StructuredPruning()],
            lc.PipelineOrderError,
            "StructuredPruning cannot follow DynamicQuantization",
        ),
        ([], lc.ConfigError, "at least one step"),
        ([lc.MagnitudePruning(targets=("*.nope",))], lc.NothingToCompressError, "nope.*it has"),
        ([lc.MagnitudePruning(), lc.KnowledgeDistillation()], lc.MissingInputError, "needs data"),
        (42, lc.ConfigError, "steps must be"),
    ],
)
def test_bad_steps_are_refused_and_nothing_changes(bert, steps, error, message):
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    with pytest.raises(error, match=message):
        _compress(bert, steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())


def test_bad_inputs_are_refused(bert, tmp_path):
    distil = lc.KnowledgeDistillation(steps=1)
    with pytest.raises(lc.MissingInputError, match="data is empty"):
        _compress(bert, distil, data=[])
    with pytest.raises(lc.MissingInputError, match="needs a tokenizer"):
        _compress(bert, distil, data=["a text"])
    taught = lc.KnowledgeDistillation(steps=1, teacher=bert, student="layers:1", alpha=1.0)
    with pytest.raises(lc.ConfigError, match="teacher must stay as it is, got the model that inplace=True changes"):
        _compress(bert, taught, inplace=True, data=["a text"], tokenizer=tiny_tokenizer())
    with pytest.raises(lc.ConfigError, match="resume_dir or inplace"):
        _compress(bert, lc.MagnitudePruning(), inplace=True, resume_dir=tmp_path)
    for inputs, told in (
        ({"task": "test.csv"}, "compress.task must be a Task"),
        ({"seed": 1.5}, "compress.seed must be an int"),
    ):
        with pytest.raises(lc.ConfigError, match=told):
            _compress(bert, lc.MagnitudePruning(), **inputs)
    with pytest.raises(lc.ConfigError, match=r"compress\.model must be a transformers model, .* got 5"):
        _compress(5, lc.MagnitudePruning())
    quantized = _compress(bert, lc.DynamicQuantization()).model
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        _compress(quantized, lc.MagnitudePruning())
    with pytest.raises(lc.CheckpointError, match="no checkpoint"):
        _compress(tmp_path, lc.MagnitudePruning())
    with pytest.raises(lc.UnsupportedModelError):
        _compress(
            tiny_model("llama"),
            lc.MagnitudePruning(),
            task=lc.TextClassification([("a", 0)]),
            tokenizer=tiny_tokenizer(),
        )


def test_what_a_later_step_cannot_take_is_refused_before_the_first_one_runs(monkeypatch):
    monkeypatch.setattr(lc.StructuredPruning, "compress", lambda *_: pytest.fail("a step has run"))
    steps = [lc.StructuredPruning(ffn=0.4), lc.WeightOnlyQuantization(bits=4, group_size=32)]
    with pytest.raises(lc.ConfigError, match=r"group_size=32 must divide .* has 80"):
        _compress(tiny_model("llama"), steps)


def test_later_steps_are_planned_on_what_the_earlier_ones_leave(bert):
    data, cut = [("a cat", 0), ("the dog", 1)] * 2, lc.DepthPruning(layers=(1,))
    steps = [cut, lc.KnowledgeDistillation(steps=1, max_length=8, features={"hidden": 1.0}, layers=(1,))]
    given = {"data": data, "tokenizer": tiny_tokenizer()}
    assert len(_compress(bert, steps, **given).report.steps) == len(lc.plan(bert, steps, **given).steps) == 2
    steps[1] = steps[1].model_copy(update={"layers": (0, 1)})
    for run in (_compress, lc.plan):
        with pytest.raises(lc.ConfigError, match="for each of the student's 1 blocks"):
            run(bert, steps, **given)


def test_a_student_that_takes_the_models_place_has_to_be_first(bert):
    student = lc.KnowledgeDistillation(steps=1, student={"num_hidden_layers": 1})
    with pytest.raises(lc.PipelineOrderError, match="what MagnitudePruning does is lost; put KnowledgeDistillation"):
        _compress(bert, [lc.MagnitudePruning(), student], data=["a cat"], tokenizer=tiny_tokenizer())


def test_a_step_that_is_not_recovered_is_told_in_a_nested_pipeline_too():
    model, data = tiny_model("llama"), ["the cat sat on a mat"] * 4
    recover = lc.KnowledgeDistillation(steps=1, alpha=1.0, max_length=8)
    chain = lc.Pipeline(steps=lc.GPTQ(bits=4, group_size=32), recover=recover)
    for asked in (chain, lc.Pipeline(steps=[chain])):
        report = _compress(model, asked, data=data, tokenizer=tiny_tokenizer()).report
        assert sum("not recovered" in (action.reason or "") for action in report.steps[-1].left) == 1


def test_places_that_cannot_be_written_are_told(bert, tmp_path):
    (tmp_path / "file").write_text("")
    result = _compress(bert, lc.MagnitudePruning())
    task = lc.TextClassification([("a cat", 0)], tokenizer=tiny_tokenizer())
    found = lc.compare({"base": bert, "small": result}, task, latency=False, progress=False)
    pipeline = lc.Pipeline(steps=lc.MagnitudePruning())
    for write, name in (
        (result.save_pretrained, "folder"),
        (found.save, "report.html"),
        (pipeline.to_yaml, "recipe.yaml"),
        (lambda place: _compress(bert, pipeline, resume_dir=place), "stages"),
    ):
        with pytest.raises(lc.CheckpointError, match=rf"{name} cannot be written: .*file"):
            write(tmp_path / "file" / name)
    with pytest.raises(lc.ConfigError, match=r"resume_dir must be a folder, got .*file"):
        _compress(bert, pipeline, resume_dir=tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_tokenizer_by_name_is_refused_though_no_step_needs_one(bert):
    with pytest.raises(lc.ConfigError, match="tokenizer must be a tokenizer of transformers, got 'bert'"):
        lc.compress(bert, lc.MagnitudePruning(), tokenizer="bert", progress=False)


def test_wrapped_models_are_refused_with_the_way_out(bert):
    peft = pytest.importorskip("peft")
    wrapped = {
        "pass model._orig_mod": torch.compile(bert),
        "pass model.module": torch.nn.DataParallel(bert),
        "merge_and_unload": peft.get_peft_model(tiny_model("bert"), peft.LoraConfig(target_modules=["query"])),
    }
    for way, model in wrapped.items():
        with pytest.raises(lc.ConfigError, match=rf"compress\.model must be .*, got a \w+; .*{way}"):
            lc.compress(model, lc.DynamicQuantization())


def test_adapters_are_to_be_merged_first(bert):
    peft = pytest.importorskip("peft")
    bert.add_adapter(peft.LoraConfig(target_modules=["query"]))
    for work in (lc.compress, lc.plan):
        with pytest.raises(lc.UnsupportedModelError, match=r"adapters of peft \(default\).*merge them first"):
            work(bert, lc.DynamicQuantization())


def test_a_head_that_the_config_does_not_tell_is_told_before_and_after(bert):
    bert.classifier = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
    planned = lc.plan(bert, lc.MagnitudePruning())
    done = lc.compress(bert, lc.MagnitudePruning(), progress=False).report
    for step in (planned.steps[0], done.steps[0]):
        [told] = [action.reason for action in step.left if "will not load" in (action.reason or "")]
        assert "classifier.0 is a module of only one of the two" in told


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_that_need_gradients_work_in_any_mode_of_the_caller(mode):
    data = tiny_data(tiny_model("bert"))
    with mode():
        model = tiny_model("bert")
        steps = [lc.StructuredPruning(ffn=0.5, importance="taylor"), lc.KnowledgeDistillation(steps=1)]
        result = lc.compress(model, steps, data=data, tokenizer=tiny_tokenizer(), progress=False)
        assert not torch.is_grad_enabled()
    assert result.model.config.intermediate_size < model.config.intermediate_size


def test_inplace_changes_the_model_itself(bert):
    assert _compress(bert, lc.MagnitudePruning(), inplace=True).model is bert
    assert float((bert.bert.encoder.layer[0].output.dense.weight == 0).float().mean()) == 0.5


def test_the_callers_random_state_is_not_touched(bert):
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    _compress(bert, lc.KnowledgeDistillation(steps=1, max_length=8), data=tiny_data(bert), tokenizer=tiny_tokenizer())
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_scores_before_and_after_each_step(bert):
    task = lc.TextClassification(tiny_data(bert), tokenizer=tiny_tokenizer())
    report = _compress(bert, [lc.StructuredPruning(), lc.DynamicQuantization()], task=task).report
    assert report.base_score.metrics.keys() == report.steps[1].score.metrics.keys()
    assert lc.Report.model_validate_json(report.model_dump_json()) == report
    assert "accuracy" in str(report)


def test_saved_folder_tells_the_recipe(bert, tmp_path):
    from llmcompress.checkpoint import read_metadata

    folder = _compress(bert, lc.StructuredPruning(), tokenizer=tiny_tokenizer()).save_pretrained(tmp_path / "out")
    metadata = read_metadata(folder)
    assert metadata["recipe"]["steps"][0]["name"] == "structured_pruning"
    assert {"torch", "transformers", "llmcompress"} <= set(metadata["versions"])
    # The folder serves as input again, with its tokenizer.
    again = _compress(folder, lc.MagnitudePruning())
    assert again.tokenizer is not None
    assert again.model.config.intermediate_size == 64


def test_yaml_round_trip_and_refusals(tmp_path):
    chain = lc.Pipeline(
        steps=[lc.StructuredPruning(ffn=0.25), lc.KnowledgeDistillation(epochs=1), "dynamic_quantization"]
    )
    chain.to_yaml(tmp_path / "recipe.yaml")
    assert lc.Pipeline.from_yaml(tmp_path / "recipe.yaml") == chain
    with pytest.raises(lc.ConfigError, match="no recipe"):
        lc.Pipeline.from_yaml(tmp_path / "absent.yaml")
    for text in ("{", "- 1", "steps: []", "name: pipeline\nstep: []", "!!python/object:os.system {}"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(lc.ConfigError):
            lc.Pipeline.from_yaml(tmp_path / "bad.yaml")


def test_broken_outputs_are_withheld(bert):
    class Break(lc.Compressor):
        def compress(self, model, context):
            model.classifier.weight.data.fill_(float("nan"))
            return model

        def to_dict(self):
            return {"name": "break"}

    with pytest.raises(lc.VerificationError, match="Break left BertForSequenceClassification with NaN"):
        _compress(bert, Break())


def test_what_is_frozen_stays_so_in_a_run_that_goes_on(bert, tmp_path, monkeypatch):
    steps = [lc.StructuredPruning(), lc.KnowledgeDistillation(steps=2, max_length=8, learning_rate=1e-2)]
    inputs = {"data": tiny_data(bert), "tokenizer": tiny_tokenizer()}
    words = bert.get_input_embeddings().weight.requires_grad_(False)
    try:
        whole = _compress(bert, steps, **inputs).model

        def killed(self, model, context):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(lc.KnowledgeDistillation, "compress", killed)
            with pytest.raises(KeyboardInterrupt):
                _compress(bert, steps, resume_dir=tmp_path, **inputs)
        resumed = _compress(bert, steps, resume_dir=tmp_path, **inputs).model
        words.requires_grad_(True)
        with monkeypatch.context() as patch:
            # Its stages are not those of a model that is trained whole.
            patch.setattr(lc.StructuredPruning, "compress", killed)
            with pytest.raises(KeyboardInterrupt):
                _compress(bert, steps, resume_dir=tmp_path, **inputs)
    finally:
        words.requires_grad_(True)
    assert torch.equal(resumed.get_input_embeddings().weight, words)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_resume_continues_behind_the_last_stage(bert, tmp_path, monkeypatch):
    steps = [
        lc.StructuredPruning(),
        lc.KnowledgeDistillation(steps=2, features={"hidden": 1.0}, max_length=8),
        lc.DynamicQuantization(),
    ]
    inputs = {"data": tiny_data(bert), "tokenizer": tiny_tokenizer()}
    whole = _compress(bert, steps, **inputs)

    def killed(self, model, context):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lc.DynamicQuantization, "compress", killed)
        with pytest.raises(KeyboardInterrupt):
            _compress(bert, steps, resume_dir=tmp_path, **inputs)
    assert len(list(tmp_path.glob("0*"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(lc.KnowledgeDistillation, "compress", killed)
        patch.setattr(lc.StructuredPruning, "compress", killed)
        resumed = _compress(bert, steps, resume_dir=tmp_path, **inputs)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert [r.step for r in resumed.report.steps] == [r.step for r in whole.report.steps]
    # Another seed is another run.
    with monkeypatch.context() as patch:
        patch.setattr(lc.StructuredPruning, "compress", killed)
        with pytest.raises(KeyboardInterrupt):
            _compress(bert, steps, seed=1, resume_dir=tmp_path, **inputs)


@pytest.mark.timed
def test_the_report_tells_what_each_step_gave(bert):
    steps = [lc.MagnitudePruning(), lc.StructuredPruning(ffn=0.5), lc.DynamicQuantization()]
    report = _compress(bert, steps).report
    zeros, cut, codes = report.steps
    assert zeros.footprint.disk_bytes == report.base.disk_bytes > cut.footprint.disk_bytes
    assert all(record.speedup.low <= record.speedup.ratio <= record.speedup.high for record in report.steps)
    assert report.speedup == codes.speedup
    told = [line for line in report.remarks() if line.startswith("magnitude_pruning")]
    assert any("0 % smaller on disk" in line for line in told)
    assert any(line.startswith(f"structured_pruning: {cut.speedup.ratio:.2f}x the base") for line in report.remarks())


@pytest.mark.timed
def test_training_alone_is_not_timed(bert):
    steps = [lc.StructuredPruning(ffn=0.5), lc.KnowledgeDistillation(steps=1, precision="fp32")]
    report = _compress(bert, steps, data=tiny_data(bert), tokenizer=tiny_tokenizer()).report
    assert report.steps[0].speedup is not None
    assert report.steps[1].speedup is None
    assert report.speedup is not None
    assert _compress(bert, lc.MagnitudePruning(), inplace=True).report.steps[0].speedup is None
