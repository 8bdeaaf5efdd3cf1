"""A training run on this rank: what its loop calls to sample, evaluate, save and finish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import torch.distributed as dist
from torch import Tensor

from megatron_bupo import checkpoints
from megatron_bupo.algorithm.bupo import FULL, PhaseSchedule, Policy, depth_of
from megatron_bupo.algorithm.planning_measures import Planning
from megatron_bupo.config import Config, expand, flatten
from megatron_bupo.evaluation.asking import Benchmark, Marks, ask, avg_at_k, measures
from megatron_bupo.guard import Guard
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.hf.tensors import exported_tensors
from megatron_bupo.hf.writer import write_checkpoint
from megatron_bupo.mcore import checkpoint
from megatron_bupo.mcore.critic import MegatronCritic
from megatron_bupo.mcore.phase_actor import ActorPlan, plan_actor
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.planning_credit import PlanningCredit
from megatron_bupo.probe import Probe
from megatron_bupo.record.figure import draw_run
from megatron_bupo.record.journal import Journal
from megatron_bupo.record.mismatch import Mismatch
from megatron_bupo.record.planning_figure import draw_planning
from megatron_bupo.record.skipped import SkippedUpdates
from megatron_bupo.record.summary import summarise
from megatron_bupo.rewards.grader import Grading
from megatron_bupo.rollout.ahead import RolloutStream
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.rollout.weights import StoredWeights, Together
from megatron_bupo.types import RolloutGroup, TokenBatch, Weights


@dataclass
class Run:
    """A training run on this rank, ready for step `first_step`; a context manager."""

    config: Config
    architecture: DecoderSizes
    run_dir: Path
    trainer: MegatronTrainer  # of the present phase, see `have_actor_for`
    critic: MegatronCritic | None
    engine: RolloutEngine
    grader: Grading
    rollouts: RolloutStream
    benchmarks: Sequence[Benchmark]
    schedule: PhaseSchedule  # what is left of it, see `policy_for`
    probe: Probe | None
    guard: Guard
    credit: PlanningCredit | None  # to planning tokens; None: all tokens count alike
    journal: Journal
    skipped: SkippedUpdates
    critic_skipped: SkippedUpdates
    mismatch: Mismatch
    first_step: int
    learned: int  # steps whose updates are made
    trained_layers: int  # by the steps before the first
    world: int
    pad_id: int = 0  # masked out everywhere: any id will do
    closing: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.__exit__(*error)  # type: ignore[arg-type]

    def evaluate(self, prefix: str = "eval/") -> None:
        """Note the full policy's accuracy, the mean over benchmarks and, where they have names,
        that of each.
        """
        known: dict[str, float] = {}
        accuracies: list[float] = []
        warnings: set[str] = set()
        with self.journal.doing("evaluate"):
            for benchmark in self.benchmarks:
                size = self.config.evaluation.responses_per_batch
                batches = ask(benchmark, self.engine, self.grader, responses_per_batch=size)
                marks = [Marks.of(answered) for batch in batches for answered in batch]
                accuracies.append(avg_at_k(marks))
                known |= measures(benchmark, marks)
                warnings |= {w for question in marks for w in question.warnings if w}
        if not self.config.evaluation.benchmarks:
            known = {}
        known["accuracy_mean"] = fmean(accuracies)
        self.journal.note({f"{prefix}{key}": value for key, value in known.items()})
        self.warn(sorted(warnings))

    def planning_of(self, batch: TokenBatch, groups: Sequence[RolloutGroup]) -> Planning | None:
        """What the responses plan, where HICRA has grams to tell by. Collective."""
        if self.credit is None:
            return None
        with self.journal.doing("planning"):
            return self.credit.find(batch, groups)

    def measure_planning(
        self,
        planning: Planning | None,
        batch: TokenBatch,
        groups: Sequence[RolloutGroup],
        full: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Note what is worth knowing of `planning`. `full`: the full policy's log-probs and
        entropies, if the trainer has computed them.
        """
        if self.credit is None or planning is None:
            return
        with self.journal.doing("planning"):
            self.journal.note(self.credit.measure(planning, batch, groups, full))

    def warn(self, warnings: Sequence[str]) -> None:
        """Tell of what went wrong without stopping the run."""
        for warning in warnings:
            self.journal.say(f"warning: {warning}")

    def policy_for(self, step: int) -> Policy:
        """The policy that `step` trains, with its actor in place. A probe that is due comes before,
        and if the guard finds it out of bounds, the internal phases end here. Collective.
        """
        policy = self.schedule.policy_at(step)
        self.have_actor_for(policy, step)
        if self.probe is None or not self.probe.is_due(step):
            return policy
        with self.journal.doing("probe"):
            seen = self.probe.look(self.trainer, step)
        self.journal.note(seen)
        reasons = self.guard.judge(step, policy, seen)
        if reasons is None:
            return policy
        left = self.guard.has_left(step)
        self.journal.note({"guard/tripped": float(left)})
        self.warn([] if left else reasons)
        if not reasons or (left and self._needs_another_actor(FULL)):
            self._have_checkpoint(step)
        if left:
            self.schedule = self.schedule.until(step)
            self.have_actor_for(FULL, step)
            self.journal.say(self.guard.write_down(policy, reasons))
        return self.schedule.policy_at(step)

    def _have_checkpoint(self, step: int) -> None:
        """Have the state before `step` on disk. Collective."""
        newest = checkpoints.newest_checkpoint(self.run_dir)
        if newest is None or newest[0] != step:
            self.save(step)

    def have_actor_for(self, policy: Policy, step: int) -> None:
        """Have the actor that trains `policy` from `step` on, built anew where the present one is
        another: it then takes over from the checkpoint of `step`. Collective.
        """
        if not self._needs_another_actor(policy):
            return
        with self.journal.doing("relayout"):
            path = checkpoints.checkpoint_dir(self.run_dir, step)
            self.trainer = self._plan(policy).take_over(self.trainer, path)

    def whole_weights(self) -> Weights:
        """The whole model as it stands: what a server without weights needs."""
        own, layers = self.trainer.all_weights(), self.trainer.arch.layers
        if layers == self.architecture.layers:
            return own
        # Nothing above has been trained yet, else the run would have been refused (preflight)
        return Together(own, StoredWeights(expand(self.config.model.path), above_layer=layers))

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
        trained = depth_of(last, self.architecture.layers) if step else 0
        state = {
            "step": step,
            "config": flatten(self.config),
            "architecture": asdict(self.architecture),
            "critic_architecture": self.critic and asdict(self.critic.arch),
            "trained_layers": max(self.trained_layers, trained),
            "guard": self.guard.state_before(step),
        }
        with self.journal.doing("checkpoint"):
            checkpoint.save(
                self.trainer,
                self.run_dir,
                step,
                state,
                keep=self.config.checkpoint.keep,
                spared=self.guard.spared(self.schedule.policy_at(step)),
                critic=self.critic,
            )

    def save_learned(self) -> None:
        """Write what has been learned, where that has not been done. Collective."""
        newest = checkpoints.newest_checkpoint(self.run_dir)
        if self.learned > (newest[0] if newest else 0):
            self.save(self.learned)

    def finish(self) -> None:
        """Leave the final policy as an HF checkpoint, the plot, and a paragraph on what came of
        it. Collective.
        """
        if self.config.checkpoint.export_hf:
            self.have_actor_for(FULL, max(self.first_step, self.config.steps))
            with self.journal.doing("export"):
                self._export()
        if dist.get_rank() == 0:
            figures = [draw_run(self.run_dir), draw_planning(self.run_dir)]
            plots = " and ".join(str(figure) for figure in figures if figure is not None)
            paragraph = summarise(self.run_dir, self.config, world_size=self.world)
            metrics = self.run_dir / "metrics.jsonl"
            self.journal.conclude(f"\n{paragraph}\nmetrics {metrics}, plot {plots}")

    def _export(self) -> None:
        model_dir, dtype = Path(expand(self.config.model.path)), self.config.model.dtype
        weights = iter(self.trainer.all_weights())
        if dist.get_rank() == 0:
            shapes = exported_tensors(self.architecture, model_dir)
            write_checkpoint(self.run_dir / "hf", weights, shapes, like=model_dir, dtype=dtype)
        for _ in weights:
            pass  # the other ranks do their part of the gathering
