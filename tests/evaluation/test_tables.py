from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import yaml

from megatron_bupo.errors import InputError
from megatron_bupo.evaluation.results import Score
from megatron_bupo.evaluation.scores import Estimate
from megatron_bupo.evaluation.tables import FILE, avg_table, paper_model, pass_table

PAPER = yaml.safe_load(FILE.read_text())
NAMES = ("AMC23", "MATH500", "AIME24", "AIME25")


def scores(names: Sequence[str]) -> list[Score]:
    return [
        Score(
            name=name,
            questions=30,
            responses_per_prompt=16,
            avg=Estimate(0.1 * i, 0.05 * i, 0.125 * i),
            pass_at={1: Estimate(0.1 * i, 0.0, 0.5)} | ({8: Estimate(0.5, 0.25, 1)} if i else {}),
            resampled=np.zeros(3),
            tokens=100,
            truncated_fraction=0.0,
            grader_warnings=0,
            seconds=1.0,
        )
        for i, name in enumerate(names)
    ]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_papers_numbers_add_up_and_show_the_gains_that_it_names():
    for model, rows in PAPER["models"].items():
        for method, (*values, average) in rows.items():
            assert len(values) == len(PAPER["columns"])
            # the paper's own mean of these four is off by 0.02
            slack = 0.0226 if (model, method) == ("Qwen3-8B", "GRPO") else 0.0051
            assert abs(sum(values) / 4 - average) < slack
    gains = {m: round(r["BuPO"][-1] - r["GRPO"][-1], 2) for m, r in PAPER["models"].items()}
    assert list(gains.values()) == [3.43, 2.13, 1.01, 3.68]
    assert all(set(rows) == set(PAPER["models"]["Qwen3-4B"]) for rows in PAPER["models"].values())


def test_the_table_has_the_papers_shape_and_its_rows_below():
    table = cells(avg_table(scores(NAMES), Estimate(0.15, 0.1, 0.2), model="m", beside="Qwen3-4B"))
    assert table[0] == ["", "AMC", "MATH500", "AIME24", "AIME25", "Avg"]
    assert table[2] == [
        "m",
        "0.00 (0.0-0.0)",
        "10.00 (5.0-12.5)",
        "20.00 (10.0-25.0)",
        "30.00 (15.0-37.5)",
        "15.00 (10.0-20.0)",
    ]
    assert table[-1] == ["Qwen3-4B BuPO (paper)", "81.09", "84.90", "36.88", "31.15", "58.51"]
    assert len(table) == 3 + 6


def test_the_papers_numbers_stand_under_their_benchmark_and_no_other():
    table = cells(
        avg_table(scores(["AIME25", "mine"]), Estimate(0, 0, 0), model="m", beside="OctoThinker-8B")
    )
    assert table[0] == ["", "AIME25", "mine", "Avg"]
    assert table[-1] == ["OctoThinker-8B BuPO (paper)", "6.77", "", ""]
    alone = avg_table(scores(NAMES), Estimate(0, 0, 0), model="m", beside=None)
    assert len(alone.splitlines()) == 3


def test_pass_at_k_has_a_row_per_benchmark_and_a_column_per_k():
    assert cells(pass_table(scores(["AMC23", "mine"])))[2:] == [
        ["AMC", "0.00 (0.0-50.0)", ""],
        ["mine", "10.00 (0.0-50.0)", "50.00 (25.0-100.0)"],
    ]


@pytest.mark.parametrize(
    ("named", "directory", "found"),
    [
        (None, "Qwen3-4B", "Qwen3-4B"),
        (None, "bupo_qwen3_8b", "Qwen3-8B"),
        (None, "OctoThinker-3B-Long-Base", "OctoThinker-3B"),
        (None, "Qwen3-14B", None),
        (None, "model", None),
        ("qwen3-4b", "OctoThinker-3B", "Qwen3-4B"),
    ],
)
def test_the_papers_model_is_named_or_seen_from_the_directory(
    named: str | None, directory: str, found: str | None
):
    assert paper_model(named, directory) == found


def test_a_model_that_the_paper_does_not_have_is_refused():
    with pytest.raises(InputError, match="--beside GPT-2: the paper has no results for it; choose"):
        paper_model("GPT-2", "model")
