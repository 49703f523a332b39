"""A plan says what the run will do, to the last byte, and refuses what the run would refuse."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from llmcompress.planning.opening import open_weightless
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

CHAINS = {
    # Conv1D, tied.
    "gpt2": [lc.StructuredPruning(ffn=0.5), lc.DynamicQuantization(embeddings=False)],
    # Zeros decide how zero points are stored, and a cut takes some of them.
    "llama": [lc.MagnitudePruning(pattern="2:4"), lc.StructuredPruning(ffn=0.5), lc.GPTQ(group_size=32)],
    # 3-D experts, of which folders hold one tensor each.
    "mixtral": [
        lc.DepthPruning(layers=1),
        lc.StructuredPruning(experts=0.5),
        lc.WeightOnlyQuantization(group_size=24, indivisible="pad"),
    ],
    # A vocabulary that data choose; sizes that no plain config tells.
    "bert": [
        lc.VocabularyPruning(),
        lc.StructuredPruning(ffn=0.3, uniform=False),
        lc.StaticQuantization(outliers=None),
    ],
    "qwen3": [lc.KnowledgeDistillation(steps=1, student={"intermediate_size": 64}), lc.AWQ(group_size=32)],
}


def told(steps):
    return [(one.parameters, one.disk_bytes, one.memory_bytes) for one in steps]


@pytest.mark.parametrize("family", CHAINS)
def test_sizes_are_those_of_the_run(family, tmp_path):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    given = {"data": tiny_data(model), "tokenizer": tokenizer}
    before = copy.deepcopy(model.state_dict())
    plan = lc.plan(model, CHAINS[family], **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    bare = model.config
    bare.architectures = [type(model).__name__]
    other = lc.plan(bare if family == "bert" else tmp_path, CHAINS[family], **given)
    run = lc.compress(model, CHAINS[family], **given, progress=False)
    expected = told(record.footprint for record in run.report.steps)
    for found in (plan, other):
        assert told(step.size for step in found.steps) == expected
        assert not any(step.estimated for step in found.steps)
    for record, step in zip(run.report.steps, plan.steps, strict=True):
        assert {action.path for action in record.touched} >= {action.path for action in step.touched}
        if step.size.zeros is not None:
            assert step.size.zeros == pytest.approx(record.footprint.zeros, abs=0.01)
    run.save_pretrained(tmp_path / "out")
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) == expected[-1][1]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_is_foretold(kind):
    pytest.importorskip("bitsandbytes")
    model, step = tiny_model("mixtral"), lc.BitsAndBytesQuantization(kind=kind)
    plan, run = lc.plan(model, step), lc.compress(model, step, progress=False)
    assert told([plan.steps[0].size]) == told([run.report.steps[0].footprint])
    assert [one.loads for one in plan.loads_in] == [True, True, None, False]
    assert any("3-D experts" in (action.reason or "") for action in plan.steps[0].left)


def test_of_a_folder_only_the_config_is_read(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    step = lc.DynamicQuantization()
    plan = lc.plan(str(tmp_path), step)
    assert told([plan.base]) == told([lc.plan(lc.load(tmp_path), step).base])
    (tmp_path / "model.safetensors").unlink()
    assert lc.plan(tmp_path, step) == plan
    sizes = {"num_hidden_layers": 3, "hidden_size": 65536, "num_attention_heads": 512, "intermediate_size": 262144}
    big = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    assert lc.plan(big, "dynamic_quantization").steps[0].size.disk_bytes > 2e11
    assert open_weightless(big).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("error", "steps", "given"),
    [
        (lc.PipelineOrderError, ["dynamic_quantization", "magnitude_pruning"], {}),
        (lc.MissingInputError, ["gptq"], {}),
        (lc.MissingInputError, ["gptq"], {"data": ["a cat sat"]}),
        (lc.NothingToCompressError, [lc.MagnitudePruning(targets=("*.no_proj",))], {}),
        (lc.ConfigError, [lc.WeightOnlyQuantization(group_size=48)], {}),
        (lc.ConfigError, [], {}),
        (lc.UnknownNameError, ["magnitude_prunning"], {}),
    ],
)
def test_mistakes_are_those_of_the_run(error, steps, given):
    model = tiny_model("llama")
    with pytest.raises(error) as run:
        lc.compress(model, steps, **given, progress=False)
    with pytest.raises(error) as plan:
        lc.plan(model, steps, **given)
    assert str(plan.value).removeprefix("plan()") == str(run.value).removeprefix("compress()")


def test_what_is_quantized_is_refused(tmp_path):
    result = lc.compress(tiny_model("bert"), lc.DynamicQuantization(), progress=False)
    folder = result.save_pretrained(tmp_path / "int8")
    for model in (result.model, folder):
        with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
            lc.plan(model, lc.MagnitudePruning())
    with pytest.raises(lc.CheckpointError, match="no such folder"):
        lc.plan(tmp_path / "missing", lc.MagnitudePruning())
    with pytest.raises(lc.ConfigError, match="architectures"):
        lc.plan(LlamaConfig(), lc.MagnitudePruning())


def test_sizes_that_a_config_notes_are_planned_on(tmp_path):
    step = lc.StructuredPruning(ffn=0.3, uniform=False, round_to=1)
    narrow = lc.compress(tiny_model("bert"), step, progress=False)
    folder = narrow.save_pretrained(tmp_path / "narrow")
    plan = lc.plan(folder, lc.DynamicQuantization())
    run = lc.compress(narrow.model, lc.DynamicQuantization(), progress=False)
    assert told([plan.steps[0].size]) == told([run.report.steps[0].footprint])
    assert [one.loads for one in lc.plan(tiny_model("bert"), step).loads_in] == [False, True, False, None]


class Plugin(lc.Compressor):
    """Says nothing of the sizes it will leave."""

    def compress(self, model, context):
        return model


def test_a_step_that_foretells_nothing_is_told():
    lc.register("test_plan_plugin")(Plugin)
    plan = lc.plan(tiny_model("llama"), [Plugin(), lc.DynamicQuantization()])
    assert [step.size for step in plan.steps] == [None, None]
    assert plan.loads_in == []
    assert "not predicted" in str(plan)
    assert plan.steps[1].touched  # as planned on the model as it arrives


def test_the_document_is_a_tree_a_page_and_json():
    model = tiny_model("llama")
    chain = [lc.MagnitudePruning(), lc.DynamicQuantization()]
    plan = lc.plan(model, chain, tokenizer=tiny_tokenizer())
    assert lc.Plan.model_validate_json(plan.model_dump_json()) == plan
    text = str(plan)
    assert "├─ model.layers.0..1: self_attn.q_proj, self_attn.k_proj" in text
    assert "0 % smaller on disk, 0 % faster here" in text
    assert any(name in text for name in lc.kernels().used("int8_linear"))
    page = plan._repr_html_()
    assert page.count("<details") == 5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that torch's operators touched or made and that still live."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage.device.type != "cpu" or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize(
    "step",
    [
        lc.DynamicQuantization(),
        lc.DepthPruning(layers=1),
        lc.KnowledgeDistillation(steps=2, batch_size=4, max_length=64, precision="fp32"),
    ],
    ids=lambda step: type(step).__name__,
)
def test_peak_memory_is_within_a_quarter(step):
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()
    given = {"data": ["the quick brown fox jumps over the lazy dog " * 4] * 8, "tokenizer": tiny_tokenizer()}
    planned = lc.plan(model, step, **given).steps[0]
    with LiveBytes() as seen:
        lc.compress(model, step, **given, progress=False)
    assert planned.peak_bytes == pytest.approx(seen.peak, rel=0.25)
    assert planned.rough_seconds >= 0
