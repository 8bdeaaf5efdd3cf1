"""From a checked config to live objects: the only file that knows every implementation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist

from megatron_bupo import checkpoints
from megatron_bupo.algorithm.bupo import FULL, PhaseSchedule, Policy, depth_of
from megatron_bupo.config import Config, expand, flatten, to_yaml
from megatron_bupo.config.algorithm_rules import doubts
from megatron_bupo.data.order import PromptStream
from megatron_bupo.data.prompts import load_prompts
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.evaluation.accuracy import accuracy
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.hf.writer import write_checkpoint
from megatron_bupo.mcore import checkpoint, cpu, parallel
from megatron_bupo.mcore.model import DTYPES
from megatron_bupo.mcore.phase_actor import ActorPlan, plan_actor
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import Preflight
from megatron_bupo.record.figure import draw_run
from megatron_bupo.record.heartbeat import Heartbeat
from megatron_bupo.record.journal import Journal
from megatron_bupo.record.mismatch import Mismatch
from megatron_bupo.record.skipped import SkippedUpdates
from megatron_bupo.record.summary import summarise
from megatron_bupo.replay import Replay
from megatron_bupo.rewards.grader import Grader, Grading
from megatron_bupo.rollout.ahead import RolloutStream
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.types import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING, HELD_OUT = 0, 1  # streams of sampling noise


@dataclass
class Run:
    """A training run on this rank, ready for step `first_step`; a context manager."""

    config: Config
    architecture: DecoderSizes
    run_dir: Path
    trainer: MegatronTrainer  # of the present phase, see `have_actor_for`
    engine: RolloutEngine
    grader: Grading
    rollouts: RolloutStream
    held_out: Sequence[Prompt]
    schedule: PhaseSchedule
    journal: Journal
    skipped: SkippedUpdates
    mismatch: Mismatch
    pad_id: int
    first_step: int
    trained_layers: int  # by the steps before the first
    world: int
    closing: ExitStack

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.__exit__(*error)  # type: ignore[arg-type]

    def evaluate(self, key: str) -> None:
        """Note the accuracy on held-out prompts under `key`; the same noise each time, to
        compare.
        """
        evaluation = self.config.evaluation
        if not evaluation.every:
            return
        sampling = Sampling(
            responses_per_prompt=evaluation.responses_per_prompt,
            max_response_tokens=self.config.rollout.max_response_tokens,
            temperature=evaluation.temperature,
            seed=_noise_seed(self.config.seed, HELD_OUT),
        )
        with self.journal.doing("evaluate"):
            self.journal.note({key: accuracy(self.engine, self.grader, self.held_out, sampling)})

    def warn(self, warnings: Sequence[str]) -> None:
        """Tell of what went wrong without stopping the run."""
        for warning in warnings:
            self.journal.say(f"warning: {warning}")

    def have_actor_for(self, policy: Policy, step: int) -> None:
        """Have the actor that trains `policy` from `step` on, built anew where the present one is
        another: it then takes over from the checkpoint of `step`. Collective.
        """
        if not self._needs_another_actor(policy):
            return
        with self.journal.doing("relayout"):
            path = checkpoints.checkpoint_dir(self.run_dir, step)
            self.trainer = self._plan(policy).take_over(self.trainer, path)

    def _plan(self, policy: Policy) -> ActorPlan:
        return plan_actor(policy, self.architecture, self.config, self.world)

    def _needs_another_actor(self, policy: Policy) -> bool:
        return self._plan(policy).arch.layers != self.trainer.arch.layers

    def save_if_due(self, step: int) -> None:
        """Write the state before `step`: every so often, at the end, and for another actor to take
        over. Collective.
        """
        due = step % self.config.checkpoint.every == 0 or step == self.config.steps
        if due or self._needs_another_actor(self.schedule.policy_at(step)):
            self.save(step)

    def save(self, step: int) -> None:
        """Write the state before `step`. Collective."""
        last = self.schedule.policy_at(step - 1)
        state = {
            "step": step,
            "config": flatten(self.config),
            "architecture": asdict(self.architecture),
            "trained_layers": max(self.trained_layers, depth_of(last, self.architecture.layers)),
        }
        with self.journal.doing("checkpoint"):
            checkpoint.save(
                self.trainer, self.run_dir, step, state, keep=self.config.checkpoint.keep
            )

    def finish(self) -> None:
        """Leave the final policy as an HF checkpoint, the plot, and a paragraph on what came of
        it. Collective.
        """
        if self.config.checkpoint.export_hf:
            self.have_actor_for(FULL, max(self.first_step, self.config.steps))
            with self.journal.doing("export"):
                self._export()
        if dist.get_rank() == 0:
            figure = draw_run(self.run_dir)
            paragraph = summarise(self.run_dir, self.config, world_size=self.world)
            metrics = self.run_dir / "metrics.jsonl"
            self.journal.conclude(f"\n{paragraph}\nmetrics {metrics}, plot {figure}")

    def _export(self) -> None:
        model_dir, dtype = Path(expand(self.config.model.path)), self.config.model.dtype
        weights = iter(self.trainer.all_weights())
        if dist.get_rank() == 0:
            write_checkpoint(self.run_dir / "hf", weights, like=model_dir, dtype=dtype)
        for _ in weights:
            pass  # the other ranks do their part of the gathering


def sampling_at(config: Config, step: int) -> Sampling:
    """How the responses of `step` are drawn."""
    rollout = config.rollout
    return Sampling(
        responses_per_prompt=rollout.responses_per_prompt,
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        seed=_noise_seed(config.seed, TRAINING, step),
    )


def _noise_seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def heartbeat(config: Config, run_dir: Path, world: int) -> AbstractContextManager[object]:
    """What notices when the ranks hang, in whatever they do from here on."""
    if not config.logging.stall_s:
        return nullcontext()
    rank = int(os.environ.get("RANK", "0"))  # known before the process group is
    return Heartbeat(run_dir, rank=rank, world=world, stall_s=config.logging.stall_s)


def build(ready: Preflight) -> Run:
    """Everything the loop uses, resumed from the run directory's newest checkpoint. Collective."""
    config, arch = ready.config, ready.architecture
    run_dir = Path(expand(config.run_dir))
    with ExitStack() as stack:
        stack.enter_context(heartbeat(config, run_dir, ready.layout.world))
        replay = None if config.debug.replay is None else Replay(config.debug.replay)
        grader = replay or Grader(config.reward)  # early: its process starts while the rest loads
        stack.callback(grader.close)
        newest = checkpoints.newest_checkpoint(run_dir)
        first_step, path = newest or (0, None)
        schedule = PhaseSchedule.of(config.bupo.phases(), read_out_norm=config.bupo.read_out_norm)
        plan = plan_actor(schedule.policy_at(first_step), arch, config, ready.layout.world)
        stack.enter_context(parallel.joined(plan.layout, seed=config.seed))
        tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
        trainer = plan.build()
        engine = replay or rollout_engine(config, tokenizer)
        stack.callback(engine.close)
        notes, trained_layers = [], 0
        if path is not None:
            checkpoint.load(trainer, path)
            engine.load_weights(trainer.all_weights(), version=first_step)
            notes = list(_notes(config, path))
            trained_layers = checkpoints.read_run(path)["trained_layers"]
        journal = stack.enter_context(
            Journal(run_dir, config, first_step=first_step, speaks=dist.get_rank() == 0)
        )
        for note in [*notes, *doubts(config)]:
            journal.say(note)
        if dist.get_rank() == 0:
            (run_dir / "config.yaml").write_text(to_yaml(config))
        held_out: list[Prompt] = []
        if config.data.eval and config.evaluation.every:
            held_out = load_prompts(config.data.eval, config.data, tokenizer)
        return Run(
            config=config,
            architecture=arch,
            run_dir=run_dir,
            trainer=trainer,
            engine=engine,
            grader=grader,
            rollouts=_rollouts(
                config, engine, replay or prompt_stream(config, tokenizer), schedule, first_step
            ),
            held_out=held_out[: config.evaluation.max_prompts],
            schedule=schedule,
            journal=journal,
            skipped=SkippedUpdates(config.optimizer.max_skipped_updates),
            mismatch=Mismatch(config),
            pad_id=0,  # masked out everywhere: any id will do
            first_step=first_step,
            trained_layers=trained_layers,
            world=ready.layout.world,
            closing=stack.pop_all(),
        )


