"""The fast path of a quantized model's blocks: the very numbers of the model's own code, and back to it in time."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import llmcompress as lc
from llmcompress.quantization.fast_path import FastPath, leave_fast_path, use_fast_path
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import FAMILIES, IMAGE_FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer
from native_sets import built

ENCODERS = ["bert", "distilbert", "roberta", "vit"]
DECODERS = ["gpt2", "opt", "llama", "qwen2", "qwen3", "gemma", "gemma3_text"]
OTHERS = ["gpt_neox", "phi3", "mixtral", "t5"]  # two branches at once, a fused gate, experts, positions as a bias
# Its activation is ReLU, for which there is no native kernel.
WITHOUT_CHAINS = {"opt"}
STRATEGIES = {
    "int8": lc.DynamicQuantization(),
    "int8 tensor": lc.DynamicQuantization(activations="tensor"),
    "static": lc.StaticQuantization(outliers=None),
    "int4": lc.WeightOnlyQuantization(),
    "mixed": lc.WeightOnlyQuantization(skip=("*.0.*",)),
}


def quantized(family: str, strategy: str = "int8"):
    model = tiny_model(family) if family in FAMILIES | IMAGE_FAMILIES else build_tiny("causal-lm", family).eval()
    data = {} if family in IMAGE_FAMILIES else {"data": tiny_data(model), "tokenizer": tiny_tokenizer()}
    return STRATEGIES[strategy].compress(model, lc.Context(**data))


def blocks(model):
    return [module for module in model.modules() if isinstance(module, FastPath)]


def plain(model):
    other = copy.deepcopy(model)
    leave_fast_path(other)
    assert not blocks(other)
    return other


def taken(model) -> bool:
    """Tell whether all blocks were found to be what they seem."""
    proven = [block.__dict__["_fast_path"].proven for block in blocks(model)]
    return bool(proven) and all(found and None not in found.values() for found in proven)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_results_are_those_of_the_models_own_code_to_the_last_bit(family, strategy):
    if family == "vit" and strategy == "static":
        pytest.skip("static ranges want texts")
    model = quantized(family, strategy)
    expected = plain(model)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        for _ in range(2):  # proven, and taken at once
            assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    assert taken(model)


@built
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_native_kernels_run_whole_blocks(family):
    model = quantized(family)
    with torch.no_grad():
        model(**tiny_inputs(model))
    proven = [block for own in blocks(model) for block in own.__dict__["_fast_path"].proven.values()]
    assert all((block._chains is not None) == (family not in WITHOUT_CHAINS) for block in proven)


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_of_other_forms_are_left_alone(family):
    model = quantized(family)
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(model)).logits, plain(model)(**tiny_inputs(model)).logits)
    assert not taken(model)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "qwen3"])
def test_padding_is_masked(family):
    model = quantized(family)
    expected, inputs = plain(model), {"input_ids": torch.arange(4, 28).view(2, 12)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :5] = 0
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, expected(**inputs).logits)
        assert not torch.equal(logits, model(input_ids=inputs["input_ids"]).logits)
    assert taken(model)


@pytest.mark.parametrize("cache", [DynamicCache, lc.GrowingCache, StaticCache])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3", "gemma3_text"])
def test_text_that_is_written_is_the_same(family, cache):
    model = quantized(family, "int4")
    expected = plain(model)
    prompt = torch.arange(4, 16).view(2, 6)
    sizes = {"max_cache_len": 24} if cache is StaticCache else {}
    written = [
        one.generate(prompt, max_new_tokens=12, do_sample=False, past_key_values=cache(config=model.config, **sizes))
        for one in (model, expected)
    ]
    assert torch.equal(*written)
    assert taken(model)


def test_a_folder_that_is_loaded_has_it_and_dequantized_models_do_not(tmp_path):
    model = quantized("bert")
    model.save_pretrained(tmp_path)
    again, inputs = type(model).from_pretrained(tmp_path), tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert taken(again)
    assert list(again.state_dict()) == list(plain(again).state_dict())
    floats = lc.dequantize(again)
    assert [type(module) for module in floats.modules()] == [type(module) for module in tiny_model("bert").modules()]


def test_a_block_stays_what_it_was_to_those_who_ask():
    model = quantized("bert")
    block, own = model.bert.encoder.layer[0], tiny_model("bert").bert.encoder.layer[0]
    assert isinstance(block, type(own))
    assert repr(type(block)) == repr(type(own))
    assert repr(plain(model)) == repr(model)
    use_fast_path(model)
    assert type(block) is type(model.bert.encoder.layer[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own(copied):
    model, inputs = quantized("llama"), tiny_inputs(tiny_model("llama"))
    with torch.no_grad():
        expected = model(**inputs).logits
        other = copied(model)
        assert len(blocks(other)) == len(blocks(model))
        for parameter in other.model.layers[1].parameters():
            parameter.zero_()
        assert not torch.equal(other(**inputs).logits, expected)
        assert torch.equal(other(**inputs).logits, plain(other)(**inputs).logits)
        assert torch.equal(model(**inputs).logits, expected)


class Counted(nn.Module):
    """A linear layer in the place of another, which notes that it was called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def test_who_looks_into_a_block_sees_all_of_it():
    model, inputs = quantized("bert"), tiny_inputs(tiny_model("bert"))
    block, seen = model.bert.encoder.layer[0], []
    with torch.no_grad():
        expected = model(**inputs).logits
        hook = block.intermediate.dense.register_forward_hook(lambda module, given, output: seen.append(output))
        assert torch.equal(model(**inputs).logits, expected)
        hook.remove()
        entered = nn.modules.module.register_module_forward_pre_hook(lambda module, given: seen.append(module))
        assert torch.equal(model(**inputs).logits, expected)
        entered.remove()
        assert isinstance(seen[0], torch.Tensor)
        assert block.intermediate.dense in seen[1:]
        # One in the place of another, as an adapter is; and a forward that is set on a module itself.
        own = block.output.dense
        block.output.dense = Counted(own)
        assert torch.equal(model(**inputs).logits, expected)
        assert block.output.dense.calls == 1
        block.output.dense = own
        own.forward = lambda x: torch.zeros(*x.shape[:-1], own.out_features)
        assert not torch.equal(model(**inputs).logits, expected)
        del own.forward
        assert torch.equal(model(**inputs).logits, expected)


