"""PPO as a user runs it: a critic beside the policy, through warm-up, phases and a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import Bed, metrics, run

pytestmark = pytest.mark.slow

PPO = (
    "algorithm.advantage=gae",
    "algorithm.gamma=0.98",
    "algorithm.gae_lambda=0.9",
    "critic.warmup_steps=2",
    "critic.minibatches=4",
    "critic.optimizer.lr=1e-3",
    "critic.optimizer.decay=linear",
    "optimizer.warmup_steps=4",
    "bupo.internal_steps=2",
    "evaluation.every=0",
    "data.eval=null",
    "debug.dump_rollouts=true",
    "checkpoint.keep=9",
)


@pytest.fixture(scope="module")
def ppo(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed. To be read only."""
    run_dir = tmp_path_factory.mktemp("ppo") / "run"
    bed.train(run_dir, *PPO)
    return run_dir


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(d / "model.safetensors") for d in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def dumped(run_dir: Path, step: int) -> list[dict[str, Any]]:
    file = run_dir / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_stopped_before(step: int, finished: Path, run_dir: Path) -> None:
    """Make `run_dir` what `finished` was before `step`."""
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "hf")
    for later in range(step + 1, 7):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{later:06d}")


def test_the_critic_warms_up_alone_and_the_phases_come_after_it(
    bed: Bed, ppo: Path, tmp_path: Path
):
    lines = metrics(ppo)
    internal, full = "internal layer 5", "full"
    assert [line["policy"] for line in lines] == ["critic alone"] * 2 + [internal] * 2 + [full] * 2
    rates = [line.get("update/learning_rate", 0.0) for line in lines]
    assert rates == pytest.approx([0, 0, 1.25e-4, 2.5e-4, 3.75e-4, 5e-4])
    rates = [line["critic/learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3 * (6 - step) / 6 for step in range(6)])
    assert ["sync/sent_bytes" in line for line in lines] == [False] * 2 + [True] * 4
    assert lines[0]["critic/values_mean"] == 0  # a head of zeros
    assert all(line["critic/values_mean"] != 0 for line in lines[1:])
    assert all(line["critic/grad_norm"] > 0 for line in lines)
    assert lines[0]["rollout/logprob_gap_max_nats"] < 1e-5
    warm = ppo / "checkpoints" / "step_000002"
    done = run("convert", "megatron-to-hf", "--megatron", warm, "--out", tmp_path / "warm")
    assert done.code == 0, done.err
    assert_same_weights(tmp_path / "warm", bed.folder / "model")


def test_advantages_and_returns_are_those_of_the_dumped_values_and_rewards(ppo: Path):
    for step, record in enumerate(metrics(ppo)):
        returns, values, plain, told = [], [], [], []
        for line in dumped(ppo, step):
            after = advantage = 0.0
            reward, its = line["reward"], []
            for value in reversed(line["values"]):
                advantage = reward + 0.98 * after - value + 0.98 * 0.9 * advantage
                after, reward = value, 0.0
                its.append(advantage)
            plain += reversed(its)
            values += line["values"]
            returns += line["returns"]
            told += line["advantages"]
        assert returns == pytest.approx([a + v for a, v in zip(plain, values, strict=True)])
        mean, deviation = fmean(plain), variance(plain) ** 0.5
        assert told == pytest.approx([(a - mean) / deviation for a in plain], abs=1e-5)
        assert record["critic/values_mean"] == pytest.approx(fmean(values))
        assert record["critic/returns_mean"] == pytest.approx(fmean(returns))
        missed = [r - v for r, v in zip(returns, values, strict=True)]
        explained = 1 - variance(missed) / variance(returns)
        assert record["critic/explained_variance"] == pytest.approx(explained, abs=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="warm-up"),
        pytest.param(3, id="internal", marks=pytest.mark.slow),
        pytest.param(5, id="full", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_is_the_run_that_nothing_disturbed(
    bed: Bed, ppo: Path, tmp_path: Path, step: int
):
    as_stopped_before(step, ppo, tmp_path / "run")
    assert bed.train(tmp_path / "run", *PPO) == metrics(ppo)
    assert_same_weights(tmp_path / "run" / "hf", ppo / "hf")


def test_a_critic_goes_on_under_another_layout(bed: Bed, ppo: Path, tmp_path: Path):
    as_stopped_before(4, ppo, tmp_path / "run")
    other = ["parallel.pp=1", "parallel.tp=2", "parallel.sp=true"]
    lines = bed.train(tmp_path / "run", *PPO, *other)
    for ours, theirs in zip(lines[4:], metrics(ppo)[4:], strict=True):
        for name in ("values_mean", "value_loss", "grad_norm", "explained_variance"):
            key = f"critic/{name}"
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


def test_a_critic_of_another_size_and_all_that_a_policy_may_meet(
    bed: Bed, tmp_path: Path, tiny_model_dir: Callable[..., Path]
):
    settings = [
        *PPO,
        f"critic.path={tiny_model_dir(family='llama', vocab=16, layers=2, hidden=16)}",
        "algorithm.kl_coefficient=0.1",
        "algorithm.kl_in=reward",
        "algorithm.kl_estimator=k1",
        "algorithm.mask_truncated=true",
        "algorithm.minibatches=1",
        'critic.optimizer.lr_factors={embedding: 0, "1": 0.1, value_head: 10}',
        "evaluation.every=3",
        f"data.eval={bed.folder / 'eval.jsonl'}",
    ]
    lines = bed.train(tmp_path / "one", *settings)
    cut = [line for line in dumped(tmp_path / "one", 3) if line["finish_reason"] != "stop"]
    assert cut
    assert any(any(line["values"]) for line in cut)
    assert not any(any(line["advantages"]) or any(line["returns"]) for line in cut)
    kept = [line for line in dumped(tmp_path / "one", 3) if line["finish_reason"] == "stop"]
    assert any(line["returns"][-1] != line["reward"] for line in kept)  # less its last token's KL
    replay = (f"debug.replay={tmp_path / 'one'}", "evaluation.every=0", "data.eval=null")
    replayed = bed.train(tmp_path / "two", *settings, *replay)
    for one, other in zip(lines, replayed, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(("sync/", "eval/"))} == {
            k: v for k, v in other.items() if not k.startswith("sync/")
        }


def refused(bed: Bed, run_dir: Path, *settings: str) -> str:
    done = run("train", *bed.settings(run_dir, *settings))
    assert (done.code, done.out) == (2, "")
    return done.err


def test_a_critic_that_cannot_be_is_refused_by_name(
    bed: Bed, ppo: Path, finished: Path, tmp_path: Path, tiny_model_dir: Callable[..., Path]
):
    error = refused(bed, tmp_path / "run", *PPO, "critic.path=/none")
    assert error.startswith("error: critic.path: /none: no such directory")
    small = tiny_model_dir(vocab=8)
    error = refused(bed, tmp_path / "run", *PPO, f"critic.path={small}")
    assert error.startswith(f"error: critic.path={small}: its vocabulary ends at 7, but")
    shutil.copytree(tiny_model_dir(vocab=16), tmp_path / "wide")
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    tensors["score.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
    error = refused(bed, tmp_path / "run", *PPO, f"critic.path={tmp_path / 'wide'}")
    assert "score.weight: has shape [2, 32] on disk, but" in error
    shutil.copytree(finished, tmp_path / "grpo")
    shutil.rmtree(tmp_path / "grpo" / "checkpoints" / "step_000006")
    error = refused(bed, tmp_path / "grpo", *PPO)
    assert "holds no critic" in error
    as_stopped_before(5, ppo, tmp_path / "ppo")
    error = refused(bed, tmp_path / "ppo", *PPO, f"critic.path={tiny_model_dir(vocab=16)}")
    assert "is a model with layers=4, but" in error
    done = run("train", *bed.settings(tmp_path / "ppo", "bupo.internal_steps=0"))
    assert done.code == 0, done.err
    assert "leaving the checkpoint's critic behind" in done.out
