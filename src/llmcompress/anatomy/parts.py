"""The parts of a model, named: what `anatomy(model)` returns and how it prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .layers import WeightLayer

QKVLayout = Literal["[q|k|v]", "per head [q|k|v]", "per group [q..|k|v]", "unknown"]
GateUpLayout = Literal["[gate|up]", "gate, up interleaved", "unknown"]


@dataclass(frozen=True)
class Projection:
    """One matrix product: where its weight is, and how many features go in and come out.

    Attributes:
        layer: the weight.
        inputs: features in.
        outputs: features out (of one expert, where there are several).
    """

    layer: WeightLayer
    inputs: int
    outputs: int

    @property
    def path(self) -> str:
        """The name of the weight's layer."""
        return self.layer.name

    def __str__(self) -> str:
        return f"{self.path.rsplit('.', 1)[-1]} {self.inputs}->{self.outputs}"


@dataclass(frozen=True)
class Attention:
    """An attention: either `q`, `k`, `v`, or one fused `qkv` with its `layout`; and the output `o`.

    Attributes:
        path: the smallest module that holds the projections.
        o: the output projection.
        q, k, v: the separate projections, or None.
        qkv: the fused projection, or None.
        layout: how the rows of `qkv` are ordered, measured by a probe; `"unknown"` where the model has no weights yet.
        heads: query heads.
        kv_heads: key and value heads; fewer than `heads` under grouped-query attention.
        head_dim: width of one head.
        norms: paths of norms inside (q_norm, k_norm).
        cross: whether keys and values come from an encoder.
    """

    path: str
    o: Projection
    heads: int
    kv_heads: int
    head_dim: int
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    qkv: Projection | None = None
    layout: QKVLayout | None = None
    norms: tuple[str, ...] = ()
    cross: bool = False

    def projections(self) -> list[Projection]:
        """Return those there are, in the order q, k, v, qkv, o."""
        return [part for part in (self.q, self.k, self.v, self.qkv, self.o) if part is not None]

    def __str__(self) -> str:
        heads = f"{self.heads} heads of {self.head_dim}"
        if self.kv_heads != self.heads:
            heads += f", {self.kv_heads} for keys and values"
        fused = f", fused as {self.layout}" if self.qkv is not None else ""
        return f"{'cross-' if self.cross else ''}attention {self.path}: {heads}{fused}"


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: `up` (and `gate`, or both fused in `gate_up`) widen to `width`, `down` narrows again.

    Attributes:
        path: the module that holds the projections; the block itself, where they are in modules of their own.
        down: the projection that narrows.
        width: number of channels.
        up, gate, gate_up: those that widen, or None.
        layout: how the rows of `gate_up` are ordered, measured by a probe.
        inner: parameters of norms that normalise over the channels.
    """

    path: str
    down: Projection
    width: int
    up: Projection | None = None
    gate: Projection | None = None
    gate_up: Projection | None = None
    layout: GateUpLayout | None = None
    inner: tuple[str, ...] = ()

    def projections(self) -> list[Projection]:
        """Return those there are, in the order gate, up, gate_up, down."""
        return [part for part in (self.gate, self.up, self.gate_up, self.down) if part is not None]

    def __str__(self) -> str:
        fused = f", fused as {self.layout}" if self.gate_up is not None else ""
        return f"feed-forward {self.path or 'of the block'}: width {self.width}{fused}"


@dataclass(frozen=True)
class Experts:
    """A mixture of feed-forward networks, kept as 3-D tensors whose first axis runs over the experts.

    Attributes:
        path: the module that holds the tensors.
        inner: the experts as one feed-forward network; its projections are 3-D.
        count: number of experts.
        top_k: experts that a token is sent to, or None where neither module nor config says.
        router: path of the router's weight, or None if none was found.
    """

    path: str
    inner: FeedForward
    count: int
    top_k: int | None
    router: str | None

    def __str__(self) -> str:
        return f"{self.count} experts {self.path} of width {self.inner.width}, top {self.top_k}, router {self.router}"


@dataclass(frozen=True)
class Block:
    """One repeated block.

    Attributes:
        path: its path.
        attentions: self-attention, and cross-attention where there is one.
        feed_forwards: dense networks, shared experts included.
        experts: mixtures of experts.
        norms: paths of the norms outside the attentions.
        others: weight layers that are none of these.
    """

    path: str
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    experts: tuple[Experts, ...]
    norms: tuple[str, ...]
    others: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the printed tree, indented below the block."""
        for attention in self.attentions:
            yield f"  {attention}"
            yield f"    {', '.join(map(str, attention.projections()))}"
            if attention.norms:
                yield f"    norms: {', '.join(self._short(attention.norms))}"
        for feed_forward in self.feed_forwards:
            yield f"  {feed_forward}"
            yield f"    {', '.join(map(str, feed_forward.projections()))}"
        for experts in self.experts:
            yield f"  {experts}"
            yield f"    {', '.join(map(str, experts.inner.projections()))}"
        yield f"  norms: {', '.join(self._short(self.norms)) or 'none'}"
        if self.others:
            yield f"  not recognised: {', '.join(self.others)}"

    def _short(self, paths: tuple[str, ...]) -> list[str]:
        return [path.removeprefix(f"{self.path}.") for path in paths]


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of; `print` it for a readable tree.

    Attributes:
        model: the model's class name.
        hidden: width of the residual stream.
        stacks: the blocks, one tuple a stack: one for encoders and decoders, two for encoder-decoders.
        embeddings: paths of the embeddings, tokens first.
        head: path of the output head, or None.
        norms: paths of norms outside the blocks.
        ties: groups of parameter names that are one tensor.
        towers: paths of stacks that read no tokens (of images, of sound); they are left alone.
    """

    model: str
    hidden: int
    stacks: tuple[tuple[Block, ...], ...]
    embeddings: tuple[str, ...]
    head: str | None
    norms: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...] = field(default=())
    towers: tuple[str, ...] = ()

    def blocks(self) -> list[Block]:
        """Return all blocks of all stacks."""
        return [block for stack in self.stacks for block in stack]

    def feed_forwards(self) -> list[FeedForward]:
        """Return all dense feed-forward networks, then those of experts, in the order of the blocks."""
        dense = [feed_forward for block in self.blocks() for feed_forward in block.feed_forwards]
        return dense + [experts.inner for block in self.blocks() for experts in block.experts]

    def __str__(self) -> str:
        lines = [f"{self.model}, hidden size {self.hidden}", f"embeddings: {', '.join(self.embeddings) or 'none'}"]
        for blocks in self.stacks:
            where = blocks[0].path.rsplit(".", 1)[0]
            for run in _alike(blocks):
                first, last = run[0], run[-1]
                count = f"{where}.{_index(first)}" if len(run) == 1 else f"{where}.{_index(first)}..{_index(last)}"
                lines += [f"{count}: {len(run)} block{'s' if len(run) > 1 else ''} like {first.path}", *first.lines()]
        lines.append(f"norms: {', '.join(self.norms) or 'none'}")
        lines.append(f"head: {self.head or 'none'}")
        lines += [f"reads no tokens, left alone: {path}" for path in self.towers]
        lines += [f"tied: {' = '.join(names)}" for names in self.ties]
        return "\n".join(lines)


def _alike(blocks: tuple[Block, ...]) -> list[list[Block]]:
    """Group neighbours that print alike but for their index."""
    runs: list[list[Block]] = []
    shape = None
    for block in blocks:
        current = [line.replace(block.path, "") for line in block.lines()]
        if runs and current == shape:
            runs[-1].append(block)
        else:
            runs.append([block])
            shape = current
    return runs


def _index(block: Block) -> str:
    return block.path.rsplit(".", 1)[-1]
