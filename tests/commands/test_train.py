from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bupo.cli import main
from megatron_bupo.commands.train import describe
from megatron_bupo.config import load_config
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.config.schema import ParallelConfig
from tests.run_files import RunFiles, write_run_files

ROOT = Path(__file__).parents[2]
NEEDED = ["model.path=model", "data.train=train.jsonl"]


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> RunFiles:
    return write_run_files(tmp_path, tiny_model_dir())


def described(layers: int | None, *overrides: str, world_size: int | None = None) -> list[str]:
    config = load_config(None, [*NEEDED, *overrides])
    return list(describe(config, parallel_sizes(config, world_size), layers))


def test_the_layout_names_ranks_layers_groups_and_phases():
    lines = described(
        6, "parallel.tp=2", "parallel.pp=2", "steps=60", "bupo.target_layer=5",
        "bupo.internal_steps=10", world_size=8,
    )  # fmt: skip
    assert lines == [
        "8 ranks = parallel.tp 2 x parallel.pp 2 x parallel.dp 2",
        "stage 0, ranks 0-3: embedding, layers 1-3",
        "stage 1, ranks 4-7: layers 4-6, unembedding, target layer 5",
        "tensor-parallel groups: [0, 1] [2, 3] [4, 5] [6, 7]",
        "data-parallel groups: [0, 2] [1, 3] [4, 6] [5, 7]",
        "steps 0-9: internal layer 5",
        "steps 10-59: full policy",
    ]


def test_chunks_of_an_interleaved_stage_are_told_apart():
    lines = described(8, "parallel.pp=2", "parallel.vpp=2", "bupo.stages=[{layer:6,steps:2}]")
    assert lines[1:3] == [
        "stage 0, rank 0: embedding, layers 1-2 and 5-6, target layer 6",
        "stage 1, rank 1: layers 3-4 and 7-8, unembedding",
    ]


def test_a_pipeline_of_single_layers_on_one_rank_each():
    lines = described(2, "parallel.pp=2")
    assert lines[1:3] == [
        "stage 0, rank 0: embedding, layer 1",
        "stage 1, rank 1: layer 2, unembedding",
    ]


@pytest.mark.parametrize(
    ("overrides", "phases"),
    [
        ([], ["steps 0-299: full policy"]),
        (["steps=1"], ["step 0: full policy"]),
        (
            ["bupo.stages=[{layer:2,steps:1},{layer:4,steps:20}]", "bupo.read_out_norm=true"],
            [
                "step 0: internal layer 2, read out through the final norm",
                "steps 1-20: internal layer 4, read out through the final norm",
                "steps 21-299: full policy",
            ],
        ),
        (
            ["steps=3", "bupo.stages=[{layer:2,steps:5},{layer:4,steps:5}]"],
            ["steps 0-2: internal layer 2"],
        ),
    ],
)
def test_phases_are_cut_at_the_last_step(overrides: list[str], phases: list[str]):
    assert described(None, *overrides)[3:] == phases


def test_many_groups_are_not_all_listed():
    lines = described(None, world_size=100)
    assert lines[1] == "tensor-parallel groups: [0] [1] [2] [3] ... (100 groups)"


def test_a_dry_run_prints_yaml_that_loads_as_the_same_run(
    files: RunFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overrides = [*files.settings, "parallel.pp=2", "bupo.target_layer=3", "bupo.internal_steps=4"]
    assert main(["train", "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert load_config(str(tmp_path / "again.yaml"), []) == load_config(None, overrides)
    assert "# stage 1, rank 1: layers 3-4, unembedding, target layer 3\n" in printed


def test_a_dry_run_checks_files_too(files: RunFiles, capsys: pytest.CaptureFixture[str]):
    (files.model / "model.safetensors").unlink()
    assert main(["train", "--dry-run", *files.settings]) == 2
    assert capsys.readouterr().err.startswith(f"error: {files.model}: holds neither model.safe")


def test_a_dry_run_prepares_nothing_and_says_what_will_be_prepared(
    files: RunFiles, capsys: pytest.CaptureFixture[str]
):
    missing = ["model.path=not-made-yet", "prepare=no_such_module:make"]
    assert main(["train", "--dry-run", *files.settings, *missing]) == 0
    assert (
        "# model.path=not-made-yet does not exist yet: prepare=no_such_module:make makes it\n"
        in capsys.readouterr().out
    )


def test_under_torchrun_the_number_of_ranks_is_the_launchers(
    files: RunFiles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main(["train", "--dry-run", *files.settings, "parallel.pp=4"]) == 2
    assert "which does not divide 6 ranks" in capsys.readouterr().err
    settings = ["parallel.pp=2", "rollout.prompts_per_step=96"]
    assert main(["train", "--dry-run", *files.settings, *settings]) == 0
    assert "# 6 ranks = parallel.tp 1 x parallel.pp 2 x parallel.dp 3\n" in capsys.readouterr().out


def test_a_dry_run_does_not_import_torch(files: RunFiles):
    program = (
        "import sys; from megatron_bupo.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'megatron', 'transformers'} & sys.modules.keys())); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "train", "--dry-run", *files.settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.endswith("\n[]\n")


def test_an_internal_phase_under_its_own_layout_is_laid_out_too():
    config = load_config(None, [*NEEDED, "parallel.pp=4", "steps=9", "bupo.target_layer=2"])
    bupo = replace(config.bupo, internal_steps=5, internal_layout=ParallelConfig(tp=2))
    config = replace(config, bupo=bupo)
    assert list(describe(config, parallel_sizes(config, None), 8))[5:] == [
        "tensor-parallel groups: [0] [1] [2] [3]",
        "data-parallel groups: [0] [1] [2] [3]",
        "internal layer 2 under a layout of its own, without the layers above:",
        (
            "4 ranks = bupo.internal_layout.tp 2 x bupo.internal_layout.pp 1 "
            "x bupo.internal_layout.dp 2"
        ),
        "stage 0, ranks 0-3: embedding, layers 1-2, unembedding, target layer 2",
        "tensor-parallel groups: [0, 1] [2, 3]",
        "data-parallel groups: [0, 2] [1, 3]",
        "steps 0-4: internal layer 2, under bupo.internal_layout",
        "steps 5-8: full policy, under parallel",
    ]
