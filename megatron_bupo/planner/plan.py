"""A recipe on stated hardware: what every rank holds in each phase, whether that fits, and how long
a step takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bupo.config.layout import Layout
from megatron_bupo.config.schema import Config
from megatron_bupo.config.server_rules import gpus_per_server
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.planner.hardware import GIB, Hardware
from megatron_bupo.planner.memory import Actor, StageMemory, stage_memories
from megatron_bupo.planner.serving import Serving, embedded, server_gpus, serving
from megatron_bupo.planner.timing import Clock, sync_seconds
from megatron_bupo.planner.workload import Workload


@dataclass(frozen=True)
class Recipe:
    """What is planned: settings, models, a step's work."""

    config: Config
    policy: Architecture
    critic: Architecture | None
    work: Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what is done."""

    generate_s: float
    old_logprobs_s: float  # and the reference's, where there is one
    update_s: float  # forward and backward
    critic_s: float  # all of the critic's passes and steps
    optimizer_s: float
    exchange_s: float  # gradients and parameters, over data-parallel ranks
    sync_s: float
    bubble_s: float  # a part of the passes above
    tensor_s: float  # collectives inside layers, a part of them too
    overlapped: bool  # generation runs ahead while others train
    flops: float  # of the model, in training

    @property
    def train_s(self) -> float:
        """What the trainer does."""
        parts = self.old_logprobs_s + self.update_s + self.critic_s
        return parts + self.optimizer_s + self.exchange_s

    @property
    def total_s(self) -> float:
        """A step."""
        if self.overlapped:
            return max(self.generate_s, self.train_s) + self.sync_s
        return self.generate_s + self.train_s + self.sync_s


@dataclass(frozen=True)
class Phase:
    """One of the run's phases: which layers train, under which layout, and what that takes."""

    name: str
    depth: int
    steps: int
    layout: Layout
    stages: tuple[StageMemory, ...]
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """The answer."""

    recipe: Recipe
    hardware: Hardware
    gpus: int  # of trainer and servers
    phases: tuple[Phase, ...]
    serving: Serving
    problems: tuple[str, ...]  # why it does not fit; none: it does

    @property
    def fits(self) -> bool:
        """Does it?"""
        return not self.problems

    @property
    def full(self) -> Phase:
        """The full policy's phase, which comes last."""
        return self.phases[-1]

    @property
    def shares_gpus(self) -> bool:
        """Do servers and trainer take turns on the same GPUs?"""
        return shares_gpus(self.recipe.config)

    def of_rollouts(self, stage: StageMemory) -> float:
        """Bytes on a GPU of `stage` while responses are generated."""
        return stage.resting + (self.serving.total if self.shares_gpus else 0.0)

    def of_sync(self, stage: StageMemory) -> float:
        """Bytes on a GPU of `stage` while weights go to servers that have no cache yet."""
        beside = self.serving.weights + self.serving.rest if self.shares_gpus else 0.0
        return stage.resting + stage.gathering + beside

    def of_training(self, stage: StageMemory) -> float:
        """Bytes on a GPU of `stage` while the trainer trains."""
        return stage.training + (self.serving.asleep if self.shares_gpus else 0.0)

    @property
    def room(self) -> float:
        """What share of a GPU's memory servers may keep for good, in steps of a twentieth."""
        resting = [stage.resting for phase in self.phases for stage in phase.stages]
        taken = (max(resting) if self.shares_gpus else 0.0) + self.serving.rest
        return math.floor(20 * (1 - taken / self.hardware.memory_bytes)) / 20

    @property
    def only_servers_are_too_large(self) -> bool:
        """Does training fit, and generating beside it not?"""
        stages = [stage for phase in self.phases for stage in phase.stages]
        trains = all(self.of_training(stage) <= self.hardware.memory_bytes for stage in stages)
        return self.shares_gpus and trains and not self.fits

    @property
    def peak_bytes(self) -> float:
        """The most that any GPU holds at any time."""
        stages = [stage for phase in self.phases for stage in phase.stages]
        peaks = [
            bytes_of(stage)
            for stage in stages
            for bytes_of in (self.of_rollouts, self.of_training, self.of_sync)
        ]
        return max([*peaks, 0.0 if self.shares_gpus else self.serving.total])

    def tokens_per_s_per_gpu(self, phase: Phase) -> float:
        """Tokens of prompts and responses, per second of a step and GPU."""
        return self.recipe.work.tokens / phase.time.total_s / self.gpus

    def flops_used(self, phase: Phase) -> float:
        """The model's FLOPs in training, as a share of the trainer's GPUs' peak meanwhile."""
        peak = self.hardware.gpu.flops_per_s(self.recipe.config.model.dtype) * phase.layout.world
        return phase.time.flops / (phase.time.train_s * peak)


def shares_gpus(config: Config) -> bool:
    """Do whoever generates and whoever trains use the same GPUs?"""
    return config.rollout.engine == "embedded" or config.rollout.colocated


def shares_servers(config: Config) -> bool:
    """Do servers, and not the embedded engine, share the trainer's GPUs?"""
    return config.rollout.engine == "sglang" and config.rollout.colocated


