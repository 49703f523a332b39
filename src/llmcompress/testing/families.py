"""Tiny random models of thirteen text families and three of images, their inputs, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..anatomy.probe import probe_inputs as tiny_inputs
from ..data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "tiny_data", "tiny_inputs", "tiny_model", "tiny_tokenizer"]

_SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPREAD = {"initializer_range": 0.1}  # wide enough that a damaged weight moves the logits
_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def _bert() -> PreTrainedModel:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_SIZES, **_SPREAD, intermediate_size=128))


def _distilbert() -> PreTrainedModel:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, **_SPREAD))


def _roberta() -> PreTrainedModel:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**_SIZES, **_SPREAD, intermediate_size=128, pad_token_id=0))


def _gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, **_SPREAD, **_IDS))


def _opt() -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**_SIZES, **_IDS, init_std=0.1, ffn_dim=128, word_embed_proj_dim=64))


def _gpt_neox() -> PreTrainedModel:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, **_SPREAD, **_IDS, intermediate_size=128))


def _llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_SIZES, **_SPREAD, **_IDS, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config)


def _qwen2() -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, **_SPREAD, **_IDS, intermediate_size=128, num_key_value_heads=2))


def _qwen3() -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_SIZES, **_SPREAD, **_IDS, intermediate_size=128, num_key_value_heads=2, head_dim=32)
    return Qwen3ForCausalLM(config)


def _gemma() -> PreTrainedModel:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**_SIZES, **_SPREAD, **_IDS, intermediate_size=128, num_key_value_heads=1, head_dim=16)
    return GemmaForCausalLM(config)


def _phi3() -> PreTrainedModel:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**_SIZES, **_SPREAD, **_IDS, intermediate_size=128, num_key_value_heads=2))


def _mixtral() -> PreTrainedModel:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**_SIZES, **_SPREAD, **_IDS, **sizes))


def _t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes, **ids))


def _vit() -> PreTrainedModel:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {**_SIZES, "intermediate_size": 128, "image_size": 32, "patch_size": 8, "num_labels": 16}
    del sizes["vocab_size"]
    return ViTForImageClassification(ViTConfig(**sizes, **_SPREAD))


def _resnet() -> PreTrainedModel:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 2, 1], "num_labels": 16}
    return _varied(ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic")))


def _convnext() -> PreTrainedModel:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"hidden_sizes": [16, 32, 64], "num_stages": 3, "depths": [1, 2, 1], "image_size": 32, "num_labels": 16}
    return _varied(ConvNextForImageClassification(ConvNextConfig(**sizes)))


def _varied(model: PreTrainedModel) -> PreTrainedModel:
    """Draw norms, scales and running statistics, which a fresh model has all alike: a wrong channel must show."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "t5": _t5,
}
"""Builders of one tiny random model a family: about 100,000 parameters each, two blocks, vocabulary of 128."""

IMAGE_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"vit": _vit, "resnet": _resnet, "convnext": _convnext}
"""The same for image classifiers: about 100,000 parameters each, 16 classes."""


def tiny_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a tiny random model of one of `FAMILIES` or `IMAGE_FAMILIES`, in eval mode; equal for equal seeds.

    Example:
        >>> tiny_model("llama").num_parameters() < 200_000
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (FAMILIES | IMAGE_FAMILIES)[family]().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with the 128 tokens of the tiny models: special tokens, letters, digits, signs.

    Example:
        >>> tiny_tokenizer().decode(tiny_tokenizer()("a cat.")["input_ids"]).replace(" ", "")
        'acat.'
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    characters = [chr(code) for code in range(32, 127)]
    filler = [f"<extra_{i}>" for i in range(128 - len(special) - len(characters))]
    vocabulary = {token: index for index, token in enumerate(special + characters + filler)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
    )


def tiny_data(model: PreTrainedModel, rows: int = 8) -> list[Example]:
    """Return short texts of the tiny tokenizer's letters: labelled for a classifier, paired for an encoder-decoder.

    Example:
        >>> tiny_data(tiny_model("bert"), rows=2)[1].label
        1
    """
    words = ["a cat sat on a mat", "the dog ran far", "one and two is three", "no rain today"]
    texts = [f"{words[row % len(words)]} {row}" for row in range(rows)]
    if model.config.is_encoder_decoder:
        return [Example(text, pair=text[::-1]) for text in texts]
    classes = getattr(model.config, "num_labels", 2)
    return [Example(text, label=row % classes) for row, text in enumerate(texts)]
