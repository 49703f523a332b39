"""Statistics of layers' inputs against hooks set by hand, blocks that change in between, and what is left behind."""

import copy
import gc
import logging
import tempfile

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, PretrainedConfig, PreTrainedModel, ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

from llmcompress.anatomy.layers import select, weight_layers
from llmcompress.anatomy.probe import probe_inputs
from llmcompress.calibration import InputNorms, InputProducts, block_by_block, calibration_batches, observe
from llmcompress.calibration.states import States
from llmcompress.compressor import Context
from llmcompress.data import Example
from llmcompress.errors import CompressionError, ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.testing import FAMILIES, tiny_data, tiny_model, tiny_tokenizer

DENSE = [family for family in FAMILIES if family != "mixtral"]


class Rows:
    """Keeps every input row: what a test compares, to the bit."""

    def __init__(self, layer=None):
        self.count, self._parts = 0, []

    def update(self, inputs):
        self.count += len(inputs)
        self._parts.append(inputs.clone())

    @property
    def rows(self):
        return torch.cat(self._parts)


def _layers(model, targets=None):
    return select(model, who="test", targets=targets)[0]


def _batches(model, texts=8, samples=128, max_length=512):
    context = Context(data=tiny_data(model, texts), tokenizer=tiny_tokenizer())
    return calibration_batches(model, context, who="test", samples=samples, max_length=max_length)


def _by_hand(model, batches):
    """Return the inputs of every linear layer, by hooks on a plain forward pass."""
    rows, handles, training = {}, [], model.training
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            rows[name] = []
            handles.append(
                module.register_forward_hook(
                    lambda _, args, __, name=name: rows[name].append(args[0].reshape(-1, args[0].shape[-1]).clone())
                )
            )
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items() if parts}


