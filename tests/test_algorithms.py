"""Whole runs with other advantages and losses than GRPO's, through a phase switch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from megatron_bupo.data.order import PromptStream
from megatron_bupo.record.rollout_files import grouped, read_rollouts
from megatron_bupo.rollout.dynamic_sampling import place_of
from megatron_bupo.types import Prompt
from tests.algorithm.test_advantages import loops
from tests.rollout.fake import fake_server
from tests.runs import Bed, metrics, run

if TYPE_CHECKING:
    from megatron_bupo.record.rollout_files import RecordedRollout

pytestmark = pytest.mark.slow

SHORT = (
    "steps=4",
    "bupo.internal_steps=2",
    "parallel.pp=1",
    "checkpoint.every=2",
    "evaluation.every=0",
    "data.eval=null",
    "debug.dump_rollouts=true",
)
ROWS, PROMPTS = 48, 4  # of the bed
METHODS = {
    "rloo": ["algorithm.advantage=rloo"],
    "reinforce_plus_plus": [
        "algorithm.advantage=reinforce_plus_plus",
        "algorithm.loss=cispo",
        "algorithm.clip_low=1",
        "algorithm.entropy_coefficient=0.01",
        "algorithm.kl_coefficient=0.1",
        "algorithm.kl_in=reward",
        "algorithm.kl_estimator=k1",
        "rollout.responses_per_prompt=1",
        "rollout.prompts_per_step=16",
    ],
    "dr_grpo": ["algorithm.advantage=dr_grpo", "algorithm.loss=gspo"],
    "gae": ["algorithm.advantage=gae", "critic.optimizer.lr=1e-3"],
}


def dumped(run_dir: Path, step: int) -> list[RecordedRollout]:
    return read_rollouts(run_dir / "rollouts" / f"step-{step:06d}.jsonl")


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        pytest.param(*method, id=method[0], marks=[pytest.mark.slow] * (method[0] != "rloo"))
        for method in METHODS.items()
    ],
)
def test_both_phases_learn_by_the_advantages_that_are_asked_for(
    bed: Bed, tmp_path: Path, estimator: str, words: list[str]
):
    mask = "algorithm.mask_truncated=true"
    lines = bed.train(tmp_path, *SHORT, "steps=2", "bupo.internal_steps=1", mask, *words)
    assert [line["policy"] for line in lines] == ["internal layer 5", "full"]
    assert all(line["update/grad_norm"] > 0 for line in lines)
    cut = 0
    for step in range(2):
        rollouts = dumped(tmp_path, step)
        size = len(rollouts) // len(grouped(rollouts))
        width = max(len(r.response_ids) for r in rollouts)
        learns = [r.finish_reason == "stop" for r in rollouts]
        cut += learns.count(False)
        lengths = [len(r.response_ids) for r in rollouts]
        masks = [[s and t < n for t in range(width)] for s, n in zip(learns, lengths, strict=True)]
        kl = [[0.0] * width for _ in rollouts]
        if rollouts[0].ref_logprobs is not None:
            for row, r in zip(kl, rollouts, strict=True):
                assert r.old_logprobs is not None
                assert r.ref_logprobs is not None
                pairs = zip(r.old_logprobs, r.ref_logprobs, strict=True)
                row[: len(r.response_ids)] = [0.1 * (old - ref) for old, ref in pairs]
        rewards = [r.grade.reward for r in rollouts]
        groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
        # A critic that has learned nothing says 0, which leaves REINFORCE++
        expected = loops(groups, masks, kl, estimator.replace("gae", "reinforce_plus_plus"))
        alike = [
            r.advantages == pytest.approx(row[: len(r.response_ids)], abs=1e-5)
            for r, row in zip(rollouts, expected, strict=True)
        ]
        assert all(alike) == (estimator != "gae" or step == 0)
    assert 0 < cut < 32


DYNAMIC = ("rollout.dynamic_sampling_rounds=2", "rollout.responses_per_prompt=2")


@pytest.fixture(scope="module")
def replaced(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose groups without a signal were replaced. To be read only."""
    run_dir = tmp_path_factory.mktemp("replaced") / "run"
    bed.train(run_dir, *SHORT, *DYNAMIC)
    return run_dir


def test_groups_without_a_signal_are_replaced_by_those_of_further_prompts(replaced: Path):
    stream = PromptStream(
        [Prompt(i, (), "", "") for i in range(ROWS)], prompts_per_step=PROMPTS, seed=0
    )
    total, shifts = 0, list[float]()
    for step, line in enumerate(metrics(replaced)):
        own = [prompt.index for prompt in stream.prompts_at(step)]
        further = [
            prompt.index
            for number in (1, 2)
            for prompt in stream.prompts_at(place_of(step, number, rounds=2))
        ]
        groups = grouped(dumped(replaced, step))
        assert len(groups) == PROMPTS
        kept = [group.prompt.index for group in groups]
        others = [index for index, asked in zip(kept, own, strict=True) if index != asked]
        assert set(others) <= set(further)
        assert len(others) == line["rollout/replaced_groups"] <= line["rollout/further_groups"]
        assert {r.policy_version for group in groups for r in group.rollouts} == {step}
        total += len(others)
        rewards = [r.grade.reward for r in dumped(replaced, step)]
        assert line["rollout/kept_reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
        shifts.append(line["rollout/kept_reward_mean"] - line["rollout/reward_mean"])
        if line["rollout/groups_with_signal_fraction"] < 1:
            assert line["rollout/dynamic_rounds"] == 2
    assert total > 2
    assert any(shifts)


def test_a_run_resumed_on_other_ranks_replaces_the_same_groups(
    bed: Bed, replaced: Path, tmp_path: Path
):
    resumed = tmp_path / "run"
    shutil.copytree(replaced, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    lines = bed.train(resumed, *SHORT, *DYNAMIC, "parallel.dp=2")
    counts = [[line["rollout/replaced_groups"] for line in x] for x in (lines, metrics(replaced))]
    assert counts[0] == counts[1]
    for step in range(2, 4):
        one, other = (
            [(r.prompt.index, r.response_ids) for r in dumped(d, step)] for d in (resumed, replaced)
        )
        assert one == other


def test_rollouts_without_training_are_replaced_alike(bed: Bed, replaced: Path, tmp_path: Path):
    only = ["debug.rollout_only=true", "steps=1"]
    done = run("train", *bed.settings(tmp_path, *SHORT, *DYNAMIC, *only))
    assert done.code == 0, done.err
    one, other = (
        [(r.prompt.index, r.response_ids) for r in dumped(d, 0)] for d in (tmp_path, replaced)
    )
    assert one == other


def test_servers_are_asked_for_replacements_while_later_steps_are_under_way(
    bed: Bed, tmp_path: Path
):
    ahead = ["rollout.engine=sglang", "rollout.max_staleness=1", "rollout.overlap_phases=full"]
    with fake_server(bed.folder / "model", tmp_path / "server") as fake:
        words = [*ahead, f"servers.addresses=[{fake.url}]", "checkpoint.export_hf=false"]
        lines = bed.train(tmp_path / "run", *SHORT, *DYNAMIC, *words)
    assert sum(line["rollout/replaced_groups"] for line in lines) > 0
    for step in range(4):
        behind = {step - r.policy_version for r in dumped(tmp_path / "run", step)}
        assert behind <= ({0} if step < 2 else {0, 1})