def test_attentions_and_hidden_states_are_given():
    model, inputs = quantized("bert"), tiny_inputs(tiny_model("bert"))
    expected = plain(model)
    with torch.no_grad():
        model(**inputs)
        ours, theirs = (one(**inputs, output_hidden_states=True) for one in (model, expected))
        assert len(ours.hidden_states) == 3
        assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
        for one in (model, expected):
            one.set_attn_implementation("eager")
        ours, theirs = (one(**inputs, output_attentions=True) for one in (model, expected))
        assert len(ours.attentions) == 2
        assert all(map(torch.equal, ours.attentions, theirs.attentions))


def test_dropout_gradients_and_autocast_go_the_long_way():
    model, inputs = quantized("bert"), tiny_inputs(tiny_model("bert"))
    with torch.no_grad():
        expected = model(**inputs).logits
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
                module.train()  # as for Monte Carlo dropout
        assert not torch.equal(model(**inputs).logits, expected)
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(**inputs).logits
        assert not torch.equal(cast, expected)
        assert torch.equal(model(**inputs).logits, expected)
    logits = model(**inputs).logits
    assert logits.requires_grad
    assert torch.equal(logits.detach(), expected)


def test_what_is_written_to_a_layer_counts_at_once():
    model, inputs = quantized("bert"), tiny_inputs(tiny_model("bert"))
    block = model.bert.encoder.layer[1]
    changes = [
        lambda: block.intermediate.dense.weight.copy_(block.intermediate.dense.weight.flip(0)),
        lambda: block.attention.self.query.scale.mul_(2),
        lambda: block.output.dense.bias.add_(1),
        lambda: block.output.LayerNorm.weight.mul_(1.5),
        lambda: setattr(block.output.LayerNorm, "bias", nn.Parameter(torch.ones(64))),
        lambda: setattr(block.attention.output.dense.weight, "data", -block.attention.output.dense.weight),
        lambda: setattr(block.attention.self.value, "scale", block.attention.self.value.scale * 3),
        lambda: model.to(torch.float32),
        lambda: model.to(torch.bfloat16),
        lambda: model.to(torch.float32),
    ]
    with torch.no_grad():
        for change in changes:
            model(**inputs)
            change()
            assert torch.equal(model(**inputs).logits, plain(model)(**inputs).logits)


