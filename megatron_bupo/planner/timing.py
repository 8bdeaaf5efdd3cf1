"""How long does a pass over a step's responses take, and where does the time go?

A micro-batch takes a stage t_s seconds: products over the reached share of the peak, attention
over its own, tensor-parallel collectives (not overlapped) over the reached share of the links, and
the launches of kernels. With m micro-batches and v chunks to a stage, 1F1B takes

    (m - 1) max_s t_s + sum_s t_s / v

of which all but m max_s t_s is the bubble. Layers above an internal policy's target cost nothing,
so in place the stages above it wait, and under a layout of its own they do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.planner.activations import FULL, Recompute
from megatron_bupo.planner.counts import (
    Stage,
    attention_products,
    attention_sizes,
    has_experts,
    layer_products,
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
        layers = range(1, self.depth + 1)
        products = sum(layer_products(arch, n) for n in layers)
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
        arch, layout, dtype = actor.arch, actor.layout, actor.config.model.dtype
        efficiency, peak = hardware.efficiency, hardware.gpu.flops_per_s(dtype)
        tokens = dealt.tokens / layout.cp
        layers = [layer for layer in stage.layers if layer <= self.depth]
        again = Recompute.of(actor.config.megatron).granularity == FULL
        times = (3 + again) if learns else 1
        products = sum(layer_products(arch, n) for n in layers) / layout.tp
        scores = len(layers) * attention_products(arch, self.work.context) / layout.tp
        seconds = 2 * tokens * times * products / (peak * efficiency.matmul)
        seconds += 2 * tokens * times * scores / (peak * efficiency.attention)
        if stage.last:  # logits are computed again for the backward pass
            rows = tokens * self.work.response_share * (4 if learns else 1)
            seconds += 2 * rows * self._unembedding / layout.tp / (peak * efficiency.matmul)
        seconds += 1e-3 * hardware.overhead.layer_ms * len(layers) * times
        return seconds, self._collectives_s(layers, tokens, times)

    def _collectives_s(self, layers: list[int], tokens: float, times: int) -> float:
        """Of the layers' collectives over tensor-, context- and expert-parallel ranks."""
        actor = self.actor
        arch, layout, hardware = actor.arch, actor.layout, self.hardware
        number = 2 if actor.config.model.dtype == "bfloat16" else 4
        row, tp = number * tokens * arch.hidden_size, layout.tp
        passes = times - (times > 1)  # gradients of weights need none, but inputs once more
        seconds = 0.0
        for layer in layers:
            if tp > 1:  # two gathers and two scatters, or two all-reduces
                seconds += 4 * row * (tp - 1) / tp * passes / hardware.bytes_per_s(tp)
            if layout.cp > 1:
                keys = number * 2 * attention_sizes(arch, tp)[1] * tokens
                away = keys * (layout.cp - 1) * passes
                seconds += away / hardware.bytes_per_s(tp * layout.cp)
            experts = arch.experts
            if experts is not None and has_experts(arch, layer) and layout.ep > 1:
                etp = layout.etp or tp
                sent = 2 * row / tp * experts.per_token * (layout.ep - 1) / layout.ep
                seconds += sent * passes / hardware.bytes_per_s(etp * layout.ep)
        return seconds

    def optimizer_s(self) -> tuple[float, float]:
        """Seconds of all updates' steps, and of summing gradients and gathering parameters over
        data-parallel ranks (not overlapped), of the busiest stage.
        """
        actor, hardware, layout = self.actor, self.hardware, self.actor.layout
        rate = 1e12 * hardware.gpu.memory_tb_per_s * hardware.efficiency.memory
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
