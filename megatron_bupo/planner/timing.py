"""How long does a pass over a step's responses take, and where does the time go?

A micro-batch takes a stage t_s seconds, the sum over its layers of

    products     multiplications over the rate of large ones, or, where few tokens meet many
                 weights, the weights' bytes over the memory's rate
    attention    over a rate of its own
    the rest     bytes that norms, activation functions and the shuffling of tokens to experts move
                 through memory (`moved_numbers`), over its rate
    collectives  of tensor-, context- and expert-parallel ranks, not overlapped, over the links'

and launches of kernels. A backward pass is two forward passes, and one more with recomputation.
With m micro-batches and v chunks to a stage, 1F1B takes

    (m - 1) max_s t_s + sum_s t_s / v

of which all but m max_s t_s is the bubble. Layers above an internal policy's target cost nothing,
so in place the stages above it wait, and under a layout of its own they do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.planner.activations import FULL, SELECTIVE, Recompute
from megatron_bupo.planner.counts import (
    Stage,
    alike,
    all_parameters,
    all_products,
    attention_products,
    attention_sizes,
    has_experts,
    layer_parameters,
    layer_products,
    mlp_products,
    moved_numbers,
    stage_parameters,
)
from megatron_bupo.planner.hardware import Hardware
from megatron_bupo.planner.memory import Actor
from megatron_bupo.planner.workload import Microbatches, Workload, microbatches

STEP_BYTES = 36  # that Adam reads and writes per parameter: gradient, weights, moments, and copies


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass over all of a step's responses."""

    compute_s: float  # of the busiest stage
    bubble_s: float
    tensor_s: float  # collectives inside layers, of the busiest stage
    flops: float  # of the model, without what is computed again; over all ranks

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.compute_s + self.bubble_s + self.tensor_s


