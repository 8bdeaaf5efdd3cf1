"""`megatron-bupo score` beside the same model in transformers, one row at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import run, run_as_ranks

TOLERANCE = 1e-5
LENGTHS = [(9, 4), (1, 1), (30, 29), (17, 17), (12, 1), (64, 3), (5, 2), (8, 4), (40, 20), (3, 1),
           (23, 7), (2, 1), (11, 10)]  # fmt: skip # tokens, of them prompt; 13 rows fill no batch


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    # Small: the tolerance is absolute, and the noise of float32 grows with the logits.
    return tiny_model_dir(layers=4, hidden=16, ffn=24, tied=True)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"input_ids": [rng.randrange(64) for _ in range(tokens)], "prompt_length": prompt}
        for tokens, prompt in LENGTHS
    ]


@pytest.fixture
def files(tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]


@torch.no_grad()
def dense(model_dir: Path, rows: list[dict[str, Any]], policy: str, *, norm: bool) -> list[Any]:
    """`[(logprobs, entropies)]` of the responses as transformers has them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    scored = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        out = model.model(ids[None], output_hidden_states=True)
        if policy == "full":
            hidden = out.last_hidden_state[0]
        else:
            hidden = out.hidden_states[int(policy.removeprefix("layer="))][0]
            hidden = model.model.norm(hidden) if norm else hidden
        everywhere = model.lm_head(hidden).double().log_softmax(-1)
        before = everywhere[row["prompt_length"] - 1 : -1]  # a token is drawn where the last ended
        logprobs = before.gather(1, ids[row["prompt_length"] :, None])[:, 0]
        scored.append((logprobs, -(before.exp() * before).sum(-1)))
    return scored


def assert_scored(out: Path, expected: list[Any]) -> None:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(expected)
    for line, (logprobs, entropies) in zip(lines, expected, strict=True):
        assert line.keys() == {"logprobs", "entropies"}
        assert line["logprobs"] == pytest.approx(logprobs.tolist(), abs=TOLERANCE)
        assert line["entropies"] == pytest.approx(entropies.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [
        "tp=1",
        "pp=2 vpp=2",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("tp=2", "dp=2", "tp=2 sp=true dp=2")),
    ],
)
@pytest.mark.parametrize("policy", ["full", "layer=1", "layer=3 --read-out-norm"])
def test_scores_are_those_of_transformers_under_every_layout(
    tmp_path: Path, model: Path, rows: list[Any], files: list[str], layout: str, policy: str
):
    name, *norm = policy.split()
    sizes = [f"parallel.{size}" for size in layout.split()]
    small = ["trainer.microbatch_size=3", "trainer.logprob_chunk_tokens=7"]
    done = run("score", "--model", model, *files, "--policy", name, *norm, *sizes, *small)
    assert (done.code, done.err) == (0, "")
    assert_scored(tmp_path / "out.jsonl", dense(model, rows, name, norm=bool(norm)))


def test_an_empty_response_has_empty_scores(tmp_path: Path, model: Path):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7], "prompt_length": 3}\n')
    out = tmp_path / "out.jsonl"
    done = run("score", "--model", model, "--data", tmp_path / "rows.jsonl", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert out.read_text() == '{"logprobs": [], "entropies": []}\n'


def test_a_bad_row_is_one_line_and_leaves_no_output(tmp_path: Path, model: Path, files: list[str]):
    data = tmp_path / "rows.jsonl"
    with data.open("a") as file:
        file.write('{"input_ids": [1, 2, 64], "prompt_length": 1}\n')
    done = run("score", "--model", model, *files, "parallel.pp=2")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: {data}: line 14: token id 64 is outside the vocabulary; use ids in 0..63\n"
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_scores_under_torchrun(tmp_path: Path, model: Path, rows: list[Any], files: list[str]):
    command = ["score", "--model", model, *files, "--policy", "layer=2", "parallel.pp=2"]
    assert [(done.code, done.err) for done in run_as_ranks(2, *command)] == [(0, "")] * 2
    assert_scored(tmp_path / "out.jsonl", dense(model, rows, "layer=2", norm=False))
