"""From a checked config to live objects: the only file that knows every implementation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_bupo import checkpoints
from megatron_bupo.algorithm.bupo import PhaseSchedule
from megatron_bupo.config import Config, expand, flatten, to_yaml
from megatron_bupo.config.algorithm_rules import doubts
from megatron_bupo.data.order import PromptStream
from megatron_bupo.data.prompts import load_prompts
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.evaluation.accuracy import accuracy
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.hf.writer import write_checkpoint
from megatron_bupo.mcore import checkpoint, cpu, parallel
from megatron_bupo.mcore.model import DTYPES
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import Preflight
from megatron_bupo.record.figure import draw_run
from megatron_bupo.record.heartbeat import Heartbeat
from megatron_bupo.record.journal import Journal
from megatron_bupo.record.skipped import SkippedUpdates
from megatron_bupo.record.summary import summarise
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.types import Prompt, Sampling

TRAINING, HELD_OUT = 0, 1  # streams of sampling noise


@dataclass(frozen=True)
class Run:
    """A training run on this rank, ready for step `first_step`; a context manager."""

    config: Config
    run_dir: Path
    trainer: MegatronTrainer
    engine: RolloutEngine
    grader: Grader
    prompts: PromptStream
    held_out: Sequence[Prompt]
    schedule: PhaseSchedule
    journal: Journal
    skipped: SkippedUpdates
    pad_id: int
    first_step: int
    world: int
    closing: ExitStack

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.__exit__(*error)  # type: ignore[arg-type]

    def sampling(self, step: int) -> Sampling:
        """How `step`'s responses are drawn."""
        rollout = self.config.rollout
        return Sampling(
            responses_per_prompt=rollout.responses_per_prompt,
            max_response_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            seed=_noise_seed(self.config.seed, TRAINING, step),
        )

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

    def save(self, step: int) -> None:
        """Write the state before `step`. Collective."""
        state = {
            "step": step,
            "config": flatten(self.config),
            "architecture": asdict(self.trainer.arch),
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
            with self.journal.doing("export"):
                self._export()
        if dist.get_rank() == 0:
            figure = draw_run(self.run_dir)
            paragraph = summarise(self.run_dir, self.config, world_size=self.world)
            metrics = self.run_dir / "metrics.jsonl"
            self.journal.conclude(f"\n{paragraph}\nmetrics {metrics}, plot {figure}")

    def _export(self) -> None:
        model_dir, dtype = Path(expand(self.config.model.path)), self.config.model.dtype
        weights = self.trainer.all_weights()
        if dist.get_rank() == 0:
            write_checkpoint(self.run_dir / "hf", weights, like=model_dir, dtype=dtype)
        for _ in weights:
            pass  # the other ranks do their part of the gathering


def _noise_seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def _heartbeat(config: Config, run_dir: Path, world: int) -> AbstractContextManager[object]:
    """What notices when the ranks hang, in whatever they do from here on."""
    if not config.logging.stall_s:
        return nullcontext()
    rank = int(os.environ.get("RANK", "0"))  # known before the process group is
    return Heartbeat(run_dir, rank=rank, world=world, stall_s=config.logging.stall_s)


def build(ready: Preflight) -> Run:
    """Everything the loop uses, resumed from the run directory's newest checkpoint. Collective."""
    config, arch = ready.config, ready.architecture
    run_dir, model_dir = Path(expand(config.run_dir)), expand(config.model.path)
    with ExitStack() as stack:
        stack.enter_context(_heartbeat(config, run_dir, ready.layout.world))
        grader = Grader(config.reward)  # early: its process starts while the rest loads
        stack.callback(grader.close)
        stack.enter_context(parallel.joined(ready.layout, seed=config.seed))
        tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
        with ExitStack() as files:
            trainer = MegatronTrainer(arch, config, slice_opener(read_index(model_dir), files))
        engine = EmbeddedEngine(
            model_dir,
            tokenizer,
            batch_size=config.rollout.batch_size,
            dtype=DTYPES[config.model.dtype],
            device=cpu.device(),
        )
        stack.callback(engine.close)
        first_step, notes = _resume(trainer, engine, config, run_dir)
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
            run_dir=run_dir,
            trainer=trainer,
            engine=engine,
            grader=grader,
            prompts=PromptStream(
                load_prompts(config.data.train, config.data, tokenizer),
                prompts_per_step=config.rollout.prompts_per_step,
                seed=config.seed,
                shuffle=config.data.shuffle,
            ),
            held_out=held_out[: config.evaluation.max_prompts],
            schedule=PhaseSchedule.of(
                config.bupo.phases(), read_out_norm=config.bupo.read_out_norm
            ),
            journal=journal,
            skipped=SkippedUpdates(config.optimizer.max_skipped_updates),
            pad_id=0,  # masked out everywhere: any id will do
            first_step=first_step,
            world=ready.layout.world,
            closing=stack.pop_all(),
        )


def _resume(
    trainer: MegatronTrainer, engine: RolloutEngine, config: Config, run_dir: Path
) -> tuple[int, list[str]]:
    """The step to go on with, and what there is to say about it."""
    newest = checkpoints.newest_checkpoint(run_dir)
    if newest is None:
        return 0, []
    step, path = newest
    before = checkpoints.read_run(path)["config"]
    checkpoint.load(trainer, path)
    engine.load_weights(trainer.all_weights(), version=step)
    notes = [
        f"passing over {damaged}: not whole" for damaged in checkpoints.damaged_checkpoints(run_dir)
    ]
    notes.append(f"resuming at step {step} from {path}")
    return step, [*notes, *_changes(before, flatten(config))]


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    """What was set otherwise when the checkpoint was written."""
    for key in {**before, **now}:
        was, is_now = (json.dumps(c[key]) if key in c else "not set" for c in (before, now))
        if was != is_now:
            yield f"changed since: {key} was {was}, is {is_now}"
