"""`debug.rollout_only`: what would be asked, answered and graded? The rollouts of a training run's
steps without the training, for whoever writes a reward function or a prompt.

Step 0 is that of the training run, to the bit; the steps after it are sampled from the same
weights. Every step's rollouts go to run_dir/rollouts, its measures to run_dir/metrics.jsonl.
"""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_bupo import collective
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.config import expand, to_yaml
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.engines import prompt_stream, rollout_engine, sampling_at, sharing_ranks
from megatron_bupo.planning_credit import PlanningCredit
from megatron_bupo.preflight import Preflight
from megatron_bupo.record import measures
from megatron_bupo.record.heartbeat import heartbeat
from megatron_bupo.record.journal import Journal
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rollout.ahead import RolloutStream
from megatron_bupo.sample import sample


def rollout_only(ready: Preflight) -> None:
    """Generate, grade and write down `steps` steps; no trainer is built. Collective."""
    config, run_dir = ready.config, Path(expand(ready.config.run_dir))
    with ExitStack() as stack:
        stack.enter_context(heartbeat(run_dir, ready.layout.world, config.logging.stall_s))
        most = config.rollout.max_response_tokens
        grader = Grader(config.reward, max_response_tokens=most)
        stack.callback(grader.close)
        stack.enter_context(sharing_ranks())
        tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
        prompts = prompt_stream(config, tokenizer)
        engine = rollout_engine(config, ready.architecture, tokenizer, run_dir=run_dir)
        stack.callback(engine.close)
        speaks = collective.is_first()
        journal = stack.enter_context(Journal(run_dir, config, first_step=0, speaks=speaks))
        for note in ready.notes:
            journal.say(note)
        engine.wait_until_up(journal.say)
        if speaks:
            (run_dir / "config.yaml").write_text(to_yaml(config))
        rollouts = RolloutStream(
            engine,
            prompts.prompts_at,
            partial(sampling_at, config),
            first_step=0,
            last_step=config.steps,
            staleness_at=lambda _: 0,
            recorded=True,  # the weights stay what they are
        )
        rounds = config.rollout.dynamic_sampling_rounds
        credit = PlanningCredit.of(config) if config.hicra.enabled else None
        for step in range(config.steps):
            with journal.step(step, FULL):
                sampled = sample(step, rollouts, grader, journal, rounds=rounds)
                groups, grades = sampled.groups, sampled.grades
                journal.dump(groups, grades)
                journal.note(measures.rollout_measures(groups, grades) | sampled.measures)
                journal.note({} if credit is None else credit.watch(groups))
                for warning in measures.warnings_of(grades):
                    journal.say(f"warning: {warning}")
        if speaks:
            look = shlex.join(["megatron-bupo", "rollouts", "show", str(run_dir), "--worst", "3"])
            journal.conclude(f"\nNothing was trained. To read what was sampled: {look}")
