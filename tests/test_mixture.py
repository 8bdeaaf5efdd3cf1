"""A run on a mixture of sources: what it asks, says, and asks again when it is resumed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.runs import Bed, metrics, run


def mixture(bed: Bed, folder: Path) -> list[str]:
    """The bed's 48 questions as 12 of a JSONL and 36 of a CSV file, of which the CSV file repeats
    two and the evaluation asks one.
    """
    rows = [json.loads(line) for line in (bed.folder / "train.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in (bed.folder / "eval.jsonl").read_text().splitlines()]
    few, many = folder / "few.jsonl", folder / "many.csv"
    few.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:12], held[0]]))
    with many.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "gold"])
        writer.writerows([row["prompt"], row["answer"]] for row in [*rows[12:], *rows[:2]])
    columns = "prompt_column: task, answer_column: gold"
    return [
        "data.train=null",
        f"data.sources=[{{path: {few}}}, {{path: {many}, weight: 3, {columns}}}]",
        "data.deduplicate=true",
        "data.contamination=drop",
    ]


@pytest.mark.slow
def test_a_mixture_is_asked_by_weight_and_resumed_as_if_nothing_had_happened(
    bed: Bed, tmp_path: Path
):
    run_dir = tmp_path / "run"
    settings = [*mixture(bed, tmp_path), "steps=4", "parallel.pp=1", "debug.dump_rollouts=true"]
    done = run("train", *bed.settings(run_dir, *settings))
    assert done.code == 0, done.err
    assert "data.deduplicate: dropped 2 of 51 questions that were asked before: " in done.out
    assert "data.contamination=drop: 1 of 49 training questions are asked by " in done.out
    asked: list[tuple[str, int]] = []
    for step, record in enumerate(metrics(run_dir)):
        path = run_dir / "rollouts" / f"step-{step:06d}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = dict.fromkeys((line["source"], line["prompt_index"]) for line in lines)
        assert [source for source, _ in prompts].count("many") == 3  # of 4, in every step
        asked += prompts
        for source in ("few", "many"):
            rewards = [line["reward"] for line in lines if line["source"] == source]
            mean = sum(rewards) / len(rewards)
            assert record[f"source/{source}_reward_mean"] == pytest.approx(mean)
    assert len(set(asked)) == len(asked) == 16
    assert all((source == "few") == (index < 12) for source, index in asked)
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "checkpoints" / "step_000004")
    done = run("train", *bed.settings(again, *settings))
    assert done.code == 0, done.err
    assert "resuming at step 3" in done.out
    assert metrics(again) == metrics(run_dir)


def test_a_dry_run_says_what_would_be_dropped(bed: Bed, tmp_path: Path):
    settings = bed.settings(tmp_path / "run", *mixture(bed, tmp_path))
    done = run("train", "--dry-run", *settings)
    assert done.code == 0, done.err
    assert "# data.contamination=drop: 1 of 49 training questions are asked by " in done.out
    assert not (tmp_path / "run").exists()
