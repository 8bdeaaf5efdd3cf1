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

    def times(self, number: int) -> Held:
        """Of as many layers."""
        return Held(self.dense * number, self.experts * number)

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


def alike(arch: Architecture, layers: Iterable[int]) -> list[tuple[int, int]]:
    """One layer of each kind among `layers`, and how many there are."""
    with_experts = set() if arch.experts is None else set(arch.experts.layers)
    found: dict[bool, list[int]] = {}
    for layer in layers:
        found.setdefault(layer in with_experts, []).append(layer)
    return [(same[0], len(same)) for same in found.values()]


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
    held = Held()
    for layer, number in alike(arch, chosen):
        held += layer_parameters(arch, layer, layout).times(number)
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
    queries, keys = attention_sizes(arch)
    return 2 * arch.hidden_size * (queries + keys) + mlp_products(arch, layer)


def all_products(arch: Architecture, depth: int) -> int:
    """Those of the lowest `depth` layers."""
    return sum(n * layer_products(arch, layer) for layer, n in alike(arch, range(1, depth + 1)))


def mlp_products(arch: Architecture, layer: int) -> int:
    """Those of its MLP, or of a token's experts and their choice."""
    experts = arch.experts
    if experts is None or not has_experts(arch, layer):
        return 3 * arch.hidden_size * arch.ffn_size
    return arch.hidden_size * (experts.number + 3 * experts.ffn_size * experts.per_token)


def attention_products(arch: Architecture, context: float) -> float:
    """Multiplications that a token with `context` tokens before it costs in a layer's scores."""
    return 2 * attention_sizes(arch)[0] * context


def moved_numbers(arch: Architecture, layer: int, layout: Layout, *, rows_share: int) -> float:
    """Numbers that a token's way forward through `layer` reads and writes beside its products, on
    each rank: `rows_share` ranks share what is as wide as the model.

    Norms and residual additions read and write rows of hidden states, 10 times in all; rotary
    angles read and write queries and keys twice, norms of heads once; an activation function reads
    two rows of MLP channels and writes one. Tokens' copies for experts are written where they leave
    and, from other ranks, where they arrive, are sorted there by expert and sorted back, and are
    added up; each expert's channels are multiplied by a probability.
    """
    queries, keys = attention_sizes(arch, layout.tp)
    moved = 10 * arch.hidden_size / rows_share + (4 + 2 * arch.qk_norm) * (queries + keys)
    experts = arch.experts
    if experts is None or not has_experts(arch, layer):
        return moved + 3 * arch.ffn_size / layout.tp
    passes = 2 if layout.ep == 1 else 6
    of_copy = passes * arch.hidden_size / rows_share + 5 * experts.ffn_size / layout.tp
    return moved + experts.per_token * of_copy
