from __future__ import annotations

import multiprocessing
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from megatron_bupo.bed import base_model  # noqa: F401 - imported here, forked children need not
from megatron_bupo.bed.prepare import make_bed, prepare
from megatron_bupo.commands.bed import run
from megatron_bupo.config import load_config
from megatron_bupo.errors import InputError
from tests.bed.test_chain_sums import DEMO
from tests.moments import until

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ["eval.jsonl", "model", "train.jsonl"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def bed(home: Path) -> Path:
    """Where conf/demo.yaml looks for it."""
    return home / ".cache" / "megatron_bupo" / "chain_sums"


def parts_of(bed: Path) -> list[str]:
    return sorted(path.name for path in bed.glob("[!.]*"))


def contents_of(bed: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in bed.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def fork(fn: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=fn)
    process.start()
    return process


def test_a_bed_is_a_model_and_its_data_and_nothing_else(tmp_path: Path) -> None:
    make_bed(tmp_path / "bed", steps=1)
    assert parts_of(tmp_path / "bed") == PARTS
    assert not list(tmp_path.rglob("*.partial"))
    assert len((tmp_path / "bed" / "train.jsonl").read_text().splitlines()) == 9744


def test_what_is_there_is_not_made_again(bed: Path) -> None:
    make_bed(bed, steps=1)
    before = contents_of(bed)
    make_bed(bed, steps=1)
    prepare(load_config(str(DEMO), []))
    assert contents_of(bed) == before


def test_a_model_elsewhere_asks_for_the_data_only(bed: Path) -> None:
    prepare(load_config(str(DEMO), ["model.path=/somewhere/else"]))
    assert parts_of(bed) == ["eval.jsonl", "train.jsonl"]


def test_a_config_that_names_nothing_of_the_bed_makes_nothing(bed: Path) -> None:
    elsewhere = ["model.path=org/model", "data.train=org/data", "data.eval=null"]
    prepare(load_config(str(DEMO), elsewhere))
    assert not bed.exists()


def test_a_killed_build_leaves_nothing_that_looks_whole_and_is_taken_up_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bed = tmp_path / "bed"
    build = fork(lambda: make_bed(bed, steps=10_000))
    until((bed / "eval.jsonl").exists)  # made before the model
    assert build.pid
    os.kill(build.pid, signal.SIGKILL)
    build.join()
    assert parts_of(bed) == ["eval.jsonl", "train.jsonl"]

    (bed / ".model.partial").mkdir()  # as a kill while saving leaves it
    (bed / ".model.partial" / "rubbish").write_text("")
    make_bed(bed, steps=1)
    assert parts_of(bed) == PARTS
    assert not (bed / "model" / "rubbish").exists()
    assert not list(bed.glob("*.partial"))


def test_of_callers_at_the_same_time_one_builds_and_the_others_wait(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bed = tmp_path / "bed"
    processes = [fork(lambda: make_bed(bed, steps=3)) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert parts_of(bed) == PARTS
    assert capfd.readouterr().err.count("Making the base model") == 1


def test_the_command_says_how_to_train_on_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bed(tmp_path, steps=1)
    run(Namespace(out=str(tmp_path)))
    *_, command = capsys.readouterr().out.splitlines()
    overrides = command.partition("conf/demo.yaml ")[2].split()
    config = load_config(str(DEMO), overrides)
    assert [config.model.path, config.data.train, config.data.eval] == [
        str(tmp_path / part) for part in ("model", "train.jsonl", "eval.jsonl")
    ]


def test_the_command_refuses_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*/file: File exists; choose another"):
        run(Namespace(out=str(tmp_path / "file")))
