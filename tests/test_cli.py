from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_bupo import __version__
from megatron_bupo.cli import COMMANDS, main, parse
from tests.run_files import RunFiles, write_run_files

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> RunFiles:
    return write_run_files(tmp_path, tiny_model_dir())


def break_answer(files: RunFiles) -> None:
    files.data.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n')


def break_shapes(files: RunFiles) -> None:
    path = files.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64}))


def break_weights(files: RunFiles) -> None:
    path = files.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def break_nothing(files: RunFiles) -> None:
    pass


BAD_INPUT: dict[str, tuple[str, Callable[[RunFiles], None], str]] = {
    "unknown key": ("bupo.layer=3", break_nothing, "bupo.layer (command line): unknown key; the n"),
    "no value": ("steps", break_nothing, "steps (command line): is not of the form key=value"),
    "layer out of range": (
        "bupo.target_layer=9",
        break_nothing,
        "bupo.target_layer=9: the model has 4 layers; choose 1..3",
    ),
    "last layer": (
        "bupo.target_layer=4",
        break_nothing,
        "bupo.target_layer=4: is the last layer of a 4-layer model, whose policy is the full ",
    ),
    "batch that does not divide": (
        "algorithm.minibatches=7",
        break_nothing,
        "rollout.prompts_per_step=128: does not divide into algorithm.minibatches=7; choose ",
    ),
    "pipeline that does not divide": (
        "parallel.pp=3",
        break_nothing,
        "parallel.pp=3: does not divide the model's 4 layers; choose parallel.pp from 1, 2, 4, or ",
    ),
    "tensor parallelism that does not divide": (
        "parallel.tp=4",
        break_nothing,
        "parallel.tp=4: does not divide the model's 2 key-value heads; choose 1 or 2",
    ),
    "missing checkpoint": ("model.path=/none", break_nothing, "/none: no such directory; "),
    "config.json of another model": ("seed=1", break_shapes, "{model}/model.safetensors: model."),
    "truncated weights": ("seed=1", break_weights, "{model}/model.safetensors: is truncated: "),
    "row without an answer": ("seed=1", break_answer, "{data}"),
    "missing column": ("data.prompt_column=question", break_nothing, "{data}"),
    "reward that does not import": (
        "reward.function=nowhere:reward",
        break_nothing,
        "reward.function=nowhere:reward: ",
    ),
    "unknown Megatron key": (
        "megatron.recompute=full",
        break_nothing,
        "megatron.recompute=full: no such field in Megatron-Core's ",
    ),
    "prepare that does not import": (
        "prepare=nowhere:make",
        break_nothing,
        "prepare=nowhere:make: does not import (",
    ),
    "missing file": ("--config=none.yaml", break_nothing, "none.yaml: cannot be read (No such "),
    "unknown option": ("--dryrun", break_nothing, "command line: --dryrun: unknown argument; see "),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_before_any_process_group(
    files: RunFiles, capsys: pytest.CaptureFixture[str], case: str
):
    word, damage, message = BAD_INPUT[case]
    damage(files)
    assert main(["train", *files.settings, word]) == 2
    printed = capsys.readouterr()
    expected = message.format(model=files.model, data=files.data)
    assert printed.err.startswith(f"error: {expected}"), printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not dist.is_initialized()
    assert not (files.model.parent / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "command line: the following arguments are required: COMMAND; see `megatron-bupo "),
        (["trian"], "command line: argument COMMAND: invalid choice: 'trian' (choose from "),
        (["score"], "command line: the following arguments are required: --model, --data, --out"),
        (["bed"], "command line: the following arguments are required: --out; see `megatron-bupo "),
        (["bed", "--out", "x", "y=1"], "command line: y=1: unknown argument; see `megatron-bupo "),
    ],
)
def test_a_wrong_command_line_is_bad_input(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config", "c", "--dry-run", "a=1", "b=2", "c=3"],
        ["train", "a=1", "b=2", "c=3", "--config", "c", "--dry-run"],
        ["train", "a=1", "--config", "c", "b=2", "--dry-run", "c=3"],
        ["train", "a=1", "--config=c", "--dry-run", "b=2", "c=3"],
    ],
)
def test_overrides_may_stand_on_either_side_of_options_and_keep_their_order(argv: list[str]):
    args = parse(argv)
    assert args.overrides == ["a=1", "b=2", "c=3"]
    assert (args.config, args.dry_run) == ("c", True)


def test_an_override_may_have_a_negative_or_dashed_value():
    assert parse(["train", "seed=-1", "run_dir=--x"]).overrides == ["seed=-1", "run_dir=--x"]


def test_another_rank_of_a_machine_complains_when_the_first_has_had_its_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    said_by_then: list[str] = []
    monkeypatch.setattr("time.sleep", lambda _: said_by_then.append(capsys.readouterr().err))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "nonsense"]) == 2
    assert said_by_then == [""]
    assert capsys.readouterr().err.startswith("error: ")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(COMMANDS, "train", "tests.no_such_module")
    with pytest.raises(ModuleNotFoundError):
        main(["train"])


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_says_what_a_command_is_for(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(argv)
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: megatron-bupo {argv[0] if len(argv) > 1 else '[-h]'}")
    if len(argv) == 1:
        assert all(f"\n    {name} " in printed for name in COMMANDS)


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "megatron_bupo", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"megatron-bupo {__version__}\n"


def test_the_exit_code_reaches_the_shell_and_nothing_else_is_printed(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bupo", "train", "--config", "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: none.yaml: cannot be read (No such file or directory); give a YAML file\n"
    )
