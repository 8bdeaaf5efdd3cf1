"""What the command does as a whole, seen from outside: its files, its exit code, its output."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_bupo.config import load_config
from tests.runs import Bed, Done, metrics, run, run_python, start

pytestmark = pytest.mark.slow

INTERNAL_ONLY = {"entropy/internal_nats"}
EVERY_STEP = {
    "step",
    "policy",
    "rollout/reward_mean",
    "rollout/response_tokens_mean",
    "rollout/truncated_fraction",
    "rollout/reward_warnings",
    "entropy/full_nats",
    "update/loss",
    "update/grad_norm",
    "update/ratio_mean",
    "update/ratio_clipped_fraction",
    "update/kl_to_old_nats",
    "update/learning_rate",
}
ONE_PROCESS = ("parallel.pp=1",)
SHORT = ("checkpoint.every=10", "evaluation.every=0", "data.eval=null")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The final policy, as it was written for Hugging Face."""
    return load_file(run_dir / "hf" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_close_runs(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.pop("policy") == other.pop("policy")
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_every_step_has_one_line_with_all_that_it_measured(finished: Path):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["policy"] for line in lines] == ["internal layer 5"] * 3 + ["full"] * 3
    for line in lines:
        assert line.keys() >= EVERY_STEP
        assert (line.keys() >= INTERNAL_ONLY) == (line["policy"] != "full")
        assert all(math.isfinite(value) for key, value in line.items() if key != "policy")
        timed = {key for key in line if key.endswith("_s")}
        assert timed >= {"time/step_s", "time/generate_s", "time/update_s"}
        assert timed == {key for key in line if key.startswith("time/")}
    assert "eval/initial_accuracy_mean" in lines[0]
    assert [line["step"] for line in lines if "eval/accuracy_mean" in line] == [2, 5]


def test_the_trainer_and_the_engine_agree_on_the_full_policy(finished: Path):
    gaps = [line.get("rollout/logprob_gap_max_nats") for line in metrics(finished)]
    assert gaps[1:3] == [None, None]  # in the internal phase only the start is compared
    assert max(gaps[:1] + gaps[3:]) < 1e-5


def test_they_are_compared_in_the_internal_phase_as_often_as_asked(bed: Bed, tmp_path: Path):
    asked = [*ONE_PROCESS, *SHORT, "steps=5", "bupo.internal_steps=5", "debug.mismatch_every=2"]
    done = run("train", *bed.settings(tmp_path, *asked))
    key = "rollout/logprob_gap_k3_nats"
    gaps = {line["step"]: line[key] for line in metrics(tmp_path) if key in line}
    assert gaps.keys() == {0, 2, 4}
    assert all(0 <= gap < 1e-9 for gap in gaps.values())
    assert "Trainer and sampler: " in done.out
    assert "apart about" not in done.out


def test_a_run_leaves_its_settings_a_plot_and_the_newest_checkpoints(bed: Bed, finished: Path):
    settings = bed.settings(finished)
    assert load_config(str(finished / "config.yaml"), []) == load_config(None, settings)
    assert (finished / "training.png").stat().st_size > 10_000
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["step_000005", "step_000006"]


def test_the_trained_model_is_one_that_transformers_loads(bed: Bed, finished: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "hf")
    prompt = AutoTokenizer.from_pretrained(finished / "hf")("1+2+3+4=", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(bed.folder / "model")
    change = (model(**prompt).logits - base(**prompt).logits).abs().max()
    assert 1e-3 < change < 10


def test_the_internal_phase_leaves_what_is_above_its_layer_alone(bed: Bed, tmp_path: Path):
    bed.train(tmp_path, "steps=3", *SHORT)
    before, after = load_file(bed.folder / "model" / "model.safetensors"), weights(tmp_path)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    above = {name for name in after if name.startswith(("model.layers.5.", "model.norm."))}
    assert len(above) == 12
    assert changed == after.keys() - above


def test_no_internal_steps_is_grpo_to_the_bit(bed: Bed, tmp_path: Path):
    grpo = [*ONE_PROCESS, *SHORT, "steps=3", "bupo.internal_steps=0"]
    bed.train(tmp_path / "plain", *grpo, "bupo.target_layer=null")
    bed.train(tmp_path / "no steps", *grpo)
    bed.train(tmp_path / "common", *grpo, "bupo.optimizer_at_switch=common_step")
    bed.train(tmp_path / "reset", *grpo, "bupo.optimizer_at_switch=reset")
    for name in ("no steps", "common", "reset"):
        assert_same_run(tmp_path / "plain", tmp_path / name)


def test_what_happens_to_the_optimizer_at_the_switch_tells_runs_apart(bed: Bed, tmp_path: Path):
    short = [*ONE_PROCESS, *SHORT, "steps=3", "bupo.internal_steps=2"]
    runs = {
        policy: bed.train(tmp_path / policy, *short, f"bupo.optimizer_at_switch={policy}")
        for policy in ("per_layer_step", "common_step", "reset", "warmup")
    }
    assert all(run[:2] == runs["per_layer_step"][:2] for run in runs.values())
    last = [run[2]["update/ratio_mean"] for run in runs.values()]
    assert len(set(last)) == 4
    rates = {policy: run[2]["update/learning_rate"] for policy, run in runs.items()}
    assert rates == {**dict.fromkeys(runs, 5e-4), "warmup": 5e-5}


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.pp=1"],
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in (
                ["parallel.pp=1", "parallel.tp=2"],
                ["parallel.pp=1", "parallel.tp=2", "parallel.sp=true"],
                ["parallel.vpp=3"],
                ["parallel.pp=1", "parallel.dp=2", "parallel.distributed_optimizer=true"],
            )
        ),
    ],
    ids=lambda layout: " ".join(key.removeprefix("parallel.") for key in layout),
)
def test_a_run_does_not_depend_on_its_layout(
    bed: Bed, finished: Path, tmp_path: Path, layout: list[str]
):
    assert_close_runs(
        bed.train(tmp_path, "steps=4", "checkpoint.every=10", *layout), metrics(finished)[:4]
    )


