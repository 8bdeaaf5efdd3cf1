"""The loop: sample, grade, credit, learn, sync. It reads like the algorithm, and every rank runs
it.

Responses come from the full policy in every phase; which policy learns from them is `schedule`'s
answer. With `bupo.internal_steps=0` it is GRPO, to the bit. PPO's critic, where there is one, says
before the updates what responses will earn, and learns beside the policy, whichever that is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_bupo import stopping
from megatron_bupo.algorithm.bupo import FULL, NO_POLICY, Policy
from megatron_bupo.build import build
from megatron_bupo.config.schema import Config
from megatron_bupo.credit import credited, learners
from megatron_bupo.data.packing import pack
from megatron_bupo.errors import RunStopped
from megatron_bupo.mcore.learning_rate import learning_rate
from megatron_bupo.preflight import Preflight
from megatron_bupo.record import measures
from megatron_bupo.record.rollout_files import Learned
from megatron_bupo.run import Run
from megatron_bupo.sample import sample
from megatron_bupo.types import TokenBatch, UpdateReport

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_bupo.algorithm.planning_measures import Planning


def train(ready: Preflight) -> None:
    """Train from where the run directory stands to the last step, and leave the trained model
    there.
    """
    with build(ready) as run:
        with stopping.heeded():
            train_steps(run)
        run.finish()


def train_steps(run: Run) -> None:
    """All steps that are left; what they have learned is saved, even if the run must stop."""
    try:
        for step in range(run.first_step, run.config.steps):
            stopping.vote()
            train_step(run, step, run.policy_for(step))
            run.save_if_due(step + 1)
    except RunStopped:
        run.save_learned()
        raise


def train_step(run: Run, step: int, policy: Policy) -> None:
    """One step: `prompts_per_step` prompts, their responses, and `minibatches` updates of one
    `policy`.
    """
    config, journal, trainer = run.config, run.journal, run.trainer
    with journal.step(step, policy):
        if step == 0 and config.evaluation.every:
            run.evaluate("eval/initial_")
        if run.schedule.begins_at(step):
            trainer.begin_phase()
        rounds = config.rollout.dynamic_sampling_rounds
        with stopping.allowed():
            sampled = sample(step, run.rollouts, run.grader, journal, rounds=rounds)
            stopping.vote()
        groups, grades = sampled.groups, sampled.grades
        batch = learners(pack(groups, run.pad_id), groups, config.algorithm)
        batch, scores = with_logprobs(batch, policy, run)
        full = scores if policy == FULL else None
        if full is None and (must_compare(step, policy, config) or needs_entropies(step, run)):
            full = full_scores(batch, run)
        batch = credited(with_values(batch, run), grades, config.algorithm)
        planning = run.planning_of(batch, groups)
        batch = with_planning_credit(batch, planning, step, run, full)
        update_critic(batch, step, run)
        updates = update_policy(batch, policy, step, run)
        run.learned = step + 1
        scores = scores or (updates[0].scores if updates else None)
        full = scores if policy == FULL else full
        journal.dump(groups, grades, Learned(policy, batch, scores))
        run.warn(run.skipped.after(step, updates))
        sync_weights(policy, step, run)
        known = measures.policy_measures(policy, scores, batch, full=full)
        journal.note(known)
        run.warn(run.mismatch.after(step, known))
        journal.note(run.rollouts.measures())
        journal.note(measures.rollout_measures(groups, grades) | sampled.measures)
        run.measure_planning(planning, batch, groups, full)
        run.warn(measures.warnings_of(grades))
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0:
            run.evaluate()


def must_compare(step: int, policy: Policy, config: Config) -> bool:
    """Must trainer and sampler be compared though the policy that learns does not do it by the way?
    At the start, for they must begin with the same weights, and when asked for. An actor of fewer
    layers cannot.
    """
    if policy == FULL or config.bupo.internal_layout is not None:
        return False
    every = config.debug.mismatch_every
    return step == 0 or bool(every and step % every == 0)


def full_scores(batch: TokenBatch, run: Run) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the full policy by the trainer, `[responses, tokens]` nats."""
    with run.journal.doing("compare"):
        return run.trainer.logprobs(batch, FULL, temperature=run.config.rollout.temperature)