def _rollouts(
    config: Config,
    engine: RolloutEngine,
    prompts: PromptStream | Replay,
    schedule: PhaseSchedule,
    first_step: int,
) -> RolloutStream:
    def staleness_at(step: int) -> int:
        # Nothing could weigh what is stale where sampler and learner are two policies
        return config.rollout.max_staleness if schedule.policy_at(step) == FULL else 0

    return RolloutStream(
        engine,
        prompts.prompts_at,
        partial(sampling_at, config),
        first_step=first_step,
        last_step=config.steps,
        staleness_at=staleness_at,
        recorded=isinstance(prompts, Replay),
    )


def prompt_stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptStream:
    """What the steps of a run ask."""
    return PromptStream(
        load_prompts(config.data.train, config.data, tokenizer),
        prompts_per_step=config.rollout.prompts_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


def rollout_engine(config: Config, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """The engine that `rollout.engine` names, with the weights of `model.path`."""
    return EmbeddedEngine(
        expand(config.model.path),
        tokenizer,
        batch_size=config.rollout.batch_size,
        dtype=DTYPES[config.model.dtype],
        device=cpu.device(),
    )


def _notes(config: Config, path: Path) -> Iterator[str]:
    """What there is to say about resuming from the checkpoint at `path`."""
    run_dir, before = path.parents[1], checkpoints.read_run(path)
    for damaged in checkpoints.damaged_checkpoints(run_dir):
        yield f"passing over {damaged}: not whole"
    yield f"resuming at step {before['step']} from {path}"
    yield from _changes(before["config"], flatten(config))


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    """What was set otherwise when the checkpoint was written."""
    for key in {**before, **now}:
        was, is_now = (json.dumps(c[key]) if key in c else "not set" for c in (before, now))
        if was != is_now:
            yield f"changed since: {key} was {was}, is {is_now}"
