"""A run that is watched learns what it learns unwatched; one that is guarded ends its phase."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_bupo.algorithm.repetition import repeated_fraction
from megatron_bupo.types import TokenBatch
from tests.dense import dense_model
from tests.dense_readings import dense_probe
from tests.moments import until
from tests.rollout.fake import fake_server
from tests.runs import Bed, metrics, run, start

SHORT = ("parallel.pp=1", "evaluation.every=0")
TIGHT = (  # a policy is least perplexed by its own texts: any step at all crosses this
    *SHORT,
    "probe.every=1",
    "bupo.internal_steps=5",
    "bupo.guard=true",
    "bupo.guard.perplexity_ratio=1.0000001",
    "bupo.guard.patience=2",
)


def unwatched(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what probes and guard add."""
    areas = ("probe/", "guard/")
    return [{k: v for k, v in r.items() if not k.startswith(areas)} for r in metrics(run_dir)]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def texts(path: Path) -> TokenBatch:
    """The rows of a file as `generate` writes it, as a batch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    longest = max(len(row["input_ids"]) + len(row["response_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        begin, both = len(row["input_ids"]), row["input_ids"] + row["response_ids"]
        ids[i, : len(both)] = torch.tensor(both)
        mask[i, begin : len(both)] = True
    return TokenBatch(ids, mask, torch.zeros(ids.shape))


@pytest.fixture(scope="module")
def watched(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run `finished`, with probes before steps 0, 3 and on. To be read only."""
    run_dir = tmp_path_factory.mktemp("watched") / "run"
    bed.train(run_dir, "probe.every=3", "probe.layer=4")
    return run_dir