def with_logprobs(
    batch: TokenBatch, policy: Policy, run: Run
) -> tuple[TokenBatch, tuple[Tensor, Tensor] | None]:
    """The batch with all log-probs that its updates cannot compute themselves, and what the policy
    that learns says of it (log-probs, entropies) if that is already known.
    """
    algorithm, temperature = run.config.algorithm, run.config.rollout.temperature
    scores = None
    if policy == NO_POLICY:
        return batch, scores
    if algorithm.needs_old_logprobs:
        with run.journal.doing("old_logprobs"):
            scores = run.trainer.logprobs(batch, policy, temperature=temperature)
        batch = batch.with_old_logprobs(scores[0])
    if algorithm.kl_coefficient:
        with run.journal.doing("ref_logprobs"):
            ref = run.trainer.ref_logprobs(batch, policy, temperature=temperature)
        batch = batch.with_ref_logprobs(ref)
    return batch, scores


def with_values(batch: TokenBatch, run: Run) -> TokenBatch:
    """The batch with what the critic, if there is one, foresees of its responses."""
    if run.critic is None:
        return batch
    with run.journal.doing("values"):
        return batch.with_values(run.critic.values(batch))


def update_critic(batch: TokenBatch, step: int, run: Run) -> None:
    """The critic's updates of a step, towards the returns of `batch`."""
    if run.critic is None:
        return
    own = run.critic.config
    lr = learning_rate(step, own)
    with run.journal.doing("update_critic"):
        minibatches = batch.minibatches(own.algorithm.minibatches)
        updates = [run.critic.update(minibatch, lr=lr) for minibatch in minibatches]
    run.journal.note(measures.critic_measures(batch))
    run.journal.note(measures.update_measures(updates, lr, area="critic"))
    run.warn(run.critic_skipped.after(step, updates))


def update_policy(batch: TokenBatch, policy: Policy, step: int, run: Run) -> list[UpdateReport]:
    """The updates of a step, of the policy that it trains."""
    if policy == NO_POLICY:
        return []
    lr = learning_rate(step, run.config, phase_start=run.schedule.phase_start(step))
    with run.journal.doing("update"):
        minibatches = batch.minibatches(run.config.algorithm.minibatches)
        updates = [run.trainer.update(minibatch, policy, lr=lr) for minibatch in minibatches]
    run.journal.note(measures.update_measures(updates, lr))
    return updates


def sync_weights(policy: Policy, step: int, run: Run) -> None:
    """Bring what `step` has changed to the engine."""
    if policy == NO_POLICY:
        return
    version = run.config.learned_steps(step + 1)
    with run.journal.doing("sync"):
        sync = run.engine.load_weights(run.trainer.changed_weights(policy), version=version)
    run.journal.note(measures.sync_measures(sync))


def needs_entropies(step: int, run: Run) -> bool:
    """Must the full policy's entropies be known before the updates of `step`?"""
    credit = run.credit
    return credit is not None and credit.needs_entropies(step, run.schedule.policy_at(step))


def with_planning_credit(
    batch: TokenBatch,
    planning: Planning | None,
    step: int,
    run: Run,
    full: tuple[Tensor, Tensor] | None,
) -> TokenBatch:
    """The batch with more weight on the tokens that plan, where HICRA is on. `full`: the full
    policy's scores, if they are known.
    """
    credit = run.credit
    if credit is None or not credit.is_on(step, run.schedule.policy_at(step)):
        return batch
    batch, known = credit.give(batch, planning, step, entropies=full and full[1])
    run.journal.note(known)
    return batch
