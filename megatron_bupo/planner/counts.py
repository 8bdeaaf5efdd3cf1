"""How many parameters does a rank hold, and what does a token cost to compute?

Counts are exact: what Megatron-Core makes of an architecture under a layout (tests count them on
real ranks). Dense parameters are cut over tensor-parallel ranks and copied over data- and
context-parallel ones; experts are dealt out over expert-parallel ranks and cut by `etp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_bupo.config.layout import Layout
from megatron_bupo.hf.architecture import Architecture


@dataclass(frozen=True)
class Held:
    """Parameters on one rank: those that data-parallel ranks share, and experts, which are shared
    by fewer.
    """

    dense: int = 0
    experts: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage has of the model."""

    number: int  # from 0
    chunks: tuple[range, ...]  # of layers, counted from 1
    first: bool
    last: bool

    @property
    def layers(self) -> list[int]:
        """All of its layers."""
        return [layer for chunk in self.chunks for layer in chunk]

    def up_to(self, depth: int) -> int:
        """How many of its layers are among the model's lowest `depth`."""
        return sum(layer <= depth for layer in self.layers)


def has_experts(arch: Architecture, layer: int) -> bool:
    """Does `layer` (from 1) have experts in the place of an MLP?"""
    return arch.experts is not None and layer in arch.experts.layers


def attention_sizes(arch: Architecture, tp: int = 1) -> tuple[int, int]:
    """Channels of all queries, and of all keys, on a tensor-parallel rank."""
    return arch.heads * arch.head_dim // tp, arch.kv_heads * arch.head_dim // tp


def layer_parameters(arch: Architecture, layer: int, layout: Layout) -> Held:
    """Of one layer on each rank of its stage."""
    tp, hidden = layout.tp, arch.hidden_size
    queries, keys = attention_sizes(arch, tp)
    dense = 2 * hidden + 2 * hidden * queries + 2 * hidden * keys
    dense += 2 * arch.head_dim * arch.qk_norm + (queries + 2 * keys) * arch.qkv_bias
    dense += hidden * arch.output_bias
    if has_experts(arch, layer):
        experts = arch.experts
        assert experts is not None
        size = 3 * hidden * experts.ffn_size // (layout.etp or tp)
        return Held(dense + experts.number * hidden, experts.number // layout.ep * size)
    mlp = 3 * hidden * arch.ffn_size // tp
    bias = (2 * arch.ffn_size // tp + hidden) * arch.mlp_bias
    return Held(dense + mlp + bias)


def vocabulary_parameters(arch: Architecture, tp: int) -> int:
    """Of the embedding, or the unembedding, on a tensor-parallel rank."""
    return -(-arch.vocab_size // tp) * arch.hidden_size


def stage_parameters(
    arch: Architecture, stage: Stage, layout: Layout, layers: Iterable[int] | None = None
) -> Held:
    """On each rank of `stage`; `layers`: with these of its layers alone."""
    chosen = stage.layers if layers is None else layers
    held = sum((layer_parameters(arch, layer, layout) for layer in chosen), Held())
    table = vocabulary_parameters(arch, layout.tp)
    dense = table * stage.first
    if stage.last:
        dense += arch.hidden_size  # the final norm
        if arch.value_head:
            dense += arch.hidden_size
        elif not arch.tied or not stage.first:  # a tied unembedding is a copy on another stage
            dense += table
    return held + Held(dense)


def all_parameters(arch: Architecture, layers: int | None = None) -> int:
    """Of the whole model, or of its lowest `layers` with all that is not a layer."""
    depth = arch.layers if layers is None else layers
    whole = Stage(0, (range(1, depth + 1),), first=True, last=True)
    return stage_parameters(arch, whole, Layout(1, 1, 1, 1, 1)).total


def layer_products(arch: Architecture, layer: int) -> int:
    """Multiplications that a token goes through in the matrices of `layer`."""
    hidden = arch.hidden_size
    queries, keys = attention_sizes(arch)
    attention = 2 * hidden * queries + 2 * hidden * keys
    experts = arch.experts
    if experts is not None and has_experts(arch, layer):
        return attention + hidden * (experts.number + 3 * experts.ffn_size * experts.per_token)
    return attention + 3 * hidden * arch.ffn_size


def attention_products(arch: Architecture, context: float) -> float:
    """Multiplications that a token with `context` tokens before it costs in a layer's scores."""
    return 2 * attention_sizes(arch)[0] * context
