"""The loop: sample, grade, credit, learn, sync. It reads like the algorithm, and every rank runs
it.

Responses come from the full policy in every phase; which policy learns from them is `schedule`'s
answer. With `bupo.internal_steps=0` it is GRPO, to the bit.
"""

from __future__ import annotations

import torch

from megatron_bupo.algorithm.advantages import group_relative_advantages
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.build import Run, build
from megatron_bupo.data.packing import pack
from megatron_bupo.preflight import Preflight
from megatron_bupo.record import measures


def train(ready: Preflight) -> None:
    """Train from where the run directory stands to the last step, and leave the trained model
    there.
    """
    with build(ready) as run:
        for step in range(run.first_step, run.config.steps):
            train_step(run, step)
            if (step + 1) % run.config.checkpoint.every == 0 or step + 1 == run.config.steps:
                run.save(step + 1)
        run.finish()


def train_step(run: Run, step: int) -> None:
    """One step: `prompts_per_step` prompts, their responses, and `minibatches` updates of one
    policy.
    """
    config, journal, trainer = run.config, run.journal, run.trainer
    policy = run.schedule.policy_at(step)
    with journal.step(step, policy):
        if step == 0:
            run.evaluate("eval/initial_accuracy_mean")
        if run.schedule.begins_at(step):
            trainer.begin_phase()
        with journal.doing("generate"):
            groups = run.engine.generate(run.prompts.prompts_at(step), run.sampling(step))
        with journal.doing("grade"):
            grades = run.grader.grade(groups)
        rewards = torch.tensor([[grade.reward for grade in group] for group in grades])
        advantages = group_relative_advantages(
            rewards, normalize_by_std=config.algorithm.normalize_by_std
        )
        batch = pack(groups, advantages, run.pad_id)
        with journal.doing("old_logprobs"):  # of the policy that learns, before its first update
            old, entropies = trainer.logprobs(batch, policy, temperature=config.rollout.temperature)
        if step == 0 and policy != FULL:  # trainer and engine must start from the same weights
            full, _ = trainer.logprobs(batch, FULL, temperature=config.rollout.temperature)
            journal.note(measures.mismatch_measures(full, batch))
        lr = trainer.learning_rate(step)
        with journal.doing("update"):
            minibatches = batch.with_old_logprobs(old).minibatches(config.algorithm.minibatches)
            updates = [trainer.update(minibatch, policy, lr=lr) for minibatch in minibatches]
        with journal.doing("sync"):
            run.engine.load_weights(trainer.changed_weights(policy), version=step + 1)
        journal.note(measures.rollout_measures(groups, grades))
        journal.note(measures.update_measures(updates, lr))
        if policy == FULL:
            journal.note(measures.mismatch_measures(old, batch))
        else:
            journal.note(measures.internal_measures(entropies, batch))
        run.warn(measures.warnings_of(grades))
        if config.evaluation.every and (step + 1) % config.evaluation.every == 0:
            run.evaluate("eval/accuracy_mean")
