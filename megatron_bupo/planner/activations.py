"""What does a token leave behind for the backward pass?

Counted tensor by tensor, as autograd saves them. Of a layer with hidden size h, q channels of
queries and k of keys on this rank, f of the MLP, and b bytes to a number::

    two norms       6 b h  (bf16: 8 b h, as their input is kept in fp32); Transformer Engine: 4 b h
    attention       3 b q + 2 b k + 4 b head_dim (rotary angles); Transformer Engine without the
                    copies that torch's kernel needs: 2 b q + 2 b k + 4 b head_dim
    norms of q, k   fp32: 3 b q + 3 b k + b k (views of one tensor); bf16: 3 b q + 3 b k
    MLP             3 b f; experts: b (h + 3 f) for each that the token goes to

Sequence parallelism divides what is as wide as h. The plain layers are held against real ones by
tools/check_plan.py and tests; Transformer Engine's are counted from its modules, and owed a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_bupo.config.layout import Layout
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.hf.experts import Experts
from megatron_bupo.planner.counts import Stage, alike, attention_sizes, has_experts

FULL, SELECTIVE = "full", "selective"
GRANULARITY, METHOD = "recompute_granularity", "recompute_method"
PIECE = 2**22  # numbers that reading out copies at a time, as mcore/logprobs.py has it
NUMBER, MODULES = "recompute_num_layers", "recompute_modules"


@dataclass(frozen=True)
class Recompute:
    """What a backward pass computes again, as `megatron.recompute_*` says."""

    granularity: str | None
    block: bool  # the first `layers` of each chunk alone; else all, `layers` at a time
    layers: int
    modules: tuple[str, ...]

    @staticmethod
    def of(megatron: dict[str, Any]) -> Recompute:
        """As native keys have it."""
        granularity, method = megatron.get(GRANULARITY), megatron.get(METHOD)
        number, modules = megatron.get(NUMBER, 1), megatron.get(MODULES, ["core_attn"])
        for key, value, holds, expected in (
            (GRANULARITY, granularity, granularity in (None, FULL, SELECTIVE), "full or selective"),
            (METHOD, method, method in (None, "uniform", "block"), "uniform or block"),
            (NUMBER, number, type(number) is int and number > 0, "a number of layers"),
            (MODULES, modules, isinstance(modules, list), "a list of modules"),
        ):
            if not holds:
                raise InputError(f"megatron.{key}={value}", f"must be {expected}")
        return Recompute(granularity, method == "block", number, tuple(modules))

    def kept_and_again(self, layers: int) -> tuple[int, int]:
        """Of `layers` of a chunk: those that keep all they compute, and inputs that are kept to
        compute the others again.
        """
        if self.granularity != FULL:
            return layers, 0
        if self.block:
            again = min(self.layers, layers)
            return layers - again, again
        return 0, -(-layers // self.layers)

    def at_once(self, layers: int) -> int:
        """Of `layers` of a chunk: whole ones that are computed again at a time."""
        if self.granularity != FULL:
            return 0
        return min(1 if self.block else self.layers, layers)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes per token of a rank's row; `plain`: layers of torch's modules."""

    arch: Architecture
    config: Config
    layout: Layout
    plain: bool

    @property
    def number(self) -> int:
        """Bytes of a number."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def share(self) -> int:
        """Over how many ranks sequence parallelism spreads what is as wide as the model."""
        return self.layout.tp if self.config.parallel.sp else 1

    @property
    def hidden(self) -> float:
        """A row of hidden states."""
        return self.number * self.arch.hidden_size / self.share

    def layer(self, layer: int) -> float:
        """What `layer` saves."""
        recompute = Recompute.of(self.config.megatron)
        return self._saved(layer, recompute.modules if recompute.granularity == SELECTIVE else ())

    def computed_again(self, layer: int) -> float:
        """What modules of `layer` did not save, and have when the backward pass is there."""
        return self._saved(layer, ()) - self.layer(layer)

    def _saved(self, layer: int, again: tuple[str, ...]) -> float:
        norms = self.hidden * self._norm_copies
        if "layernorm" in again:
            norms /= 2
        attention = self._attention(recomputed="core_attn" in again)
        mlp = 0.0 if "mlp" in again or "moe" in again else self._mlp(layer)
        return norms + attention + mlp

    @property
    def _norm_copies(self) -> float:
        if not self.plain:
            return 4
        return 8 if self.number == 2 else 6

    def _attention(self, *, recomputed: bool) -> float:
        arch, b = self.arch, self.number
        queries, keys = attention_sizes(arch, self.layout.tp)
        copies = 3 if self.plain else 2
        seen = 1.0
        if self.plain and self.layout.cp > 1:  # those of all ranks that a rank's two parts look at
            seen = self.layout.cp + 0.5
        saved = b * (copies * queries + 2 * seen * keys + 4 * arch.head_dim)
        if recomputed:
            saved -= b * queries
        if arch.qk_norm:
            saved += 3 * b * (queries + keys) + (b * keys if b == 4 else 0)
        statistics = 4 * (2 / self.share + arch.heads / self.layout.tp)
        if arch.qk_norm:
            statistics += 4 * (arch.heads + arch.kv_heads) / self.layout.tp
        return saved + statistics

    def _mlp(self, layer: int) -> float:
        arch, b = self.arch, self.number
        experts = arch.experts
        if experts is None or not has_experts(arch, layer):
            return 3 * b * arch.ffn_size / self.layout.tp
        etp = self.layout.etp or self.layout.tp
        tokens = self._expert_tokens(experts)
        saved = b * tokens * (arch.hidden_size + 3 * experts.ffn_size / etp)
        return saved + 5 * experts.number / self.share  # who is chosen, and by what score

    def _expert_tokens(self, experts: Experts) -> float:
        """Choices of experts that fall on this rank, dealt evenly. With tensor parallelism there is
        sequence parallelism too, and ranks that cut an expert gather their tokens.
        """
        return experts.per_token * (self.layout.etp or self.layout.tp) / self.layout.tp

    def transient(self, layer: int) -> float:
        """Gradients that exist at a time while `layer` is walked back through."""
        arch, b = self.arch, self.number
        experts = arch.experts
        width = arch.ffn_size / self.layout.tp
        if experts is not None and has_experts(arch, layer):
            channels = experts.ffn_size / (self.layout.etp or self.layout.tp)
            width = self._expert_tokens(experts) * (arch.hidden_size / 2 + channels)
        gathered = 0.0
        if self.plain and self.layout.cp > 1:  # keys and values of all ranks, and their gradients
            gathered = 4 * b * self.layout.cp * attention_sizes(arch, self.layout.tp)[1]
        return 3 * b * width + 2 * self.hidden + gathered


def in_flight(stage: Stage, layout: Layout, count: int) -> float:
    """Micro-batches whose activations a stage holds at most, of `count`; in whole stages, so with
    interleaved chunks a fraction. 1F1B: those that it starts before its first backward pass, and
    one.
    """
    before = layout.pp - stage.number - 1
    if layout.vpp == 1:
        return min(before + 1, count)
    chunks = 2 * before + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, count * layout.vpp) / layout.vpp


def stage_activations(
    per_token: TokenBytes, stage: Stage, *, depth: int, tokens: float, flights: float
) -> tuple[float, float]:
    """Bytes that `stage` holds at most for the backward passes of the lowest `depth` layers, with
    `tokens` in a rank's row and `flights` micro-batches begun; and what the backward pass of one
    layer uses beside them.
    """
    recompute = Recompute.of(per_token.config.megatron)
    saved = most = 0.0
    for chunk in stage.chunks:
        run = [layer for layer in chunk if layer <= depth]
        if not run:
            continue
        kept, inputs = recompute.kept_and_again(len(run))
        kinds = alike(per_token.arch, run)
        of_kept = sum(
            number * per_token.layer(layer)
            for layer, number in alike(per_token.arch, run[len(run) - kept :])
        )
        saved += inputs * per_token.hidden + of_kept
        # Layers that keep all are above the others, and gone when those are computed again.
        whole = max(per_token.layer(layer) for layer, _ in kinds)
        again = max(recompute.at_once(len(run)) * whole - of_kept, 0.0)
        again += max(per_token.computed_again(layer) for layer, _ in kinds)
        most = max(most, again + max(per_token.transient(layer) for layer, _ in kinds))
    # what enters a stage and what it sends on
    saved += per_token.hidden * ((not stage.first) + (not stage.last))
    return tokens * saved * flights, tokens * most


def read_out_bytes(per_token: TokenBytes, *, tokens: float, response_share: float) -> float:
    """Bytes that the last stage holds at most from the final norm to log-probs: the norm's, the
    rows that are read out with their gradient, a chunk of logits.
    """
    arch, b = per_token.arch, per_token.number
    rows = tokens * response_share
    norm = (5 if b == 2 else 2) * per_token.hidden * tokens
    picked = 2 * rows * b * arch.hidden_size + per_token.hidden * tokens
    if per_token.share > 1:
        picked += tokens * b * arch.hidden_size  # gathered
    if arch.value_head:
        return norm + picked
    chunk = min(per_token.config.trainer.logprob_chunk_tokens, rows)
    shard = -(-arch.vocab_size // per_token.layout.tp)
    copied = chunk * arch.hidden_size  # gradients of a chunk's rows
    if per_token.config.algorithm.entropy_coefficient:
        copied += min(PIECE, chunk * shard)
    if b == 2:  # gradients of a slab of the logits, to be multiplied; a CPU does that in fp32
        width = min(shard, PIECE / (max(chunk, arch.hidden_size) if per_token.plain else chunk))
        copied += chunk * width / 2
        if per_token.plain:
            copied += chunk * width + arch.hidden_size * width
    return norm + picked + 4 * (chunk * shard + copied)