def _halve(layers):
    """Change weights in the rudest way that keeps activations finite: the first half of the rows becomes zero."""
    with torch.no_grad():
        for layer in layers:
            layer.weight[: max(len(layer.weight) // 2, 1)] = 0


def _traces(model):
    """Return whatever a pass could leave on the modules."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}: forward"] if "forward" in vars(module) else []
        found += [f"{name}: hook"] if module._forward_pre_hooks or module._forward_hooks else []
    return found


@pytest.mark.parametrize("family", DENSE)
def test_dense_statistics_equal_those_by_hand(family):
    model = tiny_model(family).train()
    batches, layers = _batches(model), _layers(model)
    before = copy.deepcopy(model.state_dict())
    norms = observe(model, batches, layers, InputNorms.of, who="test")
    products = observe(model, batches, layers, InputProducts.of, who="test")
    expected = _by_hand(model, batches)
    assert list(norms) == [layer.name for layer in layers]
    for name, [norm] in norms.items():
        rows = expected[name].double()
        assert norm.count == products[name][0].count == len(rows)
        torch.testing.assert_close(norm.norms().double(), rows.norm(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(products[name][0].products.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert model.training
    assert not _traces(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _experts_by_hand(model, batches):
    """Route by the module's own arguments, and compute the inputs of both matrices of each expert."""
    rows, handles = {}, []

    def hook(module, args, name):
        hidden, chosen, _ = args
        for expert in range(module.num_experts):
            # First the tokens whose first choice it is, then those whose second: the order of transformers' own loop.
            own = torch.cat([hidden[chosen[:, rank] == expert] for rank in range(chosen.shape[1])])
            gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            rows.setdefault(f"{name}.gate_up_proj", {}).setdefault(expert, []).append(own)
            rows.setdefault(f"{name}.down_proj", {}).setdefault(expert, []).append(module.act_fn(gate) * up)

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: hook(m, args, name)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(parts[expert]) for expert in sorted(parts)] for name, parts in rows.items()}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_get_a_statistic_each_whatever_computes_them(implementation):
    model = tiny_model("mixtral")
    model.set_experts_implementation(implementation)
    batches, layers = _batches(model), _layers(model)
    seen = observe(model, batches, layers, Rows, who="test")
    turns = {}
    for turn in block_by_block(model, batches, layers, Rows, who="test"):
        assert turn.unseen == ()
        turns.update(turn.statistics)
    assert model.config._experts_implementation == implementation
    by_hand = _experts_by_hand(model, batches)
    assert set(by_hand) == {layer.name for layer in layers if layer.kind == "experts"}
    for name, experts in by_hand.items():
        for found in (seen, turns):
            assert [one.count for one in found[name]] == list(map(len, experts))
            for one, rows in zip(found[name], experts, strict=True):
                torch.testing.assert_close(one.rows, rows, rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_token_reaches_counts_none():
    model = tiny_model("mixtral")
    for block in model.model.layers:
        # Top 2 of 4: a router of zeros but for two rows of opposite sign never chooses the other two... unless tied.
        block.mlp.gate.weight.data[3] = 0
        block.mlp.gate.weight.data[:3] *= 0
    batches = _batches(model)
    for turn in block_by_block(model, batches, _layers(model, ("*experts*",)), InputNorms.of, who="test"):
        for experts in turn.statistics.values():
            counts = [one.count for one in experts]
            assert sorted(counts)[:2] == [0, 0]
            assert sum(counts) == 2 * sum(batch["input_ids"].numel() for batch in batches)
            assert all(not one.squares.any() for one in experts if one.count == 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_all_experts_in_one_product(transposed):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, inputs):
            return torch.bmm(inputs, self.up) if transposed else (self.up.mT @ inputs.mT).mT

    from llmcompress.anatomy.layers import WeightLayer
    from llmcompress.calibration.listening import listen

    module = Experts()
    layer = WeightLayer("mlp", "up", "experts", "block", None, module)
    inputs = torch.randn(3, 6, 4)
    inputs[1, 2:] = 0  # routed elsewhere
    statistics = {"mlp.up": [Rows() for _ in range(3)]}
    with listen([layer], statistics, who="test"):
        module(inputs)
    assert [one.count for one in statistics["mlp.up"]] == [6, 2, 6]
    assert torch.equal(statistics["mlp.up"][1].rows, inputs[1, :2])


@pytest.mark.parametrize("memory_bytes", [None, 0, 20_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_see_what_the_changed_ones_put_out(family, memory_bytes):
    model = tiny_model(family)
    batches, layers = _batches(model), _layers(model)
    named = {layer.name: layer for layer in layers}
    names = []
    for turn in block_by_block(model, batches, layers, Rows, who="test", memory_bytes=memory_bytes):
        assert not turn.whole_passes
        expected = _by_hand(model, batches)
        if family == "mixtral":
            expected |= _experts_by_hand(model, batches)
        for name, statistics in turn.statistics.items():
            rows = expected[name] if isinstance(expected[name], list) else [expected[name]]
            for one, right in zip(statistics, rows, strict=True):
                torch.testing.assert_close(one.rows, right, rtol=1e-4, atol=1e-5)
                if family != "mixtral":
                    assert torch.equal(one.rows, right)
            names.append(name)
        _halve([named[name] for name in turn.statistics])
    assert sorted(names) == sorted(named)


@pytest.mark.parametrize("depth", [2, 5])
def test_every_block_runs_twice_whatever_the_depth(depth):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=depth))
    batches = _batches(model, texts=6)
    calls = [0] * depth
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    turns = block_by_block(model, batches, _layers(model), InputNorms.of, who="test")
    next(turns)
    first = calls[0] - len(batches)  # the short row: once plain, once or twice in the proof
    assert first <= 3
    list(turns)
    assert calls == [2 * len(batches) + first] * (depth - 1) + [len(batches) + first - 1]


def test_blocks_without_chosen_layers_have_no_turn_but_run():
    model = tiny_model("t5")
    batches = _batches(model)
    layers = [layer for layer in _layers(model) if layer.path.startswith(("encoder.block.1", "decoder.block.1"))]
    seen = []
    for turn in block_by_block(model, batches, layers, Rows, who="test"):
        expected = _by_hand(model, batches)
        assert all(torch.equal(one.rows, expected[name]) for name, [one] in turn.statistics.items())
        _halve([layer for layer in layers if layer.name in turn.statistics])
        seen.append((turn.block, turn.index, turn.of))
    assert seen == [("encoder.block.1", 0, 2), ("decoder.block.1", 1, 2)]


@pytest.mark.parametrize("family", ["opt", "bert", "t5"])
def test_layers_in_no_block_come_last(family):
    model = tiny_model(family)
    batches = _batches(model)
    layers = [layer for layer in weight_layers(model) if layer.kind == "linear"]
    outside = {layer.name for layer in layers if layer.place != "block"}
    assert outside
    dense = observe(model, batches, layers, Rows, who="test")
    expected = _by_hand(model, batches)
    assert all(torch.equal(one.rows, expected[name]) for name, [one] in dense.items())
    for turn in block_by_block(model, batches, layers, Rows, who="test"):
        expected = _by_hand(model, batches)
        assert all(torch.equal(one.rows, expected[name]) for name, [one] in turn.statistics.items())
        _halve([layer for layer in layers if layer.name in turn.statistics])
        last = turn
    assert last.block == ""
    assert last.index == last.of - 1


def test_statistics_are_dropped_after_their_turn():
    model = tiny_model("llama")
    turns = block_by_block(model, _batches(model), _layers(model), InputProducts.of, who="test")
    first = next(turns)
    assert len(first.statistics) == 7
    next(turns)
    assert not first.statistics


# Models whose blocks do not simply follow one another.


class _ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, flow="plain", **kwargs):
        self.flow, self.hidden_size, self.vocab_size = flow, 16, 128
        super().__init__(**kwargs)


