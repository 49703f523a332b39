"""A tiny configuration of any architecture, made from its config class by what the fields' names say.

The names of sizes are the field's common words (`hidden_size`, `n_embd`, `d_model`); the few architectures whose sizes
must agree with each other in a way of their own stand in `_AGREEMENTS`, with the reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
_HIDDEN, _WIDTH, _HEADS, _HEAD_DIM, _LAYERS = 64, 128, 4, 16, 2
# More blocks are built where the kinds of blocks (`layer_types`) take turns in a longer pattern, up to so many.
_MOST_LAYERS = 8
_SPREAD = 0.1

_Rule = tuple[str, Callable[[int], int]]


def _at_most(size: int) -> Callable[[int], int]:
    return lambda default: min(default, size)


# First match wins; names are matched whole. A rule gets the default and returns the tiny value.
_RULES: tuple[_Rule, ...] = (
    (r".*vocab_size(_base|_per_layer_input)?|.*hash_byte_group_vocab|unpadded_vocab_size|codebook_size", _at_most(128)),
    (r".*(token_id|token_index|_pad_id)", lambda default: default if default < VOCABULARY else 0),
    (r"(max|n)_(source_|target_|encoder_|decoder_|2d_)?position(s|_embeddings)?|max_seq_len|n_ctx|context_length",
     _at_most(512)),
    (r"original_max_position_embeddings", _at_most(256)),
    # FFN before hidden: `ffn_hidden_size` is a width.
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim|intermediate_size_mlp)|d_ff|dff|dim_ff|hidden_dim|n_inner"
     r"|feed_forward_size|d_inner", lambda default: _WIDTH if default else 0),
    (r"(.*_)?(hidden_size|d_model|embed_dim|embedding_size|emb_dim|embedding_dim|embed_proj_dim)|n_embd|dim|d_latents"
     r"|attention_hidden_size|lru_width|ple_embed_dim|output_dim|dim_model_base|.*projector_(input|output)_dim"
     r"|(audio_|vision_)?(output|adapter_(in|out))_(dim|size)|hidden_size_global|backbone_hidden_size|adapter_input_size",
     lambda default: _HIDDEN),
    (r"mamba_(n|num)_heads", _at_most(2 * _HIDDEN // _HEAD_DIM)),
    (r".*(key_value_heads|kv_heads|kv_n_heads)", lambda default: 1 if default == 1 else 2),
    (r"(.*_)?(attention_heads|num_heads|n_heads?|attn_heads)|n_head|linear_num_heads"
     r"|linear_num_(key|value)_heads|index_n_heads|n_mamba_heads", _at_most(_HEADS)),
    (r"(.*_)?(head_dim|head_size|d_head|d_kv|dim_head|kv_channels|attention_head_dim)|mamba_d_head",
     _at_most(_HEAD_DIM)),
    (r"rotary_dim", _at_most(8)),
    (r"(num_|n_)?((hidden|encoder|decoder|speech_encoder|conf_num_hidden|t2u_encoder|t2u_decoder)_)?(layers?|blocks)|depth",
     _at_most(_LAYERS)),
    (r"num_(global|mem|dense|sparse_encoder|sparse_decoder|local)_(layers|blocks)|first_k_dense_replace"
     r"|max_window_layers", _at_most(1)),
    (r".*(num_experts|num_local_experts|n_routed_experts)", lambda default: min(default, 4)),
    (r"moe_num_experts|zero_expert_num", _at_most(4)),
    (r"num_experts_per_tok|moe_top_?k|top_k|moe_k|topk_group|n_group", _at_most(2)),
    (r".*(period|interval|_layer_step|sparse_step|frequency|every_n_layers|layer_group_size|sliding_window_pattern)",
     _at_most(2)),
    (r".*layer_offset", _at_most(1)),
    (r".*lora_rank|.*lowrank|adapter_rank|laurel_rank|gated_norm_rank|router_hidden_size|.*time_step_rank|mamba_dt_rank",
     _at_most(16)),
    (r"(ssm_)?state_size|mamba_d_state", _at_most(16)),
    (r"mamba_d_ssm", lambda default: 2 * _HIDDEN),
    (r"sliding_window(_size)?|attention_window(_size)?|attention_chunk_size|window_size|local_attention|block_size"
     r"|(local|lsh)_attn_chunk_length|index_topk", _at_most(32)),
    (r"(mamba_)?chunk_size", _at_most(32)),
    (r"image_size|crop_size|input_size", _at_most(32)),
    (r"patch_size", _at_most(16)),
    (r"num_mel_bins|feature_size|input_feat_size", _at_most(16)),
    (r"num_(hash_buckets|centroids|latents|landmarks)|num_position_embeddings", _at_most(64)),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in _RULES)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
_SPREADS = {"initializer_range", "init_std", "initializer_std", "embedding_initializer_range"}
# Sizes that some classes leave to the checkpoint, and cannot be built without.
_UNSET = {
    "vocab_size": VOCABULARY,
    "head_dim": _HEAD_DIM,
    "num_key_value_heads": _HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": _WIDTH,
}
# What tells for each block what it is; the tiny model has as many blocks as it takes to hold each kind.
_KINDS_OF_BLOCKS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def tiny_configs(architecture: str, model_class: type[PreTrainedModel]) -> Iterator[PreTrainedConfig]:
    """Yield configs of `architecture` (a `model_type`) for `model_class`: a few blocks, 64 wide, 128 tokens.

    The first is the config class's own defaults made small; the second also fills sizes that the class leaves unset.

    Raises:
        Exception: whatever the config class raises where these sizes do not agree.

    Example:
        >>> from transformers import LlamaForCausalLM
        >>> config = next(tiny_configs("llama", LlamaForCausalLM))
        >>> config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
        (64, 128, 2, 128)
    """
    for unset in ({}, _UNSET):
        given = _AGREEMENTS.get(architecture, {})
        if callable(given):
            given = given()
        config = given if isinstance(given, PreTrainedConfig) else _tiny(CONFIG_MAPPING[architecture], given, unset)
        config = _part_for(config, model_class)
        if "is_decoder" in vars(config) and not config.is_encoder_decoder and _is_causal(model_class):
            config.is_decoder = True
        yield config


def _part_for(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return the part of `config` that `model_class` is built from: the text's, of many multimodal architectures."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


def _is_causal(model_class: type[PreTrainedModel]) -> bool:
    return "SequenceClassification" not in model_class.__name__ and hasattr(model_class, "generate")


def _tiny(config_class: type[PreTrainedConfig], given: Mapping[str, Any], unset: Mapping[str, int]) -> PreTrainedConfig:
    declared, default = _declared(config_class), _default(config_class)
    parts = {name: value for name, value in default.items() if isinstance(value, PreTrainedConfig)}
    fields: dict[str, Any] = {}
    # What a class declares as unset it derives from the rest, or leaves to the checkpoint.
    for name, value in {**declared, **parts}.items():
        if isinstance(value, PreTrainedConfig):
            inner = given.get(name, {})
            fields[name] = _tiny(type(value), inner, unset) if isinstance(inner, Mapping) else inner
        elif name in _SPECIAL and (value is None or isinstance(value, (list, tuple)) or value >= VOCABULARY):
            fields[name] = _SPECIAL[name]
        elif name in _SPREADS and isinstance(value, float):
            fields[name] = _SPREAD
        elif value is None and name in unset:
            fields[name] = unset[name]
        elif type(value) is int:
            new = _shrunk(name, value)
            if new != value:
                fields[name] = new
    _group_heads(fields, declared)
    depth = next((name for name in _DEPTHS if name in fields), None)
    if depth is not None:
        fields[depth] = max([fields[depth], *(_pattern(default.get(name)) for name in _KINDS_OF_BLOCKS)])
    fields.update({name: value for name, value in given.items() if not isinstance(default.get(name), PreTrainedConfig)})
    return config_class(**fields)


def _default(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values of a config made without arguments; of its fields alone where it refuses its own defaults."""
    try:
        return dict(vars(config_class()))
    except Exception:  # config classes raise what they like
        return _declared(config_class)


