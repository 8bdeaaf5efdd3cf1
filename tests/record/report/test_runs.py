from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.record.report.runs import read_runs
from tests.record.runs import records, write


def test_a_run_that_is_still_being_written_is_read_as_far_as_it_is_whole(tmp_path: Path):
    of = records(("full", 3))
    of[1] |= {"update/grad_norm": None, "update/loss": 1e308, "rollout/note": "text"}
    run_dir = write(tmp_path / "run", [*of, {**of[2], "update/grad_norm": 7.0}])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "policy": "fu')
    (run_dir / "config.yaml").write_text("steps: 9\nmodel:\n  path: /m\nservers: {env: {}")
    (run_dir / "guard.json").write_text("[]")
    (run,) = read_runs([run_dir])
    assert [record["step"] for record in run.records] == [0, 1, 2]
    assert math.isnan(run.records[1]["update/grad_norm"])
    assert math.isnan(run.records[1]["update/loss"])
    assert "rollout/note" not in run.records[1]
    assert run.records[2]["update/grad_norm"] == 7.0
    assert run.settings is None
    assert run.guard is None


def test_settings_are_read_by_their_dotted_keys(tmp_path: Path):
    run_dir = write(tmp_path / "run", records(("full", 1)))
    (run_dir / "config.yaml").write_text("steps: 9\nmodel:\n  path: /m\nsglang: {}\n")
    (run,) = read_runs([run_dir])
    assert run.settings == {"steps": 9, "model.path": "/m", "sglang": {}}


def test_a_run_that_stands_twice_is_one_and_names_are_as_short_as_can_be(tmp_path: Path):
    for folder in ("a/x", "b/x"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, records(("full", 1)))
    paths = [tmp_path / "a/x", tmp_path / "b/x", tmp_path / "b/../a/x"]
    assert [run.name for run in read_runs(paths)] == ["a/x", "b/x"]
    assert [run.name for run in read_runs(paths, ["one", "two", "again"])] == ["one", "two"]
    assert [run.name for run in read_runs(paths[:1])] == ["x"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", r"metrics\.jsonl, line 2: is not what a run writes"),
        ("[1]", "line 2"),
        ('{"step": "1", "policy": "full"}', "line 2"),
        ('{"step": 1, "policy": "internal layer five"}', "line 2"),
        ('{"step": 1, "policy": null}', "line 2"),
    ],
)
def test_a_line_that_no_run_writes_is_named(tmp_path: Path, line: str, reason: str):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(records(('full', 1))[0])}\n{line}\n")
    with pytest.raises(InputError, match=reason):
        read_runs([tmp_path])


def test_what_is_no_run_is_told_from_one_without_steps(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_runs([tmp_path / "none"])
    run_dir = write(tmp_path / "begun", [])
    with pytest.raises(InputError, match="no step has finished"):
        read_runs([run_dir])
    with pytest.raises(InputError, match=r"is no run.*name .*begun"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="is no directory"):
        read_runs([run_dir / "metrics.jsonl"])
    whole = write(tmp_path / "whole", records(("full", 1)))
    assert [len(run.records) for run in read_runs([run_dir, whole])] == [0, 1]
    with pytest.raises(InputError, match="1 names for 2"):
        read_runs([run_dir, whole], ["a"])
    with pytest.raises(InputError, match="tell the runs apart"):
        read_runs([run_dir, whole], ["a", "a"])
