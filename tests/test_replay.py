"""Looking into rollouts: dumped, replayed, or made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.errors import InputError
from megatron_bupo.preflight import preflight
from tests.runs import Bed, metrics, run

pytestmark = pytest.mark.slow

QUIET = ["evaluation.every=0", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def dumped(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run over a phase switch that dumped its rollouts. To be read only."""
    run_dir = tmp_path_factory.mktemp("dumped") / "run"
    bed.train(run_dir, *QUIET, "debug.dump_rollouts=true")
    return run_dir


def lines_of(run_dir: Path, step: int) -> list[dict[str, Any]]:
    file = run_dir / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def apart_from_sync(record: dict[str, Any]) -> dict[str, Any]:
    """A replay sends its weights nowhere."""
    return {k: v for k, v in record.items() if not k.startswith("sync/")}


def test_a_replayed_run_is_the_run_to_the_bit_with_neither_engine_grader_nor_data(
    bed: Bed, dumped: Path, tmp_path: Path
):
    without = ["data.train=/none.jsonl", "data.eval=null", "reward.function=none:none"]
    settings = [f"debug.replay={dumped}", "debug.dump_rollouts=true", *without]
    bed.train(tmp_path, *QUIET, *settings)
    one, other = ([apart_from_sync(line) for line in metrics(d)] for d in (tmp_path, dumped))
    assert one == other
    one, other = (load_file(d / "hf" / "model.safetensors") for d in (tmp_path, dumped))
    assert [name for name in other if not torch.equal(one[name], other[name])] == []
    for step in range(6):
        assert lines_of(tmp_path, step) == lines_of(dumped, step)


def test_a_dump_agrees_with_the_metrics_of_its_step(dumped: Path):
    for step, record in enumerate(metrics(dumped)):
        lines = lines_of(dumped, step)
        assert {line["policy"] for line in lines} == {record["policy"]}
        assert {line["policy_version"] for line in lines} == {step}
        rewards = [line["reward"] for line in lines]
        assert sum(rewards) / 16 == pytest.approx(record["rollout/reward_mean"])
        entropies = [x for line in lines for x in line["policy_entropies"]]
        key = "entropy/internal_nats" if step < 3 else "entropy/full_nats"
        assert sum(entropies) / len(entropies) == pytest.approx(record[key], abs=1e-6)
        for line in lines:
            assert len(line["advantages"]) == len(line["old_logprobs"]) == len(line["response_ids"])


def test_rollouts_without_training_are_those_that_training_begins_with(
    bed: Bed, dumped: Path, tmp_path: Path
):
    only = [*QUIET, "steps=2", "debug.rollout_only=true"]
    done = run("train", *bed.settings(tmp_path, *only))
    assert done.code == 0, done.err
    assert "Nothing was trained. To read what was sampled: megatron-bupo rollouts" in done.out
    learned = {"policy", "advantages", "old_logprobs", "policy_entropies", "ref_logprobs"}
    learned |= {"values", "returns"}  # of a critic
    for line, trained in zip(lines_of(tmp_path, 0), lines_of(dumped, 0), strict=True):
        assert line["policy"] is None
        assert {k: v for k, v in trained.items() if k not in learned} == {
            k: v for k, v in line.items() if k not in learned
        }
    assert {line["policy_version"] for line in lines_of(tmp_path, 1)} == {0}
    record = metrics(tmp_path)[0]
    assert record == {k: v for k, v in metrics(dumped)[0].items() if k in record} | {
        "policy": "full"
    }
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "hf").exists()


def refused(bed: Bed, run_dir: Path, *more: str) -> str:
    with pytest.raises(InputError) as error:
        preflight(load_config(None, bed.settings(run_dir, *QUIET, *more)), None)
    return str(error.value)


def test_a_replay_that_cannot_be_is_refused_before_it_starts(
    bed: Bed, dumped: Path, tmp_path: Path
):
    replay, files = f"debug.replay={dumped}", dumped / "rollouts"
    first = files / "step-000000.jsonl"
    assert refused(bed, tmp_path, replay, "steps=7") == (
        f"{replay}: step 6 is missing from {files}; steps 0 to 5 are there; set steps=6"
    )
    assert refused(bed, tmp_path, replay, "rollout.prompts_per_step=8") == (
        f"rollout.prompts_per_step=8: {first} has 4; set rollout.prompts_per_step=4"
    )
    assert refused(bed, tmp_path, replay, "rollout.responses_per_prompt=2") == (
        f"rollout.responses_per_prompt=2: {first} has 4; set rollout.responses_per_prompt=4"
    )
    short = ["rollout.max_response_tokens=1", "data.max_prompt_tokens=1"]
    tokens = len(lines_of(dumped, 0)[0]["input_ids"] + lines_of(dumped, 0)[0]["response_ids"])
    assert refused(bed, tmp_path, replay, *short) == (
        f"{first}: line 1: prompt and response have {tokens} tokens, more than "
        "data.max_prompt_tokens + rollout.max_response_tokens=2; raise rollout.max_response_tokens"
    )
    assert refused(bed, tmp_path, "debug.replay=/none") == (
        "/none: there is no such directory; name a run_dir"
    )
    assert refused(bed, tmp_path, f"debug.replay={bed.folder}").startswith(
        f"{bed.folder}: holds no rollouts; "
    )


def test_another_vocabulary_is_refused_by_file_and_line(bed: Bed, dumped: Path, tmp_path: Path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for file in (dumped / "rollouts").iterdir():
        (folder / file.name).write_text(file.read_text())
    file = folder / "step-000004.jsonl"
    lines = lines_of(tmp_path, 4)
    lines[2]["response_ids"][0] = 5000
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(bed, tmp_path / "run", f"debug.replay={tmp_path}")
    assert message.startswith(f"{file}: line 3: token id 5000 is outside the model's vocabulary of")


def test_a_training_run_is_not_gone_on_with_without_training(bed: Bed, dumped: Path):
    assert refused(bed, dumped, "debug.rollout_only=true").startswith(
        f"run_dir={dumped}: holds a training run ({dumped}/checkpoints/step_000006)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["debug.rollout_only=true"],
            "generates nothing, and debug.rollout_only=true does nothing else; leave one",
        ),
        (
            ["evaluation.every=2", "data.eval=eval.jsonl"],
            "has no engine that evaluation.every=2 could sample from; set evaluation.every=0",
        ),
        (["run_dir=/run"], "is of run_dir=/run itself; choose another run_dir for the run that"),
    ],
)
def test_a_replay_excludes(settings: list[str], message: str):
    needed = ["model.path=model", "data.train=train.jsonl", "debug.replay=/run/rollouts"]
    with pytest.raises(InputError) as error:
        check(load_config(None, [*needed, *settings]), None)
    assert str(error.value).startswith(f"debug.replay=/run/rollouts: {message}")
