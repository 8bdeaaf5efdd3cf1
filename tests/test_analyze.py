"""`megatron-bupo analyze` beside the same model in transformers with hooks."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from megatron_bupo.bed import chain_sums
from megatron_bupo.commands.score import GivenResponse
from megatron_bupo.score import as_batch
from tests.dense import dense_model
from tests.dense_readings import dense_readings
from tests.runs import run

TOLERANCE = 1e-4
LENGTHS = [(9, 4), (30, 3), (17, 16), (60, 20), (12, 1), (2, 1), (40, 33)]  # tokens, of them prompt
SMALL = ["trainer.max_tokens_per_microbatch=50", "trainer.logprob_chunk_tokens=20"]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    model_dir = tiny_model_dir(layers=3, vocab=16, scale=0.15)
    chain_sums.save_tokenizer(model_dir)
    return model_dir


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"input_ids": [rng.randrange(16) for _ in range(tokens)], "prompt_length": prompt}
        for tokens, prompt in LENGTHS
    ]


@pytest.fixture
def responses(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def analyze(model: Path, out: Path, *more: object) -> dict[str, Any]:
    done = run("analyze", "--model", model, "--out", out, *more, *SMALL)
    assert (done.code, done.err) == (0, "")
    return json.loads((out / "analysis.json").read_text())


def dense(model: Path, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    given = [GivenResponse(tuple(row["input_ids"]), row["prompt_length"]) for row in rows]
    return dense_readings(dense_model(model), as_batch(given))


def test_layers_are_those_of_transformers(
    tmp_path: Path, model: Path, rows: list[Any], responses: Path
):
    expected = dense(model, rows)
    found = analyze(
        model, tmp_path / "out", "--responses", responses, "--per-token", "parallel.dp=2"
    )
    tokens = sum(total - prompt for total, prompt in LENGTHS)
    source = {"responses": 7, "tokens": tokens, "source": "rows.jsonl", "sampled": False}
    assert (found["read_out"], found["data"]) == ("raw", source)
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 3]
    of_layers = {name: values for name, values in expected.items() if values.ndim == 2}
    for i, layer in enumerate(found["layers"]):
        assert layer.keys() - of_layers.keys() == {
            "layer", "standard_deviation", "standard_error", "interval"
        }  # fmt: skip
        for name, values in of_layers.items():
            assert layer[name] == pytest.approx(float(values[i].mean()), abs=TOLERANCE)
            spread = float(values[i].std())
            assert layer["standard_deviation"][name] == pytest.approx(spread, abs=TOLERANCE)
            low, high = layer["interval"][name]
            assert (low + high) / 2 == pytest.approx(layer[name], abs=1e-9)
    full = found["full_policy"]
    assert full["entropy_nats"] == pytest.approx(
        float(expected["full_entropy_nats"].mean()), abs=TOLERANCE
    )
    assert full["perplexity"] == pytest.approx(
        math.exp(-float(expected["full_logprob_nats"].mean())), rel=TOLERANCE
    )

    by_layer = pq.read_table(tmp_path / "out" / "layers.parquet").to_pylist()
    error = found["layers"][1]["standard_error"]["ffn_cosine"]
    assert by_layer[1]["ffn_cosine"] == found["layers"][1]["ffn_cosine"]
    assert by_layer[1]["ffn_cosine_standard_error"] == error
    by_token = pq.read_table(tmp_path / "out" / "tokens").to_pydict()
    assert by_token["layer"] == [1, 2, 3] * tokens
    assert by_token["token_id"][::3] == [
        id_ for row in rows for id_ in row["input_ids"][row["prompt_length"] :]
    ]
    places = [(i, t) for i, (total, prompt) in enumerate(LENGTHS) for t in range(total - prompt)]
    assert list(zip(by_token["response"], by_token["token"], strict=True))[::3] == places
    for name, values in of_layers.items():
        assert by_token[name] == pytest.approx(values.T.flatten().tolist(), abs=TOLERANCE)


@pytest.mark.slow
def test_a_killed_analysis_goes_on_to_the_same_bits(tmp_path: Path, model: Path, responses: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".state.json.partial").write_text("{")  # killed before it had begun
    (out / "ranks").mkdir()  # of a rank that was ahead
    analyze(model, out, "--responses", responses)
    results = [out / "analysis.json", out / "figures" / "entropy_flow.pdf"]
    whole = [path.read_bytes() for path in results]
    parts = sorted((out / "readings").iterdir())
    assert len(parts) > 3
    for path in parts[2:]:
        path.rename(path.with_name(f".{path.name}.partial"))
    (out / "analysis.json").unlink()
    done = run("analyze", "--model", model, "--responses", responses, "--out", out, *SMALL)
    assert done.out.startswith("reading  33/92 response tokens done before\n")
    assert [path.read_bytes() for path in results] == whole


@pytest.mark.slow
def test_what_is_sampled_is_read(tmp_path: Path, model: Path):
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    data.write_text("".join(f'{{"prompt": "{n}+{n}=", "answer": ""}}\n' for n in range(6)))
    command = ["--data", data, "--prompts", 5, "rollout.max_response_tokens=9", "parallel.pp=3"]
    found = analyze(model, out, *command)
    rollouts = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(rollouts) == found["data"]["responses"] == 5
    # The engine that drew them says the same of them
    for name, field in {"entropy_nats": "entropies", "logprob_nats": "rollout_logprobs"}.items():
        drawn = fmean(value for rollout in rollouts for value in rollout[field])
        assert found["full_policy"][name] == pytest.approx(drawn, abs=TOLERANCE)

    lines = (out / "responses.jsonl").read_bytes()
    (out / "responses.jsonl").write_text("{}\n")
    done = run("analyze", "--model", model, "--out", out, *command, *SMALL)
    assert (done.code, done.out) == (2, "")
    assert "responses.jsonl: is not what was sampled (KeyError: 'input_ids')" in done.err
    (out / "responses.jsonl").write_bytes(lines[: lines.index(b"\n") + 20])  # killed while writing
    for path in (out / "readings").iterdir():
        path.unlink()
    assert analyze(model, out, *command) == found
    again = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [row["response_ids"] for row in again] == [row["response_ids"] for row in rollouts]