class _ToyBlock(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.up, self.down, self.in_place = nn.Linear(16, 24), nn.Linear(24, 16), in_place

    def forward(self, hidden):
        change = self.down(torch.tanh(self.up(hidden)))
        return hidden.add_(change) if self.in_place else hidden + change


class _Toy(PreTrainedModel):
    config_class = _ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(128, 16)
        self.layers = nn.ModuleList(_ToyBlock(config.flow == "in place") for _ in range(4))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        hidden, flow, skipped = self.embed(input_ids), self.config.flow, None
        for index, block in enumerate(self.layers):
            if flow == "dead" and index == 1:
                continue
            if flow == "parts" and index == 2:
                hidden = hidden + block.down(torch.tanh(block.up(hidden)))
                continue
            if flow == "skips" and index == 3:
                hidden = hidden + skipped
            hidden = block(hidden) * 1.5
            if flow == "twice" and index == 2:
                hidden = block(hidden)
            if flow == "adds in place":
                hidden += 0.1
            skipped = hidden if index == 0 else skipped
        return (hidden,)


def _toy(flow):
    torch.manual_seed(0)
    return _Toy(_ToyConfig(flow=flow))


@pytest.mark.parametrize(
    ("flow", "whole"),
    [("plain", False), ("in place", False), ("dead", False), ("skips", True), ("twice", True), ("parts", True)],
)
def test_any_flow_gives_the_right_inputs(flow, whole, caplog):
    model = _toy(flow)
    batches, layers = [probe_inputs(model, rows=3, tokens=20), probe_inputs(model, seed=1)], _layers(model)
    blocks = []
    with caplog.at_level(logging.WARNING):
        for turn in block_by_block(model, batches, layers, Rows, who="test"):
            assert turn.whole_passes == whole
            expected = _by_hand(model, batches)
            for name, [one] in turn.statistics.items():
                if name in expected:
                    assert torch.equal(one.rows, expected[name])
                else:
                    assert one.count == 0
            _halve([layer for layer in layers if layer.name in turn.statistics])
            blocks.append(turn.block)
    assert sorted(blocks) == [f"layers.{index}" for index in range(4)]
    assert blocks[-1] == ("layers.1" if flow == "dead" else "layers.2" if flow == "parts" else "layers.3")
    assert bool(caplog.records) == whole
    assert not _traces(model)


def test_additions_in_place_between_blocks_are_seen():
    model = _toy("adds in place")
    batches, layers = [probe_inputs(model, rows=3, tokens=20)], _layers(model)
    for turn in block_by_block(model, batches, layers, Rows, who="test"):
        expected = _by_hand(model, batches)
        assert all(torch.equal(one.rows, expected[name]) for name, [one] in turn.statistics.items())
        _halve([layer for layer in layers if layer.name in turn.statistics])


def test_a_shared_block_runs_as_often_as_it_does():
    config = AlbertConfig(
        vocab_size=128, embedding_size=16, hidden_size=32, intermediate_size=64, num_attention_heads=2,
        num_hidden_layers=3,
    )  # fmt: skip
    model = AlbertModel(config).eval()
    batches = [probe_inputs(model)]
    layers = [layer for layer in weight_layers(model) if layer.kind == "linear"]
    expected = _by_hand(model, batches)
    counts = {}
    for turn in block_by_block(model, batches, layers, Rows, who="test"):
        for name, [one] in turn.statistics.items():
            assert torch.equal(one.rows, expected[name])
            counts[name] = one.count
    assert counts["encoder.albert_layer_groups.0.albert_layers.0.ffn"] == 3 * 16


# What is kept meanwhile, and what is left behind.


def test_states_past_the_budget_go_to_disk_and_come_back_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hidden = torch.randn(2, 3, 4).bfloat16()
    bias = torch.randn(1, 2, 3, 3).transpose(2, 3)
    with States(hidden.nbytes) as states:
        states["a", 0] = (hidden, bias, None, {"again": bias})
        states["a", 1] = hidden
        assert states.folder is not None
        assert len(list(states.folder.iterdir())) == 1
        assert states.bytes_in_memory == hidden.nbytes
        for _ in range(2):
            back, turned, nothing, again = states["a", 0]
            assert torch.equal(back, hidden)
            assert back.dtype == torch.bfloat16
            assert torch.equal(turned, bias)
            assert turned is again["again"]
            assert nothing is None
            assert torch.equal(states["a", 1], hidden)
        states["a", 0] = hidden * 2
        assert torch.equal(states["a", 0], hidden * 2)
        assert len(list(states.folder.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_kept_states_are_copies():
    states, hidden = States(None), torch.ones(3)
    states["a"] = hidden
    hidden += 1
    assert states["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("end", ["abandoned", "closed", "caller", "nan"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_nothing_is_left_behind(family, end, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model(family).train()
    model.model.layers[0].eval()
    implementation = model.config._experts_implementation
    modes = [module.training for module in model.modules()]
    batches, layers = _batches(model), _layers(model)
    turns = block_by_block(model, batches, layers, InputNorms.of, who="Test", memory_bytes=0)
    next(turns)
    assert not _traces(model)
    assert [module.training for module in model.modules()] == modes
    if end == "nan":
        next(layer for layer in layers if "o_proj" in layer.name).weight.data[0, 0] = float("nan")
        with pytest.raises(
            CompressionError, match=r"^Test: NaN or infinite activations enter model\.layers\.1\.self_attn"
        ):
            next(turns)
    else:
        next(turns)
        assert list(tmp_path.iterdir())
        if end == "closed":
            turns.close()
        elif end == "caller":
            with pytest.raises(RuntimeError, match="caller"):
                turns.throw(RuntimeError("caller"))
        else:
            del turns
            gc.collect()
    assert not list(tmp_path.iterdir())
    assert not _traces(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert model.config._experts_implementation == implementation


def test_a_forward_that_is_already_replaced_stays():
    # accelerate does so on models that it spreads over devices.
    model = tiny_model("llama")
    block = model.model.layers[1]
    own, called = block.forward, []

    def forward(*args, **kwargs):
        called.append(1)
        return own(*args, **kwargs)

    block.forward = forward
    list(block_by_block(model, _batches(model), _layers(model), InputNorms.of, who="test"))
    assert block.forward is forward
    assert called


# Batches.


def test_rows_of_equal_length_share_a_batch_and_nothing_is_padded():
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    data = [Example("abc" * 10), Example("x" * 30), Example("", "y"), Example("z" * 30, "w")]
    context = Context(data=data, tokenizer=tokenizer)
    batches = calibration_batches(model, context, who="test", samples=10, max_length=100)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 31), (2, 30), (1, 1)]
    assert all(batch["attention_mask"].all() for batch in batches)
    assert all((batch["input_ids"] != 0).all() for batch in batches)
    assert batches[0]["token_type_ids"].sum() == 1
    # GPT-2 would take the segments for tokens.
    model = tiny_model("gpt2")
    batches = calibration_batches(model, context, who="test", samples=10, max_length=100)
    assert set(batches[0]) == {"input_ids", "attention_mask"}


def test_batches_are_bounded_by_tokens_and_rows_by_the_model():
    model = tiny_model("gpt2")
    context = Context(data=[Example("a" * 5000)] * 5, tokenizer=tiny_tokenizer())
    batches = calibration_batches(model, context, who="test", samples=5, max_length=10_000)
    # The tokenizer's own limit is 512.
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 512), (1, 512)]
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    model.config.max_position_embeddings = 64
    batches = calibration_batches(model, context, who="test", samples=5, max_length=10_000)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(5, 64)]


