"""Image models: what Torch-Pruning's graph finds is cut, proven and reloaded; a graph that never returns is stopped."""

import copy
import itertools
import threading
import time
from importlib.util import find_spec

import pytest
import torch
import transformers
from torch.nn import functional

import llmcompress as lc
from llmcompress.anatomy.footprint import footprint
from llmcompress.anatomy.groups import cut, silence
from llmcompress.anatomy.probe import probe_inputs, probe_outputs, relative_error
from llmcompress.anatomy.sizes import shapes_of
from llmcompress.compressor import Context
from llmcompress.pruning.time_limit import within
from llmcompress.testing import IMAGE_FAMILIES, check_refusal, tiny_model

needs_torch_pruning = pytest.mark.skipif(
    find_spec("torch_pruning") is None,
    reason="torch-pruning is not installed: pip install 'llmcompress[torch-pruning]'",
)


def _compress(model, step):
    return lc.compress(model, step, progress=False)


@needs_torch_pruning
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_sizes_are_as_predicted_and_the_folder_loads(family, ratio, tmp_path):
    model = tiny_model(family)
    step = lc.TorchPruning(ratio=ratio, round_to=4)
    predicted = step.predicted_shapes(model)
    result = _compress(model, step)
    assert shapes_of(result.model) == predicted
    assert result.report.steps[0].footprint.parameters == footprint(result.model).parameters
    assert footprint(result.model).parameters < (1 - ratio / 2) * footprint(model).parameters
    result.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    inputs = probe_inputs(model)
    assert torch.equal(probe_outputs(loaded, inputs), probe_outputs(result.model, inputs))
    assert relative_error(probe_outputs(loaded, inputs), probe_outputs(model, inputs)) > 1e-2
    ours = {name: vars(module) for name, module in result.model.named_modules()}
    for name, module in loaded.named_modules():
        for attribute in ("in_channels", "out_channels", "groups", "num_features", "normalized_shape", "in_features"):
            assert getattr(module, attribute, None) == ours[name].get(attribute)


@needs_torch_pruning
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_plan_tells_the_sizes_of_the_run(family):
    steps = [lc.TorchPruning(), lc.TorchPruning(ratio=0.3, round_to=4), lc.DynamicQuantization()]
    plan = lc.plan(tiny_model(family), steps)
    run = _compress(tiny_model(family), steps)
    sizes = [(step.size.parameters, step.size.disk_bytes, step.size.memory_bytes) for step in plan.steps]
    measured = [step.footprint for step in run.report.steps]
    assert sizes == [(one.parameters, one.disk_bytes, one.memory_bytes) for one in measured]
    assert plan.steps[0].peak_bytes > plan.base.memory_bytes + plan.steps[0].size.memory_bytes
    assert "depend on the weights" in lc.plan(tiny_model(family), lc.TorchPruning(scope="global")).steps[0].estimated


@needs_torch_pruning
@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_equal_shares_stand_in_the_plain_config_and_others_do_not(family, tmp_path):
    result = _compress(tiny_model(family), lc.TorchPruning())
    assert result.model.config.hidden_sizes == [8, 16, 32]
    assert result.report.steps[0].left[-1].reason.startswith("the plain config tells the sizes (")
    result.model.save_pretrained(tmp_path / "plain")
    config = (tmp_path / "plain" / "config.json").read_text()
    assert "quantization_config" not in config
    uneven = _compress(tiny_model(family), lc.TorchPruning(scope="global", round_to=1))
    assert uneven.model.config.hidden_sizes == [16, 32, 64]
    assert uneven.model.config.quantization_config is not None


@needs_torch_pruning
def test_a_slice_of_a_resnet_is_the_network_without_these_channels():
    """By hand: a BatchNorm whose weight and bias are zero takes its channels out of the network."""
    model = tiny_model("resnet")
    inside = "resnet.encoder.stages.1.layers.1.layer.0"  # a group of its own: one convolution feeds the next
    others = (action.path for action in lc.TorchPruning().plan(model, Context()) if action.touched)
    step = lc.TorchPruning(skip=tuple(path for path in others if path != f"{inside}.convolution"))
    context = Context(progress=False)
    sliced = step.compress(copy.deepcopy(model), context)
    (entry,) = context.history
    assert (entry.path, entry.axis, entry.of, len(entry.kept)) == (f"{inside}.convolution", "channels", 32, 16)
    gone = sorted({*range(32)} - {*entry.kept})
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.get_parameter(f"{inside}.normalization.{name}")[gone] = 0
    assert relative_error(probe_outputs(sliced, probe_inputs(model)), probe_outputs(model, probe_inputs(model))) < 1e-5