@built
def test_chains_keep_no_packed_copy_alive():
    model, inputs = quantized("bert"), tiny_inputs(tiny_model("bert"))
    with torch.no_grad():
        model(**inputs)
    block = model.bert.encoder.layer[0]
    [found] = block.__dict__["_fast_path"].proven.values()
    assert found._chains.copies() is not None
    block.output.dense.to(torch.float32)  # which drops its copy
    assert found._chains.copies() is None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiled_and_exported_models_go_through():
    model = quantized("bert")
    inputs = {"input_ids": torch.arange(4, 28).view(2, 12)}
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")(**inputs).logits
        exported = torch.export.export(model, (), inputs, strict=False).module()(**inputs).logits
        traced = torch.jit.trace(plain_logits(model), (inputs["input_ids"],))(inputs["input_ids"])
    for logits in (compiled, exported, traced):
        assert (logits - expected).norm() < 0.02 * expected.norm()


def plain_logits(model):
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    return Logits()


class Odd(nn.Module):
    """A layer of a BERT with one more turn than its parts tell: `what`."""

    def __init__(self, layer: nn.Module, what: str) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output, self.what = (
            layer.attention,
            layer.intermediate,
            layer.output,
            what,
        )

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        if self.what == "scaled":
            attended = attended * 1.001
        y = self.output(self.intermediate(attended), hidden_states if self.what == "skipped" else attended)
        return (y, None) if self.what == "tuple" else y


@pytest.mark.parametrize(("what", "found"), [("same", True), ("scaled", False), ("skipped", False), ("tuple", False)])
def test_a_block_that_computes_something_else_is_found_out(what, found):
    model = quantized("bert")
    leave_fast_path(model)
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = Odd(layer, what).eval()
    use_fast_path(model)
    assert len(blocks(model)) == 2
    x, block = torch.randn(2, 7, 64), model.bert.encoder.layer[0]
    with torch.no_grad():
        ours, theirs = block(x), Odd.forward(block, x)
    if what == "tuple":
        ours, theirs = ours[0], theirs[0]
    assert torch.equal(ours, theirs)
    assert taken(model.bert.encoder.layer[0]) == found


def test_an_argument_that_is_not_known_goes_the_long_way():
    block = quantized("bert").bert.encoder.layer[0]
    x = torch.randn(1, 4, 64)
    with torch.no_grad():
        expected = block(x)
        proven = block.__dict__["_fast_path"].proven
        proven.clear()
        assert torch.equal(block(x, encoder_hidden_states=x), expected)
        assert not proven
        assert torch.equal(block(hidden_states=x), expected)
        assert not proven
        assert torch.equal(block(x, None, use_cache=True, output_attentions=False), expected)
        assert len(proven) == 1


def test_a_module_that_is_gone_is_missed_by_the_models_own_code():
    block, x = quantized("bert").bert.encoder.layer[0], torch.randn(1, 4, 64)
    with torch.no_grad():
        expected = block(x)
        dropout = block.output.dropout
        del block.output.dropout
        with pytest.raises(AttributeError, match="dropout"):
            block(x)
        block.output.dropout = dropout
        assert torch.equal(block(x), expected)
        del block.attention.self.query.scale
        with pytest.raises((AttributeError, KeyError), match="scale"):
            block(x)