def test_samples_are_drawn_with_the_seed():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    data = [Example(f"{index:032d}") for index in range(50)]

    def ids(seed, samples):
        context = Context(data=data, tokenizer=tokenizer, seed=seed)
        [batch] = calibration_batches(model, context, who="test", samples=samples, max_length=64)
        return batch["input_ids"]

    assert ids(0, 7).shape == (7, 32)
    assert torch.equal(ids(0, 7), ids(0, 7))
    assert not torch.equal(ids(0, 7), ids(1, 7))
    assert torch.equal(ids(0, 50), ids(1, 50))


def test_decoders_of_encoder_decoders_get_the_target_shifted():
    model = tiny_model("t5")
    model.config.decoder_start_token_id = 7
    tokenizer = tiny_tokenizer()
    data = [Example("a" * 20, pair="bcd"), Example("z" * 20)]
    batches = calibration_batches(model, Context(data=data, tokenizer=tokenizer), who="test", samples=2, max_length=64)
    assert [batch["decoder_input_ids"].shape[1] for batch in batches] == [20, 3]
    b, c, _ = tokenizer("bcd")["input_ids"]
    assert batches[1]["decoder_input_ids"].tolist() == [[7, b, c]]
    assert batches[0]["decoder_input_ids"].tolist() == [[7, *tokenizer("z" * 19)["input_ids"]]]


