"""The demo: its recipe for three steps, and, by `make test-wide`, from a home that knows nothing of
it to its end.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_bupo.bed import chain_sums
from megatron_bupo.bed.prepare import make_bed
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.types import Prompt, Sampling
from tests.runs import ROOT, Done, metrics, run, run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BED = Path(".cache") / "megatron_bupo" / "chain_sums"
SETTINGS = ("--config", ROOT / "conf" / "demo.yaml")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """How the demo ended in a fresh home, and that home: its run is in `run`."""
    home = tmp_path_factory.mktemp("home")
    command = ["-m", "megatron_bupo", "train", *SETTINGS, f"run_dir={home / 'run'}"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(home))
        return run_python(*command, timeout_s=800), home


def accuracy(model_dir: Path, *, temperature: float, responses_per_prompt: int) -> float:
    """On the held-out prompts."""
    engine = EmbeddedEngine(model_dir, AutoTokenizer.from_pretrained(model_dir), batch_size=512)
    prompts = [
        Prompt(
            i,
            tuple(chain_sums.encode(text := chain_sums.prompt(operands))),
            str(sum(operands)),
            text,
        )
        for i, operands in enumerate(chain_sums.EVAL)
    ]
    sampling = Sampling(
        responses_per_prompt=responses_per_prompt,
        max_response_tokens=14,
        temperature=temperature,
        seed=0,
    )
    rewards = [
        chain_sums.reward(rollout.text, rollout.prompt.answer)
        for group in engine.generate(prompts, sampling)
        for rollout in group.rollouts
    ]
    return sum(rewards) / len(rewards)


def test_its_recipe_trains_both_policies_on_a_bed_that_is_there(tmp_path: Path):
    make_bed(tmp_path / BED, steps=1)
    short = [f"run_dir={tmp_path / 'run'}", "steps=3", "bupo.internal_steps=2"]
    done = run("train", *SETTINGS, *short, "evaluation.every=0", env={"HOME": str(tmp_path)})
    assert (done.code, done.err) == (0, "")
    lines = metrics(tmp_path / "run")
    assert [line["policy"] for line in lines] == ["internal layer 5"] * 2 + ["full"]
    assert max(line.get("rollout/logprob_gap_max_nats", 0) for line in lines) < 1e-4
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1


@pytest.mark.wide
def test_the_demo_makes_its_model_and_teaches_it(demo: tuple[Done, Path]):
    done, home = demo
    assert done.code == 0, done.err
    assert done.err == "Making the base model: 500 supervised steps, once\n"
    lines = metrics(home / "run")
    assert [line["policy"] for line in lines] == ["internal layer 5"] * 10 + ["full"] * 50
    assert 0.2 < lines[0]["eval/initial_accuracy_mean"] < 0.35
    assert lines[-1]["eval/accuracy_mean"] >= 0.58
    assert max(line.get("rollout/logprob_gap_max_nats", 0) for line in lines) < 1e-4
    assert "The same with plain GRPO, to compare: " in done.out


@pytest.mark.wide
def test_the_base_model_is_right_about_a_quarter_of_the_time(demo: tuple[Done, Path]) -> None:
    model = demo[1] / BED / "model"
    assert 0.23 < accuracy(model, temperature=1.0, responses_per_prompt=8) < 0.33
    assert 0.40 < accuracy(model, temperature=0.0, responses_per_prompt=1) < 0.65
