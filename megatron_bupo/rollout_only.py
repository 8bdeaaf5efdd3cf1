"""`debug.rollout_only`: what would be asked, answered and graded? The rollouts of a training run's
steps without the training, for whoever writes a reward function or a prompt.

Step 0 is that of the training run, to the bit; the steps after it are sampled from the same
weights. Every step's rollouts go to run_dir/rollouts, its measures to run_dir/metrics.jsonl.
"""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.build import heartbeat, prompt_stream
from megatron_bupo.config import expand, to_yaml
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.engines import rollout_engine
from megatron_bupo.mcore import parallel
from megatron_bupo.preflight import Preflight
from megatron_bupo.record import measures
from megatron_bupo.record.journal import Journal
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.run import sampling_at


def rollout_only(ready: Preflight) -> None:
    """Generate, grade and write down `steps` steps; no trainer is built. Collective."""
    config, run_dir = ready.config, Path(expand(ready.config.run_dir))
    with ExitStack() as stack:
        stack.enter_context(heartbeat(config, run_dir, ready.layout.world))
        grader = Grader(config.reward)
        stack.callback(grader.close)
        stack.enter_context(parallel.joined(ready.layout, seed=config.seed))
        tokenizer = load_tokenizer(expand(config.model.tokenizer or config.model.path))
        prompts = prompt_stream(config, tokenizer)
        engine = rollout_engine(config, ready.architecture, tokenizer, run_dir=run_dir)
        stack.callback(engine.close)
        speaks = dist.get_rank() == 0
        journal = stack.enter_context(Journal(run_dir, config, first_step=0, speaks=speaks))
        engine.wait_until_up(journal.say)
        if speaks:
            (run_dir / "config.yaml").write_text(to_yaml(config))
        for step in range(config.steps):
            with journal.step(step, FULL):
                with journal.doing("generate"):
                    groups = engine.generate(prompts.prompts_at(step), sampling_at(config, step))
                with journal.doing("grade"):
                    grades = grader.grade(groups)
                journal.dump(groups, grades)
                journal.note(measures.rollout_measures(groups, grades))
                for warning in measures.warnings_of(grades):
                    journal.say(f"warning: {warning}")
        if speaks:
            look = shlex.join(["megatron-bupo", "rollouts", "show", str(run_dir), "--worst", "3"])
            journal.conclude(f"\nNothing was trained. To read what was sampled: {look}")
