"""The key-value cache with room behind its tokens: the same answers as the plain one, without its copies."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import llmcompress as lc
from llmcompress.testing import tiny_inputs, tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "mixtral"])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generates_what_the_plain_cache_does(family, extra):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    answers = []
    for cache in (DynamicCache(config=model.config), lc.GrowingCache(model.config)):
        torch.manual_seed(0)
        options = {"max_new_tokens": 90, "min_new_tokens": 90, "output_logits": True, "return_dict_in_generate": True}
        answers.append(model.generate(**inputs, past_key_values=cache, **options, **extra))
    plain, ours = answers
    assert torch.equal(plain.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits))


def test_tokens_are_written_in_place_until_the_room_is_full():
    cache = lc.GrowingCache(tiny_model("llama").config)
    layer, places = cache.layers[0], []
    everything = torch.randn(2, 3, 200, 8)
    with torch.no_grad():
        for at in range(200):
            keys, values = layer.update(everything[:, :, at : at + 1], -everything[:, :, at : at + 1])
            places.append(keys.data_ptr())
    assert torch.equal(keys, everything)
    assert torch.equal(values, -everything)
    # Of 1 token there is room for 64 more, of 66 as well, of 131 too.
    assert len(set(places)) == 4
    assert places[:65] == places[:1] * 65 != places[65:66] * 65


@pytest.mark.parametrize("change", ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "copy"])
def test_what_is_changed_from_outside_counts(change):
    model, tokens = tiny_model("llama"), torch.randint(4, 100, (2, 12))
    answers = []
    for cache in (DynamicCache(config=model.config), lc.GrowingCache(model.config)):
        with torch.no_grad():
            model(tokens[:, :8], past_key_values=cache)
            kept, rows = cache, torch.tensor([1, 0])
            if change == "crop":
                cache.crop(-3)
            elif change == "batch_repeat_interleave":
                cache.batch_repeat_interleave(2)
            elif change == "copy":
                kept = copy.deepcopy(cache)
                model(tokens[:, 8:11], past_key_values=cache)  # must not reach the copy
            else:
                getattr(cache, change)(rows)
            new = tokens[:, 8:].repeat_interleave(2 if change == "batch_repeat_interleave" else 1, dim=0)
            answers.append([model(new[:, at : at + 1], past_key_values=kept).logits for at in range(4)])
            cache.reset()
            assert cache.get_seq_length() == 0
            answers[-1].append(model(tokens, past_key_values=cache).logits)
    for plain, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, plain)


def test_what_an_inference_made_is_not_written_to_outside_of_one():
    model, tokens = tiny_model("llama"), torch.randint(4, 100, (1, 9))
    cache = lc.GrowingCache(model.config)
    with torch.inference_mode():
        model(tokens[:, :8], past_key_values=cache)
    with torch.no_grad():
        found = model(tokens[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(tokens).logits[:, 8:])


def test_a_backward_pass_goes_through():
    model, tokens = tiny_model("llama"), torch.randint(4, 100, (1, 9))
    cache = lc.GrowingCache(model.config)
    model(tokens[:, :8], past_key_values=cache)
    model(tokens[:, 8:], past_key_values=cache).logits.sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(tokens).logits[:, 8:].sum().backward()
    for ours, plain in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain.grad, rtol=1e-4, atol=1e-5)


def test_a_backward_pass_goes_through_where_queries_alone_are_trained():
    model, tokens = tiny_model("llama").requires_grad_(False), torch.randint(4, 100, (1, 9))
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    gradients = []
    for cache in (DynamicCache(config=model.config), lc.GrowingCache(model.config)):
        scores = [model(part, past_key_values=cache).logits.sum() for part in tokens.split(3, dim=1)]
        gradients += torch.autograd.grad(sum(scores), trained)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("held", "new"), [(2, 1), (1, 3)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_another_batch_is_refused_and_not_repeated_to_fit(held, new, tokens):
    layer = lc.GrowingCache(tiny_model("llama").config).layers[0]
    with torch.no_grad():
        layer.update(*torch.randn(2, held, 2, 5, 8))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*torch.randn(2, new, 2, tokens, 8))


def test_other_dtypes_and_states_without_features_are_joined_as_the_plain_cache_does():
    config, found = tiny_model("llama").config, []
    for cache in (DynamicCache(config=config), lc.GrowingCache(config)):
        with torch.no_grad():
            for dtype in (torch.bfloat16, torch.float32, torch.float32):
                keys, values = cache.update(torch.ones(1, 2, 3, 8, dtype=dtype), torch.ones(1, 2, 3, 0), 0)
        found.append((keys.dtype, keys.shape, values.shape))
    assert found[0] == found[1] == (torch.float32, (1, 2, 9, 8), (1, 2, 9, 0))


def test_serves_the_decoder_of_an_encoder_decoder():
    model = tiny_model("t5")
    inputs = tiny_inputs(model)
    inputs.pop("decoder_input_ids", None)
    caches = (None, EncoderDecoderCache(lc.GrowingCache(model.config), DynamicCache(config=model.config)))
    plain, ours = (model.generate(**inputs, past_key_values=cache, max_new_tokens=8) for cache in caches)
    assert torch.equal(plain, ours)


def test_something_else_than_a_config_is_refused():
    with pytest.raises(lc.ConfigError, match="must be a model's config"):
        lc.GrowingCache(tiny_model("llama"))