@dataclass(frozen=True)
class Clock:
    """How long an actor takes for the lowest `depth` of its layers."""

    actor: Actor
    work: Workload
    hardware: Hardware
    depth: int

    @property
    def updates(self) -> int:
        """Minibatches of a step."""
        return self.actor.config.algorithm.minibatches

    def scoring(self) -> PassTime:
        """Forward passes over all responses at once."""
        return self._pass(responses=self.work.responses, learns=False)

    def learning(self) -> PassTime:
        """Forward and backward passes of all minibatches."""
        one = self._pass(responses=self.work.responses / self.updates, learns=True)
        n = self.updates
        return PassTime(n * one.compute_s, n * one.bubble_s, n * one.tensor_s, n * one.flops)

    def _pass(self, *, responses: float, learns: bool) -> PassTime:
        actor, layout, work = self.actor, self.actor.layout, self.work
        length = work.prompt_tokens + work.response_tokens
        dealt = microbatches(actor.config, layout, responses=responses, length=length)
        parts = [self._stage_s(stage, dealt, learns=learns) for stage in actor.stages]
        slowest = max(sum(part) for part in parts)
        compute, tensor = max(parts, key=sum)
        whole = (dealt.count - 1) * slowest + sum(map(sum, parts)) / layout.vpp
        whole = max(whole, dealt.count * slowest)
        return PassTime(
            compute_s=dealt.count * compute,
            bubble_s=whole - dealt.count * slowest,
            tensor_s=dealt.count * tensor,
            flops=(3 if learns else 1) * self._flops(responses),
        )

    def _flops(self, responses: float) -> float:
        """Of a forward pass."""
        arch, work = self.actor.arch, self.work
        tokens = responses * (work.prompt_tokens + work.response_tokens)
        products = all_products(arch, self.depth)
        products += self.depth * attention_products(arch, work.context)
        products += work.response_share * self._unembedding
        return 2 * tokens * products

    @property
    def _unembedding(self) -> int:
        arch = self.actor.arch
        return arch.hidden_size * (1 if arch.value_head else arch.vocab_size)

    def _stage_s(self, stage: Stage, dealt: Microbatches, *, learns: bool) -> tuple[float, float]:
        """Seconds of a micro-batch on `stage`: computing, and in collectives."""
        actor, hardware = self.actor, self.hardware
        config, layout = actor.config, actor.layout
        tokens = dealt.tokens / layout.cp
        layers = [layer for layer in stage.layers if layer <= self.depth]
        seconds = (3 if learns else 1) * self._layers_s(layers, tokens)
        if learns:
            seconds += sum(self._again_s(chunk, tokens) for chunk in stage.chunks)
        if stage.last:  # logits are computed again for the backward pass
            rows = tokens * self.work.response_share * (4 if learns else 1)
            rate = hardware.products_per_s(config.model.dtype)
            seconds += rows * self._unembedding / layout.tp / rate
        again = Recompute.of(config.megatron).granularity == FULL
        return seconds, self._collectives_s(layers, tokens, passes=2 + again if learns else 1)

    def _layers_s(self, layers: list[int], tokens: float) -> float:
        """All of `layers`."""
        kinds = alike(self.actor.arch, layers)
        return sum(number * self._layer_s(layer, tokens) for layer, number in kinds)

    def _layer_s(self, layer: int, tokens: float) -> float:
        """Seconds that `tokens` of a rank's row take forward through `layer`, on their own rank."""
        arch, layout, hardware = self.actor.arch, self.actor.layout, self.hardware
        dtype = self.actor.config.model.dtype
        number = 2 if dtype == "bfloat16" else 4
        rate, memory = hardware.products_per_s(dtype), hardware.memory_per_s
        held = layer_parameters(arch, layer, layout).total
        products = tokens * layer_products(arch, layer) / layout.tp
        seconds = max(products / rate, number * held / memory)
        seconds += self._scores_s(tokens)
        share = layout.tp if self.actor.config.parallel.sp else 1
        moved = moved_numbers(arch, layer, layout, rows_share=share)
        return seconds + tokens * number * moved / memory + 1e-3 * hardware.overhead.layer_ms

    def _scores_s(self, tokens: float) -> float:
        """The attention of one layer."""
        actor = self.actor
        scores = tokens * attention_products(actor.arch, self.work.context) / actor.layout.tp
        return scores / self.hardware.scores_per_s(actor.config.model.dtype)

    def _again_s(self, chunk: range, tokens: float) -> float:
        """What is computed a second time of a chunk's layers, for their backward passes."""
        recompute = Recompute.of(self.actor.config.megatron)
        run = [layer for layer in chunk if layer <= self.depth]
        if recompute.granularity != SELECTIVE:
            kept, _ = recompute.kept_and_again(len(run))
            return self._layers_s(run[: len(run) - kept], tokens)
        seconds = 0.0
        for layer, number in alike(self.actor.arch, run):
            if "core_attn" in recompute.modules:
                seconds += number * self._scores_s(tokens)
            if "mlp" in recompute.modules or "moe" in recompute.modules:
                products = tokens * mlp_products(self.actor.arch, layer) / self.actor.layout.tp
                seconds += (
                    number * products / self.hardware.products_per_s(self.actor.config.model.dtype)
                )
        return seconds

    def _collectives_s(self, layers: list[int], tokens: float, *, passes: int) -> float:
        """Of the layers' collectives over tensor-, context- and expert-parallel ranks. Gradients of
        weights need none: a backward pass has those of one forward pass.
        """
        actor = self.actor
        arch, layout, hardware = actor.arch, actor.layout, self.hardware
        number = 2 if actor.config.model.dtype == "bfloat16" else 4
        row, tp = number * tokens * arch.hidden_size, layout.tp
        seconds = 0.0
        for layer, alike_it in alike(arch, layers):
            one = 0.0
            if tp > 1:  # two gathers and two scatters, or two all-reduces
                one += 4 * row * (tp - 1) / tp * passes / hardware.bytes_per_s(tp)
            if layout.cp > 1:
                keys = number * 2 * attention_sizes(arch, tp)[1] * tokens
                away = keys * (layout.cp - 1) * passes
                one += away / hardware.bytes_per_s(tp * layout.cp)
            experts = arch.experts
            if experts is not None and has_experts(arch, layer) and layout.ep > 1:
                one += 2 * passes * self._shuffle_s(row / tp, experts.per_token)
            seconds += alike_it * one
        return seconds

    def _shuffle_s(self, rows: float, choices: int) -> float:
        """Seconds in which `rows` bytes of a rank's tokens go to the ranks of their experts, or
        come back: to its own node and to others at once. The flex dispatcher sends a token once to
        each other node, where alltoall sends all its copies.
        """
        layout, hardware = self.actor.layout, self.hardware
        etp = layout.etp or layout.tp
        near = min(layout.ep, max(1, hardware.node.gpus // etp))
        nodes = layout.ep / near
        inside = rows * choices * (near - 1) / layout.ep / hardware.bytes_per_s(1)
        away = choices * (1 - 1 / nodes)
        if self.actor.config.megatron.get("moe_token_dispatcher_type") == "flex":
            away = (nodes - 1) * (1 - (1 - 1 / nodes) ** choices)
        port = hardware.bytes_per_s(hardware.node.gpus + 1)
        return max(inside, rows * away / port)

    def optimizer_s(self) -> tuple[float, float]:
        """Seconds of all updates' steps, and of summing gradients and gathering parameters over
        data-parallel ranks (not overlapped), of the busiest stage.
        """
        actor, hardware, layout = self.actor, self.hardware, self.actor.layout
        rate = hardware.memory_per_s
        dense, experts = actor.shards
        replicas = layout.world // layout.pp // layout.tp
        number = 2 if actor.config.model.dtype == "bfloat16" else 4
        step = exchange = 0.0
        for stage in actor.stages:
            trained = [layer for layer in stage.layers if layer <= self.depth]
            held = stage_parameters(actor.arch, stage, layout, trained)
            step = max(step, STEP_BYTES * (held.dense / dense + held.experts / experts) / rate)
            moved = 4 + (number if actor.config.parallel.distributed_optimizer else 4)
            share = (replicas - 1) / replicas
            speed = hardware.bytes_per_s(layout.tp * replicas if replicas > 1 else 1)
            exchange = max(exchange, held.total * moved * share / speed)
        return self.updates * step, self.updates * exchange


def sync_seconds(actor: Actor, hardware: Hardware, depth: int) -> float:
    """Gather what was trained over the ranks of each stage, and bring it to the servers in buckets.
    All stages send at once, each through a GPU's network port; where servers share GPUs, every rank
    gathers all of it over the links between ranks.
    """
    config, layout = actor.config, actor.layout
    if config.rollout.engine != "sglang":
        return 0.0
    number = 2 if config.model.dtype == "bfloat16" else 4
    trained = number * all_parameters(actor.arch, depth)
    if config.rollout.colocated:
        at_once, away = 1, trained / hardware.bytes_per_s(layout.world)
    else:
        port = 1e9 * hardware.node.network_gb_per_s * hardware.efficiency.link
        at_once, away = layout.pp, trained / layout.pp / port
    gathered = trained / at_once / hardware.bytes_per_s(layout.tp)
    buckets = -(-trained // (at_once * config.sync.bucket_bytes))
    fixed = hardware.overhead.sync_s + 1e-3 * hardware.overhead.bucket_ms * buckets
    return fixed + gathered + away