@needs_torch_pruning
def test_batch_norm_statistics_and_depthwise_convolutions_are_cut_with_their_channels():
    resnet = _compress(tiny_model("resnet"), lc.TorchPruning()).model
    norm = resnet.resnet.embedder.embedder.normalization
    assert norm.num_features == len(norm.running_mean) == len(norm.running_var) == 8
    convnext = _compress(tiny_model("convnext"), lc.TorchPruning()).model
    depthwise = convnext.convnext.encoder.stages[0].layers[0].dwconv
    assert depthwise.in_channels == depthwise.out_channels == depthwise.groups == 8
    assert depthwise.weight.shape == (8, 1, 7, 7)
    assert convnext.train()(**probe_inputs(convnext)).logits.requires_grad


@needs_torch_pruning
@pytest.mark.parametrize("importance", ["magnitude", "lamp", "fpgm", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_importance_works_in_every_scope(importance, scope):
    model = tiny_model("convnext")
    step = lc.TorchPruning(ratio=0.5, importance=importance, scope=scope, round_to=1)
    first = _compress(model, step).model
    if importance == "random":
        inputs = probe_inputs(model)
        assert torch.equal(probe_outputs(first, inputs), probe_outputs(_compress(model, step).model, inputs))
    share = footprint(first).parameters / footprint(model).parameters
    assert 0.15 < share < 0.6


@needs_torch_pruning
def test_the_weakest_channels_go():
    model = tiny_model("resnet")
    block = model.resnet.encoder.stages[2].layers[0].layer
    with torch.no_grad():
        for tensor in (block[0].convolution.weight, block[0].normalization.weight, block[0].normalization.bias):
            tensor[::2] *= 1e-3
        block[1].convolution.weight[:, ::2] *= 1e-3
    context = Context(progress=False)
    lc.TorchPruning(ratio=0.5).compress(model, context)
    kept = {entry.path: entry.kept for entry in context.history}
    assert kept["resnet.encoder.stages.2.layers.0.layer.0.convolution"] == tuple(range(1, 64, 2))


@needs_torch_pruning
def test_what_must_stay_stays_and_is_told():
    left = {a.path: a.reason for a in _compress(tiny_model("vit"), lc.TorchPruning()).report.steps[0].left}
    assert left["classifier"] == "these are the model's outputs"
    assert "single channels cannot go" in left["vit.layers.0.attention.v_proj"]
    assert len(left) == 3
    grouped = transformers.RegNetForImageClassification(
        transformers.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
    ).eval()
    reasons = " ".join(action.reason or "" for action in _compress(grouped, lc.TorchPruning()).report.steps[0].left)
    assert "layer.1.convolution, a Conv2d whose channels cannot go one by one" in reasons
    skipped = lc.TorchPruning(skip=("resnet.embedder.*",))
    result = _compress(tiny_model("resnet"), skipped)
    assert {action.reason for action in result.report.steps[0].left} >= {"left out by skip"}
    assert result.model.resnet.embedder.embedder.convolution.out_channels == 16
    with pytest.raises(lc.ConfigError, match=r"skip must name layers .*, got 'embeder'; it has: .*embedder"):
        _compress(tiny_model("resnet"), lc.TorchPruning(skip=("embeder",)))


@needs_torch_pruning
def test_a_cut_of_the_wrong_channels_is_withheld(monkeypatch):
    calls = itertools.count()

    def wrong(model, group, keep):
        # The trials of each group come first; then the first real cut takes other channels.
        shifted = torch.arange(group.count)[-len(keep) :]
        cut(model, group, keep if next(calls) < trials else shifted)

    model = tiny_model("resnet")
    trials = sum(action.touched for action in lc.TorchPruning().plan(model, Context())) + 1  # the outputs are tried too
    monkeypatch.setattr("llmcompress.pruning.torch_pruning.cut", wrong)
    with pytest.raises(lc.VerificationError, match=r"sliced ResNetForImageClassification differs from the silenced"):
        lc.TorchPruning().compress(model, Context(progress=False))


@needs_torch_pruning
def test_a_graph_that_never_returns_is_stopped(monkeypatch):
    import torch_pruning

    def endless(self, *args, **kwargs):
        while True:
            pass

    monkeypatch.setattr(torch_pruning.DependencyGraph, "get_all_groups", endless)
    model = tiny_model("resnet")
    before = threading.active_count()
    with pytest.raises(lc.UnsupportedModelError, match=r"did not return within 0\.2 s; pass a larger time_limit"):
        _compress(model, lc.TorchPruning(time_limit=0.2))
    assert threading.active_count() == before  # the thread is gone, not left spinning


@needs_torch_pruning
def test_a_graph_that_fails_is_a_refusal(monkeypatch):
    import torch_pruning

    def failing(self, *args, **kwargs):
        raise IndexError("no such node")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", failing)
    check_refusal(lc.TorchPruning(), "convnext")
    with pytest.raises(
        lc.UnsupportedModelError, match=r"cannot follow ConvNext.*IndexError: no such node.*DepthPruning"
    ):
        _compress(tiny_model("convnext"), lc.TorchPruning())


@needs_torch_pruning
def test_damaged_weights_are_named():
    model = tiny_model("resnet")
    with torch.no_grad():
        model.resnet.encoder.stages[1].layers[0].layer[0].convolution.weight[0, 0] = torch.nan
    with pytest.raises(lc.CompressionError, match=r"NaN"):
        _compress(model, lc.TorchPruning())


def test_text_models_are_sent_to_structured_pruning():
    for family in ("gpt2", "llama"):
        with pytest.raises(lc.UnsupportedModelError, match=r"reads input_ids; use StructuredPruning"):
            _compress(tiny_model(family), lc.TorchPruning())


def test_convolutional_networks_are_sent_here():
    for family in ("resnet", "convnext"):
        with pytest.raises(lc.UnsupportedModelError):
            _compress(tiny_model(family), lc.StructuredPruning(heads=0.5, uniform=False))
    with pytest.raises(lc.UnsupportedModelError, match="TorchPruning works on convolutional networks"):
        _compress(tiny_model("resnet"), lc.StructuredPruning(ffn=0.5))


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setattr("llmcompress.pruning.dependency_graph.find_spec", lambda name: None)
    with pytest.raises(lc.PluginError, match=r"pip install 'llmcompress\[torch-pruning\]'"):
        _compress(tiny_model("resnet"), lc.TorchPruning())


@pytest.mark.timed
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_image_models_are_probed_timed_and_told_as_such(family):
    model = tiny_model(family)
    inputs = probe_inputs(model)
    assert inputs["pixel_values"].shape == (2, 3, 64 if family == "resnet" else 32, 64 if family == "resnet" else 32)
    result = _compress(model, lc.DynamicQuantization())
    assert result.report.speedup.tokens == 0
    assert "on 1 image, measured here" in str(result)
    with torch.no_grad():
        next(iter(model.parameters()))[0] = torch.nan
    assert not torch.isfinite(probe_outputs(model, inputs)).all()


def test_a_time_limit_returns_raises_and_stops():
    assert within(5, lambda: 42) == 42
    with pytest.raises(KeyError, match="mine"):
        within(5, lambda: {}["mine"])
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"no result within 0\.1 s"):
        within(0.1, lambda: [None for _ in iter(int, 1)])
    assert time.perf_counter() - start < 30
    seen = []
    with pytest.raises(TimeoutError):
        within(0.1, lambda: _swallows_exceptions(seen))
    count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count  # it runs no more


def _swallows_exceptions(seen):
    while True:
        try:
            seen.append(functional.relu(torch.zeros(1)))
        except Exception:
            continue


def test_silencing_and_cutting_of_a_convolution_agree_by_hand():
    from llmcompress.anatomy.groups import Group, Member

    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 2, 1)
    ).eval()
    channel = torch.arange(4)
    axes = [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0)]
    axes += [("2.weight", 0), ("2.bias", 0), ("3.weight", 1)]
    group = Group("channels", "0", 4, tuple(Member(name, axis, channel) for name, axis in axes))
    keep = torch.tensor([0, 3])
    images = torch.randn(1, 3, 5, 5)
    silence(net, group, keep)
    expected = net(images)
    cut(net, group, keep)
    assert torch.allclose(net(images), expected, atol=1e-6)
    assert (net[0].out_channels, net[1].num_features, net[2].groups, net[2].in_channels, net[3].in_channels) == (2,) * 5
