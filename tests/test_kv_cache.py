"""The quantized key-value cache: exact while young, small when old, and at home in generate()."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

import llmcompress as lc
from llmcompress.quantization.coded_states import CodedStates
from llmcompress.testing import tiny_inputs, tiny_model

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
CAUSAL = ["llama", "qwen3", "gemma", "gpt2", "mixtral"]
SMALL = {"group_size": 8, "residual_length": 8}


def ids(rows=2, tokens=40, vocabulary=128, seed=0):
    return torch.randint(4, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model, tokens, cache, prompt=1):
    """Return the logits of `tokens` fed one by one behind a prompt."""
    parts = [model(tokens[:, :prompt], past_key_values=cache).logits]
    parts += [model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, tokens.shape[1])]
    return torch.cat(parts, dim=1)


def sliding(window=20):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.1,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("along", ["channel", "token"])
def test_a_code_is_off_by_half_a_step_at_most(bits, along):
    torch.manual_seed(0)
    states = torch.randn(2, 3, 32, 20) * 10 ** torch.linspace(-3, 3, 20) + torch.linspace(-50, 50, 20)
    coded = CodedStates(bits, along, 16)
    coded.append(states[:, :, :16])
    coded.append(states[:, :, 16:])
    dim, size = (2, 16) if along == "channel" else (3, 10)
    grouped = states.unflatten(dim, (-1, size))
    span = (grouped.amax(dim + 1, keepdim=True) - grouped.amin(dim + 1, keepdim=True)).expand_as(grouped)
    span, near = span.flatten(dim, dim + 1), grouped.abs().amax(dim + 1, keepdim=True).expand_as(grouped)
    # Half a step of the group, and the rounding of scale and offset to 16 bits.
    bound = span / (2**bits - 1) * 0.5 * 1.01 + near.flatten(dim, dim + 1) * 2**-10
    assert ((coded.dequantize() - states).abs() <= bound).all()
    # 20 channels in codes; 16 bits each for scale and offset of every group.
    groups = 2 * 3 * (2 * 20 if along == "channel" else 32 * 2)
    assert coded.nbytes == 2 * 3 * 32 * -(-20 * bits // 8) + groups * 4


def test_hand_computed_nibbles():
    coded = CodedStates(4, "token", 4)
    coded.append(torch.tensor([0.0, 1.0, 2.0, 15.0]).reshape(1, 1, 1, 4))
    assert coded._codes.flatten().tolist() == [0 | 1 << 4, 2 | 15 << 4]
    assert torch.allclose(coded.dequantize().flatten(), torch.tensor([0.0, 1.0, 2.0, 15.0]), atol=0.02)


def test_odd_channels_constant_channels_and_dropping():
    coded = CodedStates(2, "channel", 4)
    states = torch.full((1, 1, 12, 5), 3.0)
    states[..., 4] = 0.0
    states[:, :, 8:] = 7.0
    coded.append(states)
    assert torch.allclose(coded.dequantize(), states, atol=0.01)
    coded.drop_first(4)
    coded.drop_last(4)
    assert torch.allclose(coded.dequantize(), states[:, :, 4:8], atol=0.01)
    coded.drop_last(4)
    assert (coded.length, coded.nbytes) == (0, 0)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_first_tokens_equal_and_later_ones_are_near(family):
    model, tokens = tiny_model(family), ids()
    expected = decode(model, tokens, DynamicCache(config=model.config))
    errors = {}
    for bits in (8, 4, 2):
        cache = lc.QuantizedCache(model.config, bits=bits, **SMALL)
        found = decode(model, tokens, cache)
        # 16 tokens are 8 and a whole group; the pass that makes them ready to be coded still sees them exact.
        assert torch.equal(found[:, :16], expected[:, :16])
        errors[bits] = float((found - expected)[:, 16:].norm() / expected[:, 16:].norm())
    assert 0 < errors[8] < 0.01
    assert errors[8] < errors[4] < errors[2]
    assert errors[4] < 0.12


@pytest.mark.parametrize("family", CAUSAL)
def test_bytes_are_really_fewer(family):
    model, tokens = tiny_model(family), ids(tokens=128)
    plain = DynamicCache(config=model.config)
    decode(model, tokens, plain, prompt=128)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    for bits in (8, 4, 2):
        cache = lc.QuantizedCache(model.config, bits=bits, group_size=32, residual_length=0)
        decode(model, tokens, cache, prompt=128)
        layer = cache.layers[0]
        heads, size = plain.layers[0].keys.shape[1], plain.layers[0].keys.shape[3]
        codes = 2 * 2 * heads * 128 * size * bits // 8
        scales = 2 * heads * 4 * (128 // 32 * size + 128 * max(size // 32, 1))
        assert layer.nbytes == codes + scales
        assert cache.nbytes == len(cache) * layer.nbytes < held
        tensors = [tensor for coded in layer._states for tensor in coded._tensors()] + layer._recent
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == layer.nbytes


def test_float_tokens_own_their_memory():
    model = tiny_model("llama")
    cache = lc.QuantizedCache(model.config, **SMALL)
    decode(model, ids(tokens=45), cache, prompt=30)
    for tensor in cache.layers[0]._recent:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert 8 <= tensor.shape[2] < 16


def test_a_token_is_coded_once():
    model, tokens = tiny_model("llama"), ids(tokens=64)
    cache = lc.QuantizedCache(model.config, **SMALL)
    decode(model, tokens[:, :24], cache, prompt=24)
    before = cache.layers[0].keys[:, :, :16].clone()
    decode(model, tokens[:, 24:], cache)
    assert torch.equal(cache.layers[0].keys[:, :, :16], before)


@pytest.mark.parametrize("family", CAUSAL)
def test_generates_with_left_padding_as_alone(family):
    model = tiny_model(family)
    long, short = ids(1, 20), ids(1, 12, seed=1)
    padded = torch.cat((torch.zeros(1, 8, dtype=torch.long), short), dim=1)
    batch = torch.cat((long, padded))
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    made = model.generate(
        batch,
        attention_mask=(batch != 0).long(),
        past_key_values=lc.QuantizedCache(model.config, bits=8, **SMALL),
        **settings,
    )
    plain = model.generate(batch, attention_mask=(batch != 0).long(), **settings)
    # Rounding may turn a choice between two near tokens, and what follows it; most tokens are the same.
    assert made.shape == plain.shape
    assert torch.equal(made[:, :28], plain[:, :28])


def test_generates_as_the_float_cache_while_nothing_is_coded():
    model, inputs = tiny_model("llama"), tiny_inputs(tiny_model("llama"))
    settings = {**inputs, "max_new_tokens": 20, "min_new_tokens": 20}
    for more in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        made = model.generate(**settings, **more, past_key_values=lc.QuantizedCache(model.config))
        assert torch.equal(made, model.generate(**settings, **more))


def test_beams_are_reordered_in_the_codes():
    model, tokens = tiny_model("llama"), ids(3)
    cache = lc.QuantizedCache(model.config, **SMALL)
    decode(model, tokens, cache, prompt=40)
    before = [layer.keys.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(layer.keys, old[[2, 0, 0]]) for layer, old in zip(cache.layers, before, strict=True))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(layer.keys, old[[0, 0]]) for layer, old in zip(cache.layers, before, strict=True))
    model.generate(ids(1, 20), past_key_values=lc.QuantizedCache(model.config, **SMALL), num_beams=3, max_new_tokens=20)


@pytest.mark.parametrize("gone", [1, 7, 9, 30])
def test_crop_takes_tokens_back(gone):
    model, tokens = tiny_model("llama"), ids()
    cache = lc.QuantizedCache(model.config, bits=8, **SMALL)
    decode(model, tokens, cache)
    whole = cache.layers[0].values.clone()
    cache.crop(-gone)
    assert cache.get_seq_length() == 40 - gone
    # Tokens that come back out of the codes, and are coded once more, may be rounded once more.
    assert torch.allclose(cache.layers[0].values, whole[:, :, : 40 - gone], atol=0.02)
    again = decode(model, tokens[:, 40 - gone :], cache)
    expected = decode(model, tokens, DynamicCache(config=model.config))[:, 40 - gone :]
    assert (again - expected).norm() / expected.norm() < 0.02
    with pytest.raises(lc.CompressionError, match="must take back tokens"):
        cache.crop(-41)


def test_drafts_taken_back_leave_no_trace():
    model, tokens = tiny_model("llama"), ids(tokens=60)
    cache = lc.QuantizedCache(model.config, **SMALL)
    cache.activate_past_recording()
    straight = lc.QuantizedCache(model.config, **SMALL)
    for at in range(0, 60, 5):
        decode(model, tokens[:, at : at + 5], cache, prompt=5)
        cache.crop(0)
        decode(model, ids(tokens=6, seed=at), cache, prompt=6)
        cache.crop(-6)
        decode(model, tokens[:, at : at + 5], straight, prompt=5)
    assert torch.equal(cache.layers[1].keys, straight.layers[1].keys)
    assert cache.nbytes == straight.nbytes


def test_assisted_generation():
    model = tiny_model("llama")
    settings = {"inputs": ids(1, 20), "max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    made = model.generate(**settings, past_key_values=lc.QuantizedCache(model.config), prompt_lookup_num_tokens=3)
    assert torch.equal(made, model.generate(**settings))
    cache = lc.QuantizedCache(model.config, bits=8, **SMALL)
    made = model.generate(**settings, past_key_values=cache, assistant_model=tiny_model("llama", seed=1))
    assert made.shape == (1, 50)
    assert cache.layers[0]._states[0].length


def test_sliding_windows_keep_what_they_attend_to():
    model, tokens = sliding(), ids(tokens=60)
    expected = decode(model, tokens, DynamicCache(config=model.config))
    cache = lc.QuantizedCache(model.config, bits=8, group_size=4, residual_length=4)
    found = decode(model, tokens, cache, prompt=10)
    assert (found - expected).norm() / expected.norm() < 0.02
    assert cache.is_sliding == [True, False]
    window, whole = cache.layers
    assert window.keys.shape[2] == 19
    assert 19 <= window._held() < 19 + 4
    assert whole.keys.shape[2] == 60
    # A prompt longer than the window, and tokens in between.
    cache = lc.QuantizedCache(model.config, bits=8, group_size=4, residual_length=4)
    with torch.no_grad():
        parts = [model(tokens[:, at : at + 30], past_key_values=cache).logits for at in (0, 30)]
    assert (torch.cat(parts, 1) - expected).norm() / expected.norm() < 0.02
    with pytest.raises(lc.CompressionError, match="activate_past_recording"):
        cache.crop(-25)


def test_short_windows_stay_in_float_and_are_told():
    model = sliding()
    cache = lc.QuantizedCache(model.config, bits=4, group_size=8, residual_length=16)
    first, second = cache.plan()
    assert (first.path, first.touched) == ("layers.0", False)
    assert first.reason.startswith("its window of 20 tokens is no longer than the newest tokens")
    assert second.does == "keys int4 by channel, values int4 by token"
    plain = DynamicCache(config=model.config)
    assert torch.equal(decode(model, ids(tokens=20), cache), decode(model, ids(tokens=20), plain))
    assert cache.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    with pytest.raises(lc.NothingToCompressError, match="window of 16 tokens"):
        lc.QuantizedCache(MistralForCausalLM(config).config)


def test_encoder_decoders():
    model = tiny_model("t5")
    with pytest.raises(lc.UnsupportedModelError, match="for_encoder_decoder"):
        lc.QuantizedCache(model.config)
    settings = {"inputs": ids(2, 30), "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    exact = lc.QuantizedCache.for_encoder_decoder(model.config)
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, past_key_values=exact), expected)
    cache = lc.QuantizedCache.for_encoder_decoder(model.config, bits=8, **SMALL)
    assert isinstance(cache, EncoderDecoderCache)
    made = model.generate(**settings, past_key_values=cache)
    assert torch.equal(made[:, :8], expected[:, :8])
    assert cache.cross_attention_cache.layers[0]._states[0].length == 16
    assert cache.self_attention_cache.layers[0]._states[0].length == 16


def test_reset_copy_and_later_calls():
    model, tokens = tiny_model("qwen3"), ids()
    cache = lc.QuantizedCache(model.config, **SMALL)
    first = decode(model, tokens[:, :30], cache)
    twin = copy.deepcopy(cache)
    rest = decode(model, tokens[:, 30:], cache)
    assert torch.equal(decode(model, tokens[:, 30:], twin), rest)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert torch.equal(decode(model, tokens[:, :30], cache), first)


def test_half_precision():
    model, tokens = tiny_model("llama").to(torch.bfloat16), ids()
    cache = lc.QuantizedCache(model.config, bits=8, **SMALL)
    found, expected = decode(model, tokens, cache), decode(model, tokens, DynamicCache(config=model.config))
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert (found - expected).float().norm() / expected.float().norm() < 0.05


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bits": 1}, r"bits must be in \[2, 8\], or a pair of such, got 1"),
        ({"bits": (4, 16)}, r"got \(4, 16\)"),
        ({"group_size": 1}, r"group_size must be a whole number of at least 2, got 1"),
        ({"residual_length": -1}, r"residual_length must be a whole number of at least 0, got -1"),
        ({"keys": "row"}, r"keys must be 'channel' or 'token', got 'row'"),
    ],
)
def test_refusals(fields, match):
    with pytest.raises(lc.ConfigError, match=match):
        lc.QuantizedCache(tiny_model("llama").config, **fields)


@pytest.mark.parametrize("make", [lc.QuantizedCache, lc.QuantizedCache.for_encoder_decoder])
@pytest.mark.parametrize("given", [None, "llama"])
def test_what_is_no_config_is_refused(make, given):
    with pytest.raises(lc.ConfigError, match=r"config must be a model's config, such as model\.config, got "):
        make(given)


def test_keys_and_values_apart():
    config = tiny_model("llama").config
    plan = lc.QuantizedCache(config, bits=(8, 4), keys="token", values="channel").plan()
    assert plan[0].does == "keys int8 by token, values int4 by channel"


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs shared/assets beside the checkout")
@torch.no_grad()
def test_a_trained_model_hardly_notices():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "stories260K-hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "stories260K-hf")
    story = next((ASSETS / "tinystories").glob("*.txt")).read_text(encoding="utf-8")[:20_000]
    tokens = tokenizer(story, return_tensors="pt", verbose=False).input_ids[0, : 16 * 128].reshape(16, 128)

    def loss(cache):
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(4, dim=1)]
        logits = torch.cat(parts, dim=1)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))

    plain = loss(DynamicCache(config=model.config))
    by_bits = {
        bits: loss(lc.QuantizedCache(model.config, bits=bits, group_size=32, residual_length=8)) - plain
        for bits in (8, 4, 2)
    }
    assert abs(by_bits[8]) < 0.002
    assert abs(by_bits[4]) < 0.05
    assert by_bits[2] > by_bits[4]
