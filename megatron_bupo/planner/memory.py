"""What does each rank hold, by category, when it holds most?

Per parameter, with n ranks among whom the distributed optimizer shards (data- times context-
parallel ones; for an expert those that hold the same one; without it 1):

    bf16   2 weights + 4 gradients (fp32) + 12 / n (fp32 weights, Adam's two moments)
    fp32   4 weights + 4 gradients + 8 / n

A pipeline stage holds activations of the micro-batches that it has begun (1F1B), the last one what
reads log-probs out besides. In between, while weights are gathered for the servers, those of one
layer exist whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.config.internal_layout_rules import internal_config
from megatron_bupo.config.layout import Layout, layers_of_stages, parallel_sizes
from megatron_bupo.config.schema import Config
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.planner.activations import (
    TokenBytes,
    in_flight,
    read_out_bytes,
    stage_activations,
)
from megatron_bupo.planner.counts import (
    Held,
    Stage,
    layer_parameters,
    stage_parameters,
    vocabulary_parameters,
)
from megatron_bupo.planner.hardware import GIB, Hardware
from megatron_bupo.planner.workload import Workload, microbatches

PARCEL_BYTES = 2**29  # of experts, gathered at a time; of buckets, sent at a time


@dataclass(frozen=True)
class Actor:
    """A model that trains: the policy, or PPO's critic; under one layout."""

    arch: Architecture
    config: Config
    layout: Layout

    @property
    def stages(self) -> list[Stage]:
        """Of its pipeline."""
        dealt = layers_of_stages(self.arch.layers, self.layout, self.config.megatron)
        last = len(dealt) - 1
        return [
            Stage(number, tuple(chunks), number == 0, number == last)
            for number, chunks in enumerate(dealt)
        ]

    def of_phase(self, depth: int) -> Actor:
        """Who trains the lowest `depth` layers: with `bupo.internal_layout` a smaller model."""
        if depth == self.arch.layers or self.config.bupo.internal_layout is None:
            return self
        config = internal_config(self.config)
        return Actor(self.arch.lowest(depth), config, parallel_sizes(config, self.layout.world))

    @property
    def shards(self) -> tuple[int, int]:
        """Among how many ranks optimizer states are dealt out: of dense parameters, of experts."""
        layout = self.layout
        if not self.config.parallel.distributed_optimizer:
            return 1, 1
        ranks = layout.world // layout.pp
        return ranks // layout.tp, ranks // (layout.ep * (layout.etp or layout.tp))


@dataclass(frozen=True)
class Static:
    """Bytes that a rank holds for good."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def static_bytes(held: Held, actor: Actor) -> Static:
    """Of the parameters `held`."""
    bf16 = actor.config.model.dtype == "bfloat16"
    dense, experts = actor.shards
    stepped = held.dense / dense + held.experts / experts
    weights = (2 if bf16 else 4) * held.total
    return Static(weights, 4 * held.total, (12 if bf16 else 8) * stepped)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage, in the phase's training and between steps."""

    stage: int
    layers: int
    parameters: int  # a count, of the policy alone
    weights: float
    gradients: float
    optimizer: float
    critic: float  # its weights, gradients and optimizer states
    activations: float  # of the policy or the critic, whichever holds more
    working: float  # of reading log-probs out or of a layer's backward pass, whichever is more
    gathering: float  # whole layers and buckets, in a weight sync
    context: float  # CUDA, NCCL, cuBLAS
    fragments: float  # what the allocator cannot use again

    @property
    def static(self) -> float:
        """What is there for good."""
        return self.weights + self.gradients + self.optimizer + self.critic

    @property
    def training(self) -> float:
        """The most that training takes."""
        return self.resting + self.activations + self.working + self.fragments

    @property
    def resting(self) -> float:
        """What a rank keeps while servers generate."""
        return self.static + self.context


def stage_memories(
    actor: Actor, critic: Actor | None, work: Workload, hardware: Hardware, *, depth: int
) -> list[StageMemory]:
    """Of each stage, while the lowest `depth` layers of the policy train."""
    found = []
    of_critic = critic.stages if critic else []
    for stage in actor.stages:
        held = stage_parameters(actor.arch, stage, actor.layout)
        static = static_bytes(held, actor)
        activations, working = passes(actor, stage, work, hardware, depth=depth)
        beside = 0.0
        if critic is not None:
            its = of_critic[stage.number]
            parameters = stage_parameters(critic.arch, its, critic.layout)
            beside = static_bytes(parameters, critic).total
            whole = passes(critic, its, work, hardware, depth=critic.arch.layers)
            if sum(whole) > activations + working:
                activations, working = whole
        found.append(
            StageMemory(
                stage=stage.number,
                layers=len(stage.layers),
                parameters=held.total,
                weights=float(static.weights),
                gradients=float(static.gradients),
                optimizer=static.optimizer,
                critic=beside,
                activations=activations,
                working=working,
                gathering=gathering_bytes(actor),
                context=hardware.reserve.trainer_gib * GIB,
                fragments=hardware.reserve.fragments * (activations + working),
            )
        )
    return found


def passes(
    actor: Actor, stage: Stage, work: Workload, hardware: Hardware, *, depth: int
) -> tuple[float, float]:
    """Bytes of activations, and of what works beside them, at most, with responses of full length.
    Log-probs have been read out before the first layer is walked back through.
    """
    config, layout = actor.config, actor.layout
    dealt = microbatches(
        config,
        layout,
        responses=work.responses / config.algorithm.minibatches,
        length=work.longest,
    )
    tokens = dealt.tokens / layout.cp
    per_token = TokenBytes(actor.arch, config, layout, hardware.plain_layers)
    activations, working = stage_activations(
        per_token,
        stage,
        depth=depth,
        tokens=tokens,
        flights=in_flight(stage, layout, dealt.count),
    )
    if stage.last:
        share = work.longest_response / work.longest
        read_out = read_out_bytes(per_token, tokens=tokens, response_share=share)
        working = max(working, read_out)
    return activations, working


def gathering_bytes(actor: Actor) -> float:
    """A layer, or the embedding, from all its ranks' shards: laid flat, put together, in a bucket
    that is sent. Experts come in parcels.
    """
    arch, number = actor.arch, 2 if actor.config.model.dtype == "bfloat16" else 4
    alone = Layout(1, 1, 1, 1, 1)
    layers = [layer_parameters(arch, layer, alone) for layer in (1, arch.layers)]
    units = [number * held.dense for held in layers]
    units.append(number * vocabulary_parameters(arch, 1))
    if layers[-1].experts:
        units.append(PARCEL_BYTES)
    largest = max(units)
    flat = largest / actor.layout.tp
    ranks = actor.layout.world
    if ranks == 1 and actor.config.rollout.engine == "embedded":
        return largest
    return flat + 2 * largest + 2 * actor.config.sync.bucket_bytes
