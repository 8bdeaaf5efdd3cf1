from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_bupo.config.checks import CHOICES
from megatron_bupo.config.schema import (
    AlgorithmConfig,
    BupoConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
)
from megatron_bupo.record.summary import plain_command, summarise
from tests.record.runs import records, write

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = Config(
    steps=20,
    model=ModelConfig(path="model"),
    data=DataConfig(train="train.jsonl"),
    bupo=BupoConfig(target_layer=5, internal_steps=8),
    parallel=ParallelConfig(pp=2),
)
COMMAND = ["megatron-bupo", "train", "--config", "conf/demo.yaml", "run_dir=a b", "steps=20"]


def test_the_paragraph_tells_the_numbers_of_the_run(tmp_path: Path):
    run_dir = write(
        tmp_path / "run", records(("internal layer 5", 8), ("full", 12), evaluate_every=10)
    )
    paragraph, compare = summarise(run_dir, CONFIG, command=COMMAND).split("\n")
    for fact in [
        "20 steps of BuPO over 2 processes (tp=1 pp=2 dp=1)",
        "internal layer 5 for 8, then the full policy for 12",
        "0.250 before training, 0.450 after step 20",
        "0.220 over the first 5 steps, 0.370 over the last 5",  # means of .20-.24 and .35-.39
        "full policy 0.500 to 0.481, internal layer 5 2.000 to 1.930",
        "1200 s: 68% generating, 30% training",
    ]:
        assert fact in paragraph
    assert "graded" not in paragraph
    assert "bupo.internal_steps=0" in compare


def test_the_accuracy_of_each_benchmark_is_told(tmp_path: Path):
    some = records(("full", 20), evaluate_every=10)
    for record in some:
        if "eval/accuracy_mean" in record:
            record |= {"eval/AIME24_avg_at_32": 0.4, "eval/own_avg_at_1": 0.5}
            record |= {"eval/AIME24_pass_at_8": 0.7, "eval/initial_own_avg_at_1": 0.9}
    text = summarise(write(tmp_path / "run", some), CONFIG, command=COMMAND)
    assert "training, 0.450 (AIME24 0.400, own 0.500) after step 20." in text


def test_an_unfinished_run_and_failed_graders_are_told(tmp_path: Path):
    some = records(("internal layer 5", 3))
    some[1]["rollout/reward_warnings"] = 2.0
    text = summarise(write(tmp_path / "run", some), CONFIG, world_size=4, command=COMMAND)
    assert text.startswith("3 of 20 steps of BuPO over 4 processes (tp=1 pp=2 dp=2)")
    assert "2 responses could not be graded" in text
    assert "Accuracy" not in text


def test_a_grpo_run_is_called_so_and_has_nothing_to_compare_with(tmp_path: Path):
    text = summarise(write(tmp_path / "run", records(("full", 20))), CONFIG, command=COMMAND)
    assert "20 steps of GRPO" in text
    assert "to compare" not in text


def test_a_run_is_called_by_its_advantages(tmp_path: Path):
    config = replace(CONFIG, algorithm=AlgorithmConfig(advantage="rloo"))
    text = summarise(write(tmp_path / "run", records(("full", 20))), config, command=COMMAND)
    assert text.startswith("20 steps of RLOO over")
    both = write(tmp_path / "both", records(("internal layer 5", 8), ("full", 12)))
    text = summarise(both, config, command=COMMAND)
    assert text.startswith("20 steps of BuPO with RLOO over")
    assert "The same with plain RLOO, to compare: " in text
    assert text.endswith("-rloo")
    for advantage in CHOICES["algorithm.advantage"]:
        config = replace(CONFIG, algorithm=AlgorithmConfig(advantage=advantage))
        assert " steps of BuPO" in summarise(both, config, command=COMMAND)


def test_no_step_yet_is_told(tmp_path: Path):
    assert "no step" in summarise(tmp_path, CONFIG, command=COMMAND)


def test_the_command_to_compare_keeps_all_but_the_schedule_and_the_directory():
    given = [*COMMAND, "bupo.internal_steps=8"]
    assert shlex.split(plain_command(given, "runs/x", CONFIG)) == [
        *("megatron-bupo", "train", "--config", "conf/demo.yaml", "steps=20"),
        *("bupo.internal_steps=0", "run_dir=runs/x-grpo"),
    ]
    staged = replace(CONFIG, bupo=BupoConfig(stages=[StageConfig(layer=2, steps=3)]))
    given = ["/env/megatron_bupo/__main__.py", "train", "bupo.stages=[{layer: 2, steps: 3}]"]
    assert shlex.split(plain_command(given, "r", staged)) == [
        *("python", "-m", "megatron_bupo", "train", "bupo.stages=[]", "run_dir=r-grpo"),
    ]


def test_the_command_to_compare_shows_no_key():
    def shown(key: str) -> str:
        return shlex.split(plain_command([*COMMAND, f"servers.api_key={key}"], "r", CONFIG))[5]

    assert shown("open-sesame") == "servers.api_key=(hidden)"
    assert shown("${oc.env:SGLANG_API_KEY}") == "servers.api_key=${oc.env:SGLANG_API_KEY}"