def test_stages_train_one_layer_after_the_other(bed: Bed, tmp_path: Path):
    stages = "bupo.stages=[{layer:2,steps:2},{layer:4,steps:2}]"
    unset = ["bupo.target_layer=null", "bupo.internal_steps=0"]
    lines = bed.train(tmp_path, *SHORT, *ONE_PROCESS, *unset, stages)
    assert [line["policy"] for line in lines] == (
        ["internal layer 2"] * 2 + ["internal layer 4"] * 2 + ["full"] * 2
    )


def test_bfloat16_trains_and_is_written_as_such(bed: Bed, tmp_path: Path):
    lines = bed.train(tmp_path, *SHORT, "steps=4", "model.dtype=bfloat16")
    assert all(math.isfinite(line["update/grad_norm"]) for line in lines)
    assert max(line.get("rollout/logprob_gap_mean_nats", 0) for line in lines) < 0.02
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.bfloat16}


BAD_REWARD = """
import os, signal, time

def reward(response, answer):
    kind = len(response) % 5
    with open({log!r}, "a") as log:
        print(kind, file=log)
    if kind == 1:
        raise ValueError("no answer")
    if kind == 2:
        time.sleep(60)
    if kind == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 4:
        print("a reward function may print")
    return 1.0
"""


def test_a_reward_function_that_raises_hangs_or_crashes_costs_its_rollout_and_is_counted(
    bed: Bed, tmp_path: Path
):
    log, function = tmp_path / "log", tmp_path / "bad.py"
    function.write_text(BAD_REWARD.format(log=str(log)))
    bad = [f"reward.function={function}:reward", "reward.timeout_s=0.5", "steps=2"]
    lines = bed.train(tmp_path / "run", *SHORT, *ONE_PROCESS, *bad)
    kinds = [int(kind) for kind in log.read_text().split()]
    assert len(kinds) == 2 * 16
    assert set(kinds) == {0, 1, 2, 3, 4}
    failed = sum(kind in {1, 2, 3} for kind in kinds)
    assert sum(line["rollout/reward_warnings"] for line in lines) == failed
    assert sum(line["rollout/reward_mean"] for line in lines) * 16 == len(kinds) - failed


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_when_nobody_reads_its_output(bed: Bed, tmp_path: Path, world: int):
    running = start("train", *bed.settings(tmp_path, "steps=3", *SHORT, f"parallel.pp={world}"))
    assert os.read(running.pipes[0], 4) == b"step"
    os.close(running.pipes[0])
    at_its_end, write = os.pipe()
    os.close(write)
    running.pipes = at_its_end, running.pipes[1]
    assert running.wait() == Done(code=0, out="", err="")
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2]


def test_bad_input_that_only_a_rank_sees_is_still_one_line_and_code_2(bed: Bed, tmp_path: Path):
    done = run("train", *bed.settings(tmp_path, "data.max_prompt_tokens=3"))
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert "data.max_prompt_tokens" in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_model_that_its_tokenizer_does_not_fit_is_one_line_and_code_2(
    bed: Bed, tmp_path: Path, tiny_model_dir: Any
):
    small = f"model.path={tiny_model_dir(layers=6, vocab=8)}"
    named = f"model.tokenizer={bed.folder / 'model'}"
    done = run("train", *bed.settings(tmp_path / "run", small, named))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {named}: its tokenizer has the token ")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_dir_that_is_a_file_is_refused(bed: Bed, tmp_path: Path):
    (tmp_path / "run").touch()
    done = run("train", *bed.settings(tmp_path / "run"))
    assert done.code == 2
    assert done.err == (
        f"error: run_dir={tmp_path / 'run'}: cannot be written to (File exists); "
        "choose another run_dir\n"
    )


def test_bad_input_is_answered_before_anything_heavy_is_imported(bed: Bed, tmp_path: Path):
    program = """
import sys
from megatron_bupo.cli import main
code = main(["train", *sys.argv[1:]])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = run_python("-c", program, *bed.settings(tmp_path, "bupo.target_layer=6"))
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: bupo.target_layer=6: is the last layer of a 6-layer model, whose policy is the "
        "full policy; choose 1..5\n"
    )


def test_torchrun_gives_the_run_that_local_ranks_give(bed: Bed, finished: Path, tmp_path: Path):
    done = run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "megatron_bupo", "train", *bed.settings(tmp_path),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert_same_run(tmp_path, finished)
    assert [line.partition("  ")[0] for line in done.out.splitlines()[:6]] == [
        f"step {step}/6" for step in range(1, 7)
    ]
