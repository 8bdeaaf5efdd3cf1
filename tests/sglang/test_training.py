from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from megatron_bupo.record.rollout_files import find_steps, read_rollouts
from tests.runs import Bed, metrics, run, start
from tests.sglang.real import sglang_settings, until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]


def test_trainer_and_server_agree_before_training_and_after_each_of_ten_steps(
    bed: Bed, tmp_path: Path
):
    """fp32, TP 2 x PP 2, weights by broadcast, over the phase switch."""
    settings = bed.settings(
        tmp_path,
        *sglang_settings(),
        "steps=11",
        "bupo.internal_steps=5",
        "parallel.tp=2",
        "sync.mode=broadcast",
        "debug.mismatch_every=1",
        "evaluation.every=0",
        "checkpoint.every=20",
    )
    done = run("train", *settings, timeout_s=500)
    assert done.code == 0, done.err
    gaps = [step["rollout/logprob_gap_max_nats"] for step in metrics(tmp_path)]
    assert len(gaps) == 11
    assert max(gaps) < 1e-5


# Before two of the steps it waits for the test, so that each life of a server sees some.
PATIENT_REWARD = """
import pathlib, time
graded = 0
def reward(response, answer):
    global graded
    graded += 1
    for before, gate in {gates}:
        while graded > before and not pathlib.Path(gate).exists():
            time.sleep(0.05)
    return float(sum(int(c) for c in response + answer if c.isdigit()) % 3 == 0)
"""
STEPS, PROMPTS, RESPONSES, GRADERS = 10, 16, 24, 2


def test_a_server_killed_twice_costs_no_response_and_leaves_none_stale(bed: Bed, tmp_path: Path):
    rng, victim = random.Random(0), Victim(tmp_path)
    gates = {life: str(tmp_path / f"life-{life}") for life in (2, 3)}
    per_step = PROMPTS * RESPONSES // GRADERS
    waits = [(3 * per_step, gates[2]), (7 * per_step, gates[3])]
    (tmp_path / "reward.py").write_text(PATIENT_REWARD.format(gates=waits))
    settings = bed.settings(
        tmp_path,
        *sglang_settings(),
        f"steps={STEPS}",
        "servers.count=2",
        "servers.health_every_s=1",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.responses_per_prompt={RESPONSES}",
        "rollout.max_response_tokens=100",
        "trainer.microbatch_size=64",
        f"reward.function={tmp_path / 'reward.py'}:reward",
        "reward.timeout_s=300",
        "debug.dump_rollouts=true",
        "evaluation.every=0",
        "checkpoint.every=20",
    )
    training = start("train", *settings)
    try:
        until(lambda: steps_done(tmp_path) >= 1)
        for life, gate in gates.items():
            time.sleep(rng.uniform(0, 3))
            os.kill(victim.pid(), signal.SIGKILL)
            until(lambda life=life: victim.lives() == life)
            Path(gate).touch()
        done = training.wait(timeout_s=200)
    finally:
        training.end()
    assert done.code == 0, done.err
    steps = find_steps(tmp_path)
    assert list(steps) == list(range(STEPS))
    for step, file in steps.items():
        rollouts = read_rollouts(file)
        asked = [(prompt, r) for prompt in range(PROMPTS) for r in range(RESPONSES)]
        order = list(dict.fromkeys(r.prompt.index for r in rollouts))
        assert [(order.index(r.prompt.index), r.response) for r in rollouts] == asked
        assert {span.version for r in rollouts for span in r.versions} == {step}
        assert {r.policy_version for r in rollouts} == {step}
        assert {r.grade.warning for r in rollouts} == {None}
    assert victim.address() in {r.server for r in read_rollouts(steps[STEPS - 1])}


class Victim:
    """A server that is killed, as its log tells of it."""

    def __init__(self, run_dir: Path) -> None:
        self.log = run_dir / "servers" / "server-0.log"

    def pid(self) -> int:
        """Of its present life."""
        return int(self._starts()[-1][1])

    def address(self) -> str:
        """Of its present life."""
        return f"http://127.0.0.1:{self._starts()[-1][0]}"

    def lives(self) -> int:
        """How often it has come up."""
        return self.log.read_text().count("The server is fired up")

    def _starts(self) -> list[tuple[str, str]]:
        pattern = r"^=== start .* --port (\d+) .*, pid (\d+)$"
        return re.findall(pattern, self.log.read_text(), re.MULTILINE)


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