def world_of(config: Config, gpus: int | None) -> int | None:
    """The trainer's ranks on `gpus`; None: as many as `parallel.*` asks for."""
    if config.rollout.colocated:
        return gpus or server_gpus(config)
    return None if gpus is None else gpus - server_gpus(config)


def make_plan(recipe: Recipe, hardware: Hardware, layout: Layout) -> Plan:
    """The plan of `recipe`, whose trainer has `layout`."""
    config, work = recipe.config, recipe.work
    if config.rollout.engine == "sglang":
        served = serving(config, recipe.policy, work, hardware)
    else:
        served = embedded(config, recipe.policy, work, hardware, ranks=layout.world)
    phases, left = [], config.steps
    for layer, steps in config.bupo.phases():
        phases.append(_phase(recipe, hardware, layout, served, depth=layer, steps=min(steps, left)))
        left -= min(steps, left)
    phases.append(_phase(recipe, hardware, layout, served, depth=recipe.policy.layers, steps=left))
    gpus = layout.world + (0 if shares_gpus(config) else served.gpus)
    plan = Plan(recipe, hardware, gpus, tuple(phases), served, ())
    problems = tuple(_problems(plan))
    return Plan(recipe, hardware, gpus, tuple(phases), served, problems)


def _phase(
    recipe: Recipe,
    hardware: Hardware,
    layout: Layout,
    served: Serving,
    *,
    depth: int,
    steps: int,
) -> Phase:
    config, work = recipe.config, recipe.work
    internal = depth < recipe.policy.layers
    actor = Actor(recipe.policy, config, layout).of_phase(depth)
    critic = (
        None if recipe.critic is None else Actor(recipe.critic, recipe.config.of_critic, layout)
    )
    stages = stage_memories(actor, critic, work, hardware, depth=depth)
    ahead = config.rollout.max_staleness > 0 and not internal
    time = _step_time(actor, critic, work, hardware, served, depth=depth, overlapped=ahead)
    name = f"internal layer {depth}" if internal else "full policy"
    return Phase(name, depth, steps, actor.layout, tuple(stages), time)


def _step_time(
    actor: Actor,
    critic: Actor | None,
    work: Workload,
    hardware: Hardware,
    served: Serving,
    *,
    depth: int,
    overlapped: bool,
) -> StepTime:
    algorithm = actor.config.algorithm
    clock = Clock(actor, work, hardware, depth)
    learning, scoring = clock.learning(), clock.scoring()
    passes = (algorithm.needs_old_logprobs) + (algorithm.kl_coefficient > 0)
    step, exchange = clock.optimizer_s()
    beside = 0.0
    if critic is not None:
        its = Clock(critic, work, hardware, critic.arch.layers)
        beside = its.scoring().total_s + its.learning().total_s + sum(its.optimizer_s())
    return StepTime(
        generate_s=served.generate_s,
        old_logprobs_s=passes * scoring.total_s,
        update_s=learning.total_s,
        critic_s=beside,
        optimizer_s=step,
        exchange_s=exchange,
        sync_s=sync_seconds(actor, hardware, depth),
        bubble_s=learning.bubble_s + passes * scoring.bubble_s,
        tensor_s=learning.tensor_s + passes * scoring.tensor_s,
        overlapped=overlapped,
        flops=learning.flops + passes * scoring.flops,
    )


def _problems(plan: Plan) -> list[str]:
    """Why the plan does not fit, the worst of each kind."""
    memory, problems = plan.hardware.memory_bytes, []
    shared = " beside the servers" if plan.shares_gpus and plan.serving.engine == "sglang" else ""
    for what, bytes_of in (
        ("training", plan.of_training),
        ("generating", plan.of_rollouts),
        ("the weight sync", plan.of_sync),
    ):
        needed = {
            bytes_of(stage): (phase.name, stage.stage)
            for phase in plan.phases
            for stage in phase.stages
        }
        worst = max(needed)
        if worst > memory:
            phase, stage = needed[worst]
            problems.append(
                f"{what} in the phase of the {phase} takes {worst / GIB:.1f} GiB{shared} on each "
                f"GPU of stage {stage}, and there are {plan.hardware.gpu.memory_gib:g}"
            )
    served = plan.serving
    if not plan.shares_gpus and served.total > memory:
        problems.append(
            f"the servers need {served.total / GIB:.1f} GiB per GPU of "
            f"{plan.hardware.gpu.memory_gib:g}"
        )
    problems += _server_problems(plan)
    if served.engine == "sglang" and served.sequences < 1:
        problems.append(
            f"the servers' weights take {served.weights / GIB:.1f} GiB per GPU, and "
            f"sglang.mem_fraction_static leaves no room for keys and values of a response"
        )
    return problems


def _server_problems(plan: Plan) -> list[str]:
    """Servers that could not start, however much memory there is."""
    config, arch = plan.recipe.config, plan.recipe.policy
    if config.rollout.engine != "sglang" or config.servers.addresses:
        return []
    tp, needed, there = config.sglang.get("tp_size", 1), gpus_per_server(config), plan.hardware.node
    problems = []
    if needed > there.gpus:
        problems.append(f"a server needs {needed} GPUs of one node, and there are {there.gpus}")
    if arch.heads % tp:
        problems.append(f"sglang.tp_size={tp} does not divide the {arch.heads} attention heads")
    return problems
