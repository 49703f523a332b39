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
