"""Each example does what it says."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean

import pytest

from megatron_bupo import cli
from megatron_bupo.bed.chain_sums import encode
from megatron_bupo.bed.prepare import make_bed
from megatron_bupo.config import load_config
from megatron_bupo.record.metrics import read_metrics
from megatron_bupo.rewards.functions import arguments_of, resolve
from megatron_bupo.types import Prompt, Rollout

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files with a base model that has hardly learned."""
    directory = tmp_path_factory.mktemp("examples") / "bed"
    make_bed(directory, steps=2)
    return directory


def _run(main: Callable[[list[str]], object], argv: list[str], out: Path) -> str:
    """What a command prints, run in a process of its own from this folder's parent."""

    def work() -> None:
        with out.open("w") as file, redirect_stdout(file):
            sys.exit(main(argv) or 0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    return out.read_text()


def _on(bed: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Settings of a run of a few steps on `bed`."""
    paths = [f"model.path={bed}/model", f"data.train={bed}/train.jsonl", f"run_dir={run_dir}"]
    off = ["prepare=null", "data.eval=null", "evaluation.every=0", "logging.tensorboard=false"]
    return [*paths, *off, *overrides]


REWARD = f"{EXAMPLES}/custom_reward.py:shown_work"


@pytest.mark.parametrize(
    ("text", "reward"),
    [(">13>16>22#22", 1.0), ("#22", 0.5), (">3>6>12#22", 0.5), (">13>16>22#12", 0.0), ("22", 0.0)],
)
def test_the_custom_reward_wants_the_work_shown(text: str, reward: float):
    prompt = Prompt(index=0, input_ids=(4,), answer="22", text="4+9+3+6=")
    rollout = Rollout(prompt, (1,), text, (-1.0,), (1.0,), "stop", 0)
    function = resolve(REWARD)
    args, keywords = arguments_of(function, REWARD).of(rollout)
    assert function(*args, **keywords) == reward


def test_a_run_grades_with_the_custom_reward(bed: Path, tmp_path: Path):
    overrides = _on(bed, tmp_path / "run", "steps=1", "parallel.pp=1", f"reward.function={REWARD}")
    demo = str(EXAMPLES.parent / "conf" / "demo.yaml")
    _run(cli.main, ["train", "--config", demo, *overrides], tmp_path / "out")
    (record,) = read_metrics(tmp_path / "run")
    assert record["rollout/reward_warnings"] == 0
    assert (record["rollout/reward_mean"] * 2 * 16 * 8).is_integer()  # halves, of 128 responses


def test_stages_train_bottom_up(bed: Path, tmp_path: Path):
    file = str(EXAMPLES / "bottom_up_stages.yaml")
    phases = load_config(file, []).bupo.phases()
    assert [layer for layer, _ in phases] == [3, 5]
    steps = sum(steps for _, steps in phases) + 1
    overrides = _on(bed, tmp_path / "run", f"steps={steps}", "checkpoint.every=100")
    _run(cli.main, ["train", "--config", file, *overrides], tmp_path / "out")
    trained = [record["policy"] for record in read_metrics(tmp_path / "run")]
    expected = [f"internal layer {layer}" for layer, steps in phases for _ in range(steps)]
    assert trained == [*expected, "full"]


def test_the_rows_are_the_chain_sum_that_the_example_speaks_of():
    rows = [json.loads(line) for line in (EXAMPLES / "rows.jsonl").read_text().splitlines()]
    texts = ("4+9+3+6=>13>16>22#22$", "4+9+3+6=>3>6>12#12$")
    assert [row["input_ids"] for row in rows] == [encode(text) for text in texts]
    assert all(row["prompt_length"] == len("4+9+3+6=") for row in rows)


def test_internal_policies_are_scored_as_the_command_scores_them(bed: Path, tmp_path: Path):
    from examples.score_internal_policies import main

    model, rows = str(bed / "model"), str(EXAMPLES / "rows.jsonl")
    printed = _run(main, [model, rows, "parallel.pp=2"], tmp_path / "out").splitlines()[1:]
    shown = {line[:16].strip(): line[16:] for line in printed}
    assert list(shown) == [*(f"internal layer {n}" for n in range(1, 6)), "full"]
    for policy, name in {"layer=3": "internal layer 3", "full": "full"}.items():
        out = tmp_path / "scores.jsonl"
        argv = ["score", "--model", model, "--data", rows, "--policy", policy, "--out", str(out)]
        _run(cli.main, argv, tmp_path / "quiet")
        scores = [json.loads(line) for line in out.read_text().splitlines()]
        entropy = fmean(h for score in scores for h in score["entropies"])
        numbers = [*(fmean(score["logprobs"]) for score in scores), entropy]
        expected = pytest.approx(numbers, abs=0.6e-3)  # printed with three digits
        assert [float(word) for word in shown[name].replace("|", " ").split()] == expected
