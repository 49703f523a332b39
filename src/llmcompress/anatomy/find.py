"""Find the parts of a model by the shapes and places of its weights, whatever the model is called."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModelError
from .layers import WeightLayer, weight_layers
from .layout import gate_up_layout, qkv_layout
from .parts import Anatomy, Attention, Block, Experts, FeedForward, Projection
from .stacks import Stack, find_stacks, token_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The field's words for the roles, as attribute names; which model uses which word does not matter.
_QUERY = {"project_q", "q", "query", "q_proj", "q_lin", "wq", "to_q", "query_proj", "q_attn"}
_KEY = {"project_k", "k", "key", "k_proj", "k_lin", "wk", "to_k", "key_proj"}
_VALUE = {"project_v", "v", "value", "v_proj", "v_lin", "wv", "to_v", "value_proj"}
_FUSED = {"qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "att_proj", "in_proj_qkv", "attn_qkv"}
_OUTPUT = {"o", "o_proj", "out_proj", "out", "wo", "dense", "c_proj", "out_lin", "output", "attention_out", "att_out"}
# Weights that are no matrix product of an attention or a feed-forward network.
_NO_PART = ("embedding", "other")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv", "d_head")
# What was measured on one module, for all of its class and sizes.
_Layouts = dict[tuple[Any, ...], Any]
_TOP_K = ("top_k", "num_experts_per_tok", "num_selected_experts", "moe_k", "moe_topk")


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Return what `model` is made of: blocks with their attentions and networks, norms, embeddings, head, ties.

    Only reads the model; where projections are fused, a forward pass of one token measures their layout.

    Raises:
        UnsupportedModelError: no stack of blocks is found, or the blocks hold neither an attention nor a feed-forward
            network; the message says what was looked for and what is there.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> print(anatomy(tiny_model("gpt2")))
        GPT2LMHeadModel, hidden size 64
        embeddings: transformer.wte, transformer.wpe
        transformer.h.0..1: 2 blocks like transformer.h.0
          attention transformer.h.0.attn: 4 heads of 16, fused as [q|k|v]
            c_attn 64->192, c_proj 64->64
          feed-forward transformer.h.0.mlp: width 256
            c_fc 64->256, c_proj 256->64
          norms: ln_1, ln_2
        norms: transformer.ln_f
        head: lm_head
        tied: transformer.wte.weight = lm_head.weight
    """
    stacks = token_stacks(model)
    if not stacks:
        lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of blocks: looked for a ModuleList of modules with at least two "
            f"weight matrices each, found {', '.join(lists) or 'no ModuleList'}{_hint(model)}."
        )
    layers = weight_layers(model)
    found = tuple(_stack_blocks(model, stack, layers) for stack in stacks)
    if not any(block.attentions or block.feed_forwards or block.experts for stack in found for block in stack):
        raise UnsupportedModelError(
            f"the blocks of {type(model).__name__} ({', '.join(stack.path for stack in stacks)}) hold no attention and "
            f"no feed-forward network that is known; their weights are: "
            f"{', '.join(found[0][0].others) or 'none'}{_hint(model)}."
        )
    head = model.get_output_embeddings()
    tokens = _input_embeddings(model)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    outside = [name for name in embeddings if not any(name.startswith(f"{stack.path}.") for stack in stacks)]
    outside.sort(key=lambda name: model.get_submodule(name) is not tokens)
    return Anatomy(
        model=type(model).__name__,
        hidden=_hidden(found, model),
        stacks=found,
        embeddings=tuple(outside),
        head=next((name for name, module in model.named_modules() if head is not None and module is head), None),
        norms=tuple(name for name in _norms(model, "") if not any(name.startswith(f"{s.path}.") for s in stacks)),
        ties=ties(model),
        towers=tuple(stack.path for stack in find_stacks(model) if stack.path not in {own.path for own in stacks}),
    )


def _hint(model: PreTrainedModel) -> str:
    return "; TorchPruning works on convolutional networks" if model.main_input_name == "pixel_values" else ""


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # so say convolutional networks, which have none
        return None


def ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of parameter names that are one and the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _stack_blocks(model: PreTrainedModel, stack: Stack, layers: Sequence[WeightLayer]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    # Fused layouts are measured once for each class of module and its sizes.
    layouts: _Layouts = {}
    for index in range(len(stack)):
        path = stack.block_path(index)
        own = [layer for layer in layers if layer.path.startswith(f"{path}.") and layer.kind not in _NO_PART]
        blocks.append(_block(model, path, own, layouts))
    return tuple(blocks)


def _block(model: PreTrainedModel, path: str, layers: list[WeightLayer], layouts: _Layouts) -> Block:
    flat = [layer for layer in layers if layer.kind != "experts"]
    attentions = _attentions(model, path, flat, layouts)
    used = {part.layer.path for attention in attentions for part in attention.projections()}
    rest = [layer for layer in flat if layer.path not in used]
    experts = _experts(model, [layer for layer in layers if layer.kind == "experts"])
    feed_forwards = _feed_forwards(model, rest, layouts)
    used |= {part.layer.path for feed_forward in feed_forwards for part in feed_forward.projections()}
    routers = {mixture.router for mixture in experts}
    norms = _norms(model.get_submodule(path), path)
    inside = {name for attention in attentions for name in attention.norms}
    return Block(
        path=path,
        attentions=tuple(attentions),
        feed_forwards=tuple(feed_forwards),
        experts=tuple(experts),
        norms=tuple(name for name in norms if name not in inside),
        others=tuple(
            layer.name
            for layer in layers
            if layer.path not in used
            and f"{layer.path}.weight" not in routers
            and not any(layer.path == mixture.path for mixture in experts)
        ),
    )


def _attentions(model: PreTrainedModel, block: str, layers: list[WeightLayer], layouts: _Layouts) -> list[Attention]:
    groups: dict[str, dict[str, WeightLayer]] = {}
    for layer in layers:
        role = attention_role(layer.path)
        if role:
            groups.setdefault(layer.path.rpartition(".")[0], {})[role] = layer
    found: list[Attention] = []
    for parent, roles in groups.items():
        if not ("qkv" in roles or {"q", "k", "v"} <= set(roles)):
            continue
        inputs = [layer for layer in layers if layer.path in {part.path for part in roles.values()}]
        scope, output = _output_of(parent, block, inputs, layers)
        if output is not None:
            found.append(_attention(model, scope, roles, output, layouts))
    return found


def _attention(
    model: PreTrainedModel, path: str, roles: dict[str, WeightLayer], output: WeightLayer, layouts: _Layouts
) -> Attention:
    o = _projection(output)
    parts = {role: _projection(layer) for role, layer in roles.items()}
    first = parts.get("q") or parts["qkv"]
    head_dim = head_dim_of(model, first.path.rpartition(".")[0], o.inputs)
    heads = o.inputs // head_dim
    qkv = parts.get("qkv") if "q" not in parts else None
    kv_outputs = (qkv.outputs - o.inputs) // 2 if qkv is not None else parts["k"].outputs
    kv_heads = max(kv_outputs // head_dim, 1)
    layout = None
    if qkv is not None:
        kind = (type(model.get_submodule(path)), qkv.outputs, heads, kv_heads, head_dim)
        if kind not in layouts:
            layouts[kind] = qkv_layout(
                model, qkv.layer.module, output.module, heads=heads, kv_heads=kv_heads, head_dim=head_dim
            )
        layout = layouts[kind]
    return Attention(
        path=path,
        o=o,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q=parts.get("q"),
        k=parts.get("k") if qkv is None else None,
        v=parts.get("v") if qkv is None else None,
        qkv=qkv,
        layout=layout,
        norms=tuple(name for name in _norms(model.get_submodule(path), path) if _is_head_norm(name)),
        cross=any(word in path.lower().rpartition(".")[2] for word in ("cross", "encdec", "encoder_attn")),
    )


def _output_of(
    parent: str, block: str, inputs: list[WeightLayer], layers: list[WeightLayer]
) -> tuple[str, WeightLayer | None]:
    """Return the scope of an attention and its output projection: the one more matrix in the smallest such module."""
    taken = {layer.path for layer in inputs}
    scope = parent
    while len(scope) >= len(block):
        rest = [layer for layer in layers if layer.path.startswith(f"{scope}.") and layer.path not in taken]
        if rest:
            # A gated attention may hold more; the output is the last that is called so, or else that has no role.
            bare = [layer for layer in rest if attention_role(layer.path) is None]
            named = [layer for layer in bare if layer.path.rpartition(".")[2].lower() in _OUTPUT]
            return scope, next(reversed(named or bare), None)
        scope = scope.rpartition(".")[0]
    return scope, None


def _feed_forwards(model: PreTrainedModel, layers: list[WeightLayer], layouts: _Layouts) -> list[FeedForward]:
    groups: dict[str, list[WeightLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    # BERT keeps the two matrices in two modules of one matrix each: these form one group at their common parent.
    alone = [group[0] for group in groups.values() if len(group) == 1]
    gathered = {path: group for path, group in groups.items() if len(group) > 1}
    if len(alone) > 1:
        gathered[_common_parent([layer.path for layer in alone])] = alone
    found: list[FeedForward] = []
    for path, group in gathered.items():
        network = _feed_forward(model, path, group, layouts)
        if network is not None:
            found.append(network)
    return found


def _feed_forward(
    model: PreTrainedModel, path: str, layers: list[WeightLayer], layouts: _Layouts
) -> FeedForward | None:
    parts = [_projection(layer) for layer in layers]
    down = next((part for part in reversed(parts) if not is_gate(part.path)), parts[-1])
    width, hidden = down.inputs, down.outputs
    ups = [part for part in parts if part is not down and part.inputs == hidden and part.outputs in {width, 2 * width}]
    if not ups or len(ups) != len(parts) - 1:
        return None
    inner = _inner_norms(model, path, width) if width != hidden else ()
    if len(ups) == 1 and ups[0].outputs == 2 * width:
        kind = (type(model.get_submodule(path)), width, hidden)
        if kind not in layouts:
            layouts[kind] = gate_up_layout(model, ups[0].layer.module, down.layer.module, width=width)
        return FeedForward(path, down, width, gate_up=ups[0], layout=layouts[kind], inner=inner)
    if len(ups) == 1:
        return FeedForward(path, down, width, up=ups[0], inner=inner)
    if len(ups) == 2 and ups[0].outputs == ups[1].outputs == width:
        gate = next((part for part in ups if is_gate(part.path)), ups[0])
        up = next(part for part in ups if part is not gate)
        return FeedForward(path, down, width, up=up, gate=gate, inner=inner)
    return None


def _inner_norms(model: PreTrainedModel, path: str, width: int) -> tuple[str, ...]:
    """Return the parameters of norms over the channels; not over anything as wide by chance elsewhere in a block."""
    names = [name for name in _norms(model.get_submodule(path), path) if "attn" not in name and "attention" not in name]
    found = []
    for name in names:
        own = dict(model.get_submodule(name).named_parameters(prefix=name, recurse=False))
        if all(tensor.shape == (width,) for tensor in own.values()):
            found += list(own)
    return tuple(found)


def _experts(model: PreTrainedModel, layers: list[WeightLayer]) -> list[Experts]:
    groups: dict[str, list[WeightLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.path, []).append(layer)
    found = []
    for path, group in groups.items():
        parts = {layer.parameter: _projection(layer) for layer in group}
        down = next((part for name, part in parts.items() if "down" in name), None)
        up = next((part for name, part in parts.items() if "up" in name), None)
        if down is None or up is None or len(parts) != 2:
            continue
        module = group[0].module
        fused = up.outputs == 2 * down.inputs
        inner = FeedForward(
            path,
            down,
            down.inputs,
            gate_up=up if fused else None,
            up=None if fused else up,
            layout=_experts_layout(module) if fused else None,
        )
        count = down.layer.weight.shape[0]
        router = _router(model, path, count)
        found.append(Experts(path, inner, count, _first_int(_TOP_K, _owners(model, path)), router))
    return found


def _common_parent(paths: list[str]) -> str:
    levels = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels))


def _experts_layout(module: nn.Module) -> Any:
    # transformers marks each experts class with the order of its fused rows.
    concatenated = getattr(module, "is_concatenated", None)
    return "unknown" if concatenated is None else "[gate|up]" if concatenated else "gate, up interleaved"


def _router(model: PreTrainedModel, experts: str, count: int) -> str | None:
    parent = experts.rpartition(".")[0]
    for name, parameter in model.get_submodule(parent).named_parameters(prefix=parent):
        if parameter.dim() == 2 and parameter.shape[0] == count and not name.startswith(f"{experts}."):
            return name
    return None


def attention_role(path: str) -> str | None:
    """Return what a projection is by the last word of its path: `"q"`, `"k"`, `"v"`, `"qkv"`, or None for another.

    Example:
        >>> attention_role("layer.0.attention.self.query"), attention_role("layers.0.self_attn.o_proj")
        ('q', None)
    """
    word = path.rpartition(".")[2].lower()
    words = (("q", _QUERY), ("k", _KEY), ("v", _VALUE), ("qkv", _FUSED))
    return next((role for role, names in words if word in names), None)


def _projection(layer: WeightLayer) -> Projection:
    shape = layer.weight.shape
    inputs = shape[layer.input_axis]
    outputs = layer.weight.numel() // inputs // (shape[0] if layer.kind == "experts" else 1)
    return Projection(layer, inputs, outputs)


def is_gate(path: str) -> bool:
    """Tell by the last word of its path whether a projection is the gate of a feed-forward network.

    Example:
        >>> is_gate("layers.0.mlp.gate_proj"), is_gate("layers.0.mlp.up_proj")
        (True, False)
    """
    word = path.rpartition(".")[2].lower()
    return "gate" in word or word in {"wi_0", "w1"}


def _is_head_norm(name: str) -> bool:
    return name.rpartition(".")[2].lower().startswith(("q_", "k_", "query_", "key_"))


def is_norm(module: nn.Module) -> bool:
    """Tell whether the only parameters of a module itself are a 1-D weight and perhaps a bias.

    Example:
        >>> is_norm(nn.LayerNorm(4)), is_norm(nn.Linear(4, 4))
        (True, False)
    """
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].dim() == 1 and set(own) <= {"weight", "bias"}


def _norms(module: nn.Module, prefix: str) -> list[str]:
    return [name for name, child in module.named_modules(prefix=prefix) if is_norm(child)]


def head_dim_of(model: PreTrainedModel, attention: str, inputs: int) -> int:
    """Return the width of one head of the attention at a path whose output projection has so many `inputs`."""
    owners = _owners(model, attention)
    for candidate in (_first_int(_HEAD_DIM, owners[:2]), _first_int(("head_dim",), owners[-1:])):
        if candidate and inputs % candidate == 0:
            return candidate
    heads = _first_int(("num_heads", "num_attention_heads", "n_heads", "n_head"), owners)
    return inputs // heads if heads and inputs % heads == 0 else inputs


def _owners(model: PreTrainedModel, path: str) -> list[Any]:
    """Return the module at `path`, its parent, and the config: where a size may be noted."""
    parent = path.rpartition(".")[0]
    return [model.get_submodule(path), model.get_submodule(parent), model.config.get_text_config()]


def _first_int(names: Sequence[str], owners: Sequence[Any]) -> int | None:
    for owner in owners:
        for name in names:
            value = _read(owner, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _read(owner: Any, name: str) -> Any:
    """Return an attribute, or None where there is none, or where a config has another value for each layer."""
    try:
        return getattr(owner, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, which older releases lack
        return None


def _hidden(stacks: tuple[tuple[Block, ...], ...], model: PreTrainedModel) -> int:
    for block in stacks[-1]:
        for attention in block.attentions:
            return attention.o.outputs
        for feed_forward in block.feed_forwards:
            return feed_forward.down.outputs
    return int(model.config.get_text_config().hidden_size)
