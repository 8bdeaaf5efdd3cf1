"""From a checked config to live objects: the only file that knows every implementation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_bupo import checkpoints
from megatron_bupo.algorithm.bupo import InternalLayerPolicy, PhaseSchedule
from megatron_bupo.config import Config, expand, flatten, to_yaml
from megatron_bupo.config.checks import doubts
from megatron_bupo.config.server_rules import STARTED
from megatron_bupo.data.order import PromptStream
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.engines import benchmarks, prompt_stream, rollout_engine, sampling_at
from megatron_bupo.evaluation.asking import Benchmark
from megatron_bupo.guard import Guard, Watch
from megatron_bupo.launch.local import is_first_rank
from megatron_bupo.mcore import checkpoint, parallel
from megatron_bupo.mcore.critic import build_critic
from megatron_bupo.mcore.phase_actor import plan_actor
from megatron_bupo.planning_credit import PlanningCredit
from megatron_bupo.preflight import Preflight
from megatron_bupo.probe import Probe
from megatron_bupo.record.heartbeat import heartbeat
from megatron_bupo.record.journal import Journal
from megatron_bupo.record.mismatch import Mismatch
from megatron_bupo.record.skipped import SkippedUpdates
from megatron_bupo.replay import Replay
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rollout.ahead import RolloutStream
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build(ready: Preflight) -> Run:
    """Everything the loop uses, resumed from the run directory's newest checkpoint. Collective."""
    config, arch = ready.config, ready.architecture
    run_dir = Path(expand(config.run_dir))
    with ExitStack() as stack:
        stack.enter_context(heartbeat(run_dir, ready.layout.world, config.logging.stall_s))
        replay = None if config.debug.replay is None else Replay(config.debug.replay)
        most = config.rollout.max_response_tokens
        grader = replay or Grader(config.reward, max_response_tokens=most)  # early: starts aside
        stack.callback(grader.close)
        first_step, path = checkpoints.newest_checkpoint(run_dir) or (0, None)
        guard = Guard(config.bupo.guard, run_dir, Watch.of(path), writes=is_first_rank())
        schedule = _schedule(config).until(guard.watch.left_before)
        plan = plan_actor(schedule.policy_at(first_step), arch, config, ready.layout.world)
        stack.enter_context(parallel.joined(plan.layout, seed=config.seed))
        tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
        engine = replay or rollout_engine(  # early: servers start while the rest loads
            config,
            arch,
            tokenizer,
            run_dir=run_dir,
            current_weights=lambda: run.whole_weights(),  # noqa: PLW0108 - there is no run yet
        )
        stack.callback(engine.close)
        trainer = plan.build()
        critic = None if ready.critic is None else build_critic(ready.critic, config)
        if path is not None:
            checkpoint.load(trainer, path, critic=critic)
        journal = Journal(run_dir, config, first_step=first_step, speaks=dist.get_rank() == 0)
        stack.enter_context(journal)
        _tell(journal, ready, path)
        prompts = replay or prompt_stream(config, tokenizer)
        run = Run(
            config=config,
            architecture=arch,
            run_dir=run_dir,
            trainer=trainer,
            critic=critic,
            engine=engine,
            grader=grader,
            rollouts=_rollouts(config, engine, prompts, first_step, lambda: run),
            benchmarks=(asked := _benchmarks(config, tokenizer)),
            schedule=schedule,
            probe=_probe(ready, engine, prompts, asked, journal),
            guard=guard,
            credit=PlanningCredit.of(config) if config.hicra.enabled else None,
            journal=journal,
            skipped=SkippedUpdates(config.optimizer),
            critic_skipped=SkippedUpdates(config.critic.optimizer, of_critic=True),
            mismatch=Mismatch(config),
            first_step=first_step,
            trained_layers=0 if path is None else checkpoints.read_run(path)["trained_layers"],
            world=ready.layout.world,
            learned=first_step,
        )
        if path is not None:
            engine.load_weights(trainer.all_weights(), version=config.learned_steps(first_step))
        engine.wait_until_up(journal.say)
        run.closing = stack.pop_all()
        return run


def _schedule(config: Config) -> PhaseSchedule:
    """Which policy each step trains."""
    return PhaseSchedule.of(
        config.bupo.phases(),
        read_out_norm=config.bupo.read_out_norm,
        resting_steps=config.resting_steps,
    )


def _tell(journal: Journal, ready: Preflight, path: Path | None) -> None:
    """What there is to say at the start of a run that goes on from `path`, and its config."""
    config = ready.config
    for note in [*_notes(config, path), *doubts(config), *ready.notes]:
        journal.say(note)
    if dist.get_rank() == 0:
        (Path(expand(config.run_dir)) / "config.yaml").write_text(to_yaml(config))


def _rollouts(
    config: Config,
    engine: RolloutEngine,
    prompts: PromptStream | Replay,
    first_step: int,
    the_run: Callable[[], Run],
) -> RolloutStream:
    def staleness_at(step: int) -> int:
        # Nothing could weigh what is stale where sampler and learner are two policies
        internal = isinstance(the_run().schedule.policy_at(step), InternalLayerPolicy)
        return 0 if internal else config.rollout.max_staleness

    return RolloutStream(
        engine,
        prompts.prompts_at,
        partial(sampling_at, config),
        first_step=first_step,
        last_step=config.steps,
        staleness_at=staleness_at,
        resting_steps=config.resting_steps,
        recorded=isinstance(prompts, Replay),
    )


def _benchmarks(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Benchmark]:
    """What is evaluated on, and probes ask first."""
    probes_ask = config.probe.every and config.probe.responses is None
    return benchmarks(config, tokenizer) if config.evaluation.every or probes_ask else []


def _probe(
    ready: Preflight,
    engine: RolloutEngine,
    prompts: PromptStream | Replay,
    asked: Sequence[Benchmark],
    journal: Journal,
) -> Probe | None:
    """What is looked at every `probe.every` steps; None: nothing is."""
    config = ready.config
    if not config.probe.every:
        return None
    first = [prompt for benchmark in asked for prompt in benchmark.prompts]
    if not first and isinstance(prompts, PromptStream):
        first = prompts.first(config.probe.prompts)
    return Probe(
        config,
        ready.architecture,
        prompts=first[: config.probe.prompts],
        engine=None if isinstance(engine, Replay) else engine,
        say=journal.say,
    )


def _notes(config: Config, path: Path | None) -> Iterator[str]:
    """What there is to say about resuming from the checkpoint at `path`; nothing without one."""
    if path is None:
        return
    run_dir, before = path.parents[1], checkpoints.read_run(path)
    for damaged in checkpoints.damaged_checkpoints(run_dir):
        yield f"passing over {damaged}: not whole"
    yield f"resuming at step {before['step']} from {path}"
    if before.get("critic_architecture") and not config.has_critic:
        yield "leaving the checkpoint's critic behind"
    yield from _changes(before["config"], flatten(config))


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    """What was set otherwise when the checkpoint was written."""
    for key in {**before, **now}:
        was, is_now = (json.dumps(c[key]) if key in c else "not set" for c in (before, now))
        of_this_start = key == "servers.addresses" and STARTED in os.environ
        if was != is_now and not of_this_start:
            yield f"changed since: {key} was {was}, is {is_now}"