@pytest.fixture(scope="module")
def guarded(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose guard ends the internal phase before step 2. To be read only."""
    run_dir = tmp_path_factory.mktemp("guarded") / "run"
    bed.train(run_dir, *TIGHT, "checkpoint.keep=9")
    return run_dir


def test_probes_change_nothing(watched: Path, finished: Path):
    assert unwatched(watched) == metrics(finished)
    assert [bool(r.keys() - u.keys()) for r, u in both(watched)] == [True, False, False] * 2
    one, other = (load_file(d / "hf" / "model.safetensors") for d in (watched, finished))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def both(run_dir: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    return zip(metrics(run_dir), unwatched(run_dir), strict=True)


def test_what_a_probe_notes_is_what_transformers_says_of_the_same_texts(bed: Bed, watched: Path):
    seen = metrics(watched)[0]
    file = watched / "probe" / "responses.jsonl"
    r = dense_probe(dense_model(bed.folder / "model"), texts(file), 4)
    expected = {
        "layer": 4,
        "perplexity": float((-r["full_logprob"].mean()).exp()),
        "full_entropy_nats": r["full_entropy"].mean(),
        "internal_entropy_nats": r["entropy"].mean(),
        "layer_entropy_change_nats": (r["entropy"] - r["entropy_before"]).mean(),
        "kl_internal_to_full_nats": r["kl_to_full"].mean(),
        "kl_full_to_internal_nats": r["kl_from_full"].mean(),
        "cosine_to_layer_05": r["cosine"][0].mean(),
        "cosine_to_layer_06": r["cosine"][1].mean(),
        "kl_to_layer_05_nats": r["kl_to_later"][0].mean(),
        "kl_to_layer_06_nats": r["kl_to_later"][1].mean(),
    }
    for name, value in expected.items():
        assert seen[f"probe/{name}"] == pytest.approx(float(value), abs=1e-4), name


def test_the_first_answers_are_the_texts_and_are_measured(watched: Path):
    rows = [
        json.loads(line)
        for line in (watched / "probe" / "responses.jsonl").read_text().splitlines()
    ]
    lengths = [len(row["response_ids"]) for row in rows]
    first, second = (metrics(watched)[step] for step in (0, 3))
    assert first["probe/response_tokens_mean"] == sum(lengths) / len(rows)
    cut = [row["finish_reason"] != "stop" for row in rows]
    assert first["probe/truncated_fraction"] == sum(cut) / len(rows)
    repeated = [repeated_fraction(row["response_ids"]) for row in rows]
    assert first["probe/repetition_fraction"] == pytest.approx(sum(repeated) / len(rows))
    assert first["probe/perplexity"] < second["probe/perplexity"]


def test_grpo_is_watched_by_the_full_policy_alone(bed: Bed, tmp_path: Path):
    bed.train(tmp_path, *SHORT, "probe.every=2", "bupo.internal_steps=0", "steps=2")
    assert {key for key in metrics(tmp_path)[0] if key.startswith("probe/")} == {
        "probe/perplexity",
        "probe/full_entropy_nats",
        "probe/response_tokens_mean",
        "probe/truncated_fraction",
        "probe/repetition_fraction",
    }


def test_the_guard_ends_the_phase_and_says_why(guarded: Path):
    lines = metrics(guarded)
    assert [line["policy"] for line in lines] == ["internal layer 5"] * 2 + ["full"] * 4
    assert [line.get("guard/tripped") for line in lines] == [0.0, 0.0, 1.0, None, None, None]
    left = json.loads((guarded / "guard.json").read_text())
    assert (left["left_before_step"], left["policy"]) == (2, "internal layer 5")
    assert left["bounds"]["patience"] == 2
    assert left["checkpoint"] == "checkpoints/step_000000"
    assert [reason.split()[0] for reason in left["reasons"]] == ["probe/perplexity"]


@pytest.mark.slow
def test_it_ends_with_the_numbers_of_a_run_whose_phase_was_so_long(
    bed: Bed, guarded: Path, tmp_path: Path
):
    bed.train(tmp_path, *SHORT, "bupo.internal_steps=2")
    assert unwatched(guarded) == metrics(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
def test_it_resumes_to_the_bit_before_at_and_after_the_trip(
    step: int, bed: Bed, guarded: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    shutil.copytree(guarded, run_dir)
    for later in range(step + 1, 7):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{later:06d}")
    assert bed.train(run_dir, *TIGHT, "checkpoint.keep=9") == metrics(guarded)
    assert (run_dir / "guard.json").read_text() == (guarded / "guard.json").read_text()


@pytest.mark.slow
def test_the_checkpoint_from_before_outlives_all_others(bed: Bed, tmp_path: Path):
    run_dir = tmp_path / "run"
    bed.train(run_dir, *TIGHT, "checkpoint.keep=1")
    assert checkpoints(run_dir) == ["step_000000", "step_000006"]
    bed.train(run_dir, *TIGHT, "checkpoint.keep=1", "steps=8")
    assert checkpoints(run_dir) == ["step_000000", "step_000008"]


@pytest.mark.slow
def test_while_the_guard_is_content_it_keeps_the_newest_probe_and_then_no_other(
    bed: Bed, tmp_path: Path
):
    loose = [*TIGHT, "probe.every=2", "bupo.guard.perplexity_ratio=99", "checkpoint.keep=1"]
    bed.train(tmp_path, *loose, "steps=4")
    assert checkpoints(tmp_path) == ["step_000002", "step_000004"]
    (tmp_path / "guard.json").write_text("of a future that this run does not come to")
    bed.train(tmp_path, *loose)
    assert checkpoints(tmp_path) == ["step_000006"]
    assert not (tmp_path / "guard.json").exists()


@pytest.mark.slow
def test_a_replay_reads_texts_without_an_engine(bed: Bed, watched: Path, tmp_path: Path):
    quiet = [*SHORT, "steps=4", "checkpoint.every=9"]
    file = f"probe.responses={watched / 'probe' / 'responses.jsonl'}"
    watching = ["probe.every=3", "probe.layer=4", file]
    bed.train(tmp_path / "run", *quiet, *watching, "debug.dump_rollouts=true")
    bed.train(tmp_path / "replay", *quiet, *watching, f"debug.replay={tmp_path / 'run'}")
    lines = metrics(tmp_path / "replay")
    assert "probe/response_tokens_mean" not in lines[0]
    known = {k: v for k, v in metrics(tmp_path / "run")[3].items() if k.startswith("probe/")}
    for key, value in lines[3].items():
        if key.startswith("probe/"):
            assert value == known[key]
    assert lines[0]["probe/perplexity"] == pytest.approx(metrics(watched)[0]["probe/perplexity"])


def test_a_run_that_was_not_watched_from_the_start_cannot_be_guarded(bed: Bed, tmp_path: Path):
    bed.train(tmp_path, *SHORT, "steps=1", "checkpoint.export_hf=false")
    done = run("train", *bed.settings(tmp_path, *TIGHT))
    assert done.code == 2
    assert "bupo.guard.perplexity_ratio" in done.err
    assert "did not look at probe/perplexity before its first step" in done.err


@pytest.mark.slow
def test_an_actor_of_few_layers_hands_over_where_the_guard_says_and_again_when_resumed(
    bed: Bed, tmp_path: Path
):
    wild = ["optimizer.lr=5e-3", "bupo.guard.response_tokens_ratio=1.0001"]  # answers never end
    blind = ["bupo.internal_layout.pp=1", "bupo.guard.perplexity_ratio=null"]
    own = [*TIGHT, "bupo.guard.patience=1", *blind, *wild, "steps=4", "checkpoint.every=9"]
    bed.train(tmp_path, *own)
    lines = metrics(tmp_path)
    trip = [line.get("guard/tripped") for line in lines].index(1.0)
    assert [line["policy"] == "full" for line in lines] == [step >= trip for step in range(4)]
    assert ["probe/perplexity" in line for line in lines] == [step > trip for step in range(4)]
    for name in checkpoints(tmp_path):
        if name > f"step_{trip:06d}":
            shutil.rmtree(tmp_path / "checkpoints" / name)
    assert bed.train(tmp_path, *own) == lines


@pytest.mark.slow
def test_a_run_is_preempted_while_it_waits_for_a_probes_answers(bed: Bed, tmp_path: Path):
    with fake_server(bed.folder / "model", tmp_path / "server", hang_generates=99) as fake:
        servers = ["rollout.engine=sglang", f"servers.addresses=[{fake.url}]"]
        running = start("train", *bed.settings(tmp_path / "run", *SHORT, *servers, "probe.every=1"))
        state = tmp_path / "run" / "ranks" / "rank-00000.json"
        until(
            lambda: state.exists() and '"phase": "probe"' in state.read_text(),
            while_=running.is_alive,
        )
        os.kill(running.pid, signal.SIGUSR2)
        done = running.wait()
    reason = "stopped before the first checkpoint; the same command starts anew\n"
    assert (done.code, done.err) == (75, reason)