def _declared(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    fields = dataclasses.fields(config_class)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _shrunk(name: str, value: int) -> int:
    rule = next((rule for pattern, rule in _COMPILED if pattern.fullmatch(name)), None)
    return value if rule is None else rule(value)


def _group_heads(fields: dict[str, Any], default: Mapping[str, Any]) -> None:
    """Keep every head its own key head where the default has it so."""
    for name, queries in (("num_key_value_heads", "num_attention_heads"), ("num_kv_heads", "num_attention_heads")):
        if name in fields and default.get(name) == default.get(queries) != 1:
            fields[name] = fields.get(queries, default.get(queries))


def _pattern(kinds: Any) -> int:
    """Return after how many blocks every kind has come, and one more, so that a block can go."""
    if not isinstance(kinds, (list, tuple)):
        return 0
    last = max((list(kinds).index(kind) for kind in set(kinds)), default=0)
    return min(last + 2, _MOST_LAYERS) if last else 1


def _bert_to_bert() -> PreTrainedConfig:
    from transformers import BertConfig, EncoderDecoderConfig

    encoder = _tiny(BertConfig, {}, {})
    decoder = _tiny(BertConfig, {"is_decoder": True, "add_cross_attention": True}, {})
    return EncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=2, pad_token_id=0, eos_token_id=3
    )


_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_SPEECH = {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]}
_ZAMBA_BLOCKS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_AGREEMENTS: dict[str, Any] = {
    # It goes over to full attention for good at the first short text.
    "big_bird": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "encoder-decoder": _bert_to_bert,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"head_dim": 16},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"]},
    "rwkv": {"num_hidden_layers": 4},  # of one layer it cannot be initialised: it divides by their number less one
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _SPEECH, "semantic_tokenizer_encoder_config": _SPEECH},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _ZAMBA_BLOCKS, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": _ZAMBA_BLOCKS, "num_hidden_layers": 4},
}  # fmt: skip
"""Fields of architectures whose tiny sizes must agree with each other in a way that no name tells."""