def test_few_tokens_are_told():
    model = tiny_model("llama")
    context = Context(data=[Example("a" * 40), Example("")], tokenizer=tiny_tokenizer())
    calibration_batches(model, context, who="test", samples=8, max_length=64)
    reasons = [action.reason for action in context.told]
    assert reasons == [
        "1 of 2 calibration texts have no token",
        "calibrated on 40 tokens, fewer than the 64 features of the model; more texts serve better",
    ]


# Refusals.


def _refused(model, **context):
    calibration_batches(model, Context(**context), who="Test", samples=8, max_length=64)


def test_bad_texts_are_refused():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(MissingInputError, match="Test needs data"):
        _refused(model, data=None, tokenizer=tokenizer)
    with pytest.raises(MissingInputError, match="Test needs a tokenizer"):
        _refused(model, data=[Example("a" * 40)])
    with pytest.raises(MissingInputError, match="calibration texts too short: 2 texts have 5 tokens in all"):
        _refused(model, data=[Example("abc"), Example("de")], tokenizer=tokenizer)
    model.resize_token_embeddings(50)
    with pytest.raises(ConfigError, match=r"gives token \d+, and LlamaForCausalLM knows 50"):
        _refused(model, data=[Example("z" * 40)], tokenizer=tokenizer)


def test_models_without_texts_are_refused():
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    with pytest.raises(UnsupportedModelError, match="ViTModel reads pixel_values"):
        _refused(ViTModel(config), data=[Example("a" * 40)], tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("run", [observe, block_by_block])
def test_what_cannot_run_is_refused_at_once(run):
    model = tiny_model("llama")
    batches, layers = _batches(model), _layers(model)
    with pytest.raises(UnsupportedModelError, match=r"cannot calibrate model\.embed_tokens"):
        run(model, batches, weight_layers(model), InputNorms.of, who="Test")
    with pytest.raises(MissingInputError, match="at least one calibration batch"):
        run(model, [], layers, InputNorms.of, who="Test")
    with pytest.raises(UnsupportedModelError, match="is on the meta device"):
        run(copy.deepcopy(model).to("meta"), batches, layers, InputNorms.of, who="Test")


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_is_found_before_anything_is_changed(family):
    model = tiny_model(family)
    layers = _layers(model)
    layers[-1].weight.data.flatten()[0] = float("nan")  # the last block's: nothing of a block reads what it puts out
    broken = layers[0].name
    layers[0].weight.data.fill_(float("inf"))
    turns = block_by_block(model, _batches(model), layers, InputNorms.of, who="Test")
    with pytest.raises(CompressionError, match="Test: NaN or infinite activations enter") as error:
        next(turns)
    assert broken not in str(error.value)
    assert not _traces(model)


# Several turns a block.


@pytest.mark.parametrize(("family", "memory_bytes"), [*((family, None) for family in FAMILIES), ("t5", 0)])
def test_later_layers_of_a_block_see_what_its_changed_ones_put_out(family, memory_bytes):
    model = tiny_model(family)
    batches, layers = _batches(model), _layers(model)
    named = {layer.name: layer for layer in layers}
    names, of, ends = [], set(), []
    turns = block_by_block(model, batches, layers, Rows, who="test", sequential=True, memory_bytes=memory_bytes)
    for number, turn in enumerate(turns):
        assert (turn.index, turn.whole_passes, turn.unseen) == (number, False, ())
        expected = _by_hand(model, batches)
        if family == "mixtral":
            expected |= _experts_by_hand(model, batches)
        for name, statistics in turn.statistics.items():
            rows = expected[name] if isinstance(expected[name], list) else [expected[name]]
            for one, right in zip(statistics, rows, strict=True):
                torch.testing.assert_close(one.rows, right, rtol=1e-4, atol=1e-5)
            names.append(name)
        _halve([named[name] for name in turn.statistics])
        of.add(turn.of)
        ends += [turn.block] if turn.last else []
    assert of == {number + 1}
    assert sorted(names) == sorted(named)
    assert ends == [turn.block for turn in block_by_block(model, batches, layers, InputNorms.of, who="test")]
    assert not _traces(model)


def test_layers_with_equal_inputs_have_their_turn_together():
    model = tiny_model("llama")
    turns = block_by_block(model, _batches(model), _layers(model), InputNorms.of, who="test", sequential=True)
    found = [[name.rpartition(".")[2] for name in turn.statistics] for turn in turns]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert found == block * len(model.model.layers)


@pytest.mark.parametrize("flow", ["plain", "in place", "dead", "skips", "twice", "parts"])
def test_any_flow_gives_the_right_inputs_in_several_turns(flow):
    model = _toy(flow)
    batches, layers = [probe_inputs(model, rows=3, tokens=20), probe_inputs(model, seed=1)], _layers(model)
    names = []
    for turn in block_by_block(model, batches, layers, Rows, who="test", sequential=True):
        expected = _by_hand(model, batches)
        for name, [one] in turn.statistics.items():
            assert one.count == 0 if name not in expected else torch.equal(one.rows, expected[name])
        _halve([layer for layer in layers if layer.name in turn.statistics])
        names += turn.statistics
    assert sorted(names) == sorted(layer.name for layer in layers)


def test_a_part_stops_at_its_last_layer():
    model = tiny_model("llama")
    calls = {"o_proj": 0, "down_proj": 0}
    block = model.model.layers[0]
    for name, module in (("o_proj", block.self_attn.o_proj), ("down_proj", block.mlp.down_proj)):
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    batches = _batches(model)
    layers = _layers(model, ("model.layers.0.*",))
    turns = block_by_block(model, batches, layers, InputNorms.of, who="test", sequential=True)
    next(turns)
    before = dict(calls)  # the survey's
    for _ in range(3):
        next(turns)
    # o_proj's own turn stops before it runs; those of gate and up, and of down, run it; nobody needs down's outputs.
    assert calls["o_proj"] - before["o_proj"] == 2 * len(batches)
    assert calls["down_proj"] == before["down_proj"]


def test_a_pass_goes_on_until_the_last_layer_has_seen_all_chunks():
    model = tiny_model("bert")
    for block in model.bert.encoder.layer:
        block.chunk_size_feed_forward = 16  # one chunk of the short row that is looked at first, two of these
    batches, layers = [probe_inputs(model, rows=3, tokens=32)], _layers(model)
    for turn in block_by_block(model, batches, layers, Rows, who="test"):
        expected = _by_hand(model, batches)
        assert all(len(one.rows) == 96 for [one] in turn.statistics.values())
        assert all(torch.equal(one.rows, expected[name]) for name, [one] in turn.statistics.items())
        _halve([layer for layer in layers if layer.name in turn.statistics])


@pytest.mark.parametrize("changed", [False, True])
def test_layers_that_get_the_same_tensor_share_its_sums(changed, monkeypatch):
    model = tiny_model("llama")
    if changed:
        # Within the very tensor: k and v get other inputs than q.
        model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: _double(args[0]))
    batches, layers = _batches(model), _layers(model)
    sums, calls = InputProducts.sums.__func__, []
    monkeypatch.setattr(InputProducts, "sums", classmethod(lambda cls, inputs: calls.append(1) or sums(cls, inputs)))
    found = observe(model, batches, layers, InputProducts.of, who="test")
    assert len(calls) == (8 + changed) * len(batches)
    expected = _by_hand(model, batches)
    for name, [one] in found.items():
        torch.testing.assert_close(one.products, expected[name].T @ expected[name], rtol=1e-4, atol=1e-4)


def _double(tensor):
    tensor.mul_(2)
