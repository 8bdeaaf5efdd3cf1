"""The benchmarks run, and write what they promise. How fast anything is, no test asks."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.config.layout import Layout
from tests.rollout.fake import FAKE
from tests.runs import REWARD

TINY = ["--layers=6", "--hidden=16", "--ffn=24", "--heads=2", "--kv-heads=2", "--vocab=32"]
TINY += ["--responses=4", "--prompt-tokens=3", "--response-tokens=5", "--microbatch=2"]


def _json_of(main: Callable[[list[str]], None], out: Path, *options: str) -> dict[str, Any]:
    """What a tool writes, run in its own process: it joins process groups and patches torch."""
    argv = [*options, "--json", str(out)]
    process = multiprocessing.get_context("fork").Process(target=main, args=(argv,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files with a base model that has hardly learned."""
    from megatron_bupo.bed.prepare import make_bed

    directory = tmp_path_factory.mktemp("tools") / "bed"
    make_bed(directory, steps=2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "absent"),
    [
        (("--tp=2",), {"reduced_bytes", "gathered_bytes"}),
        (("--pp=2", "parallel.dp=2", "parallel.distributed_optimizer=true"), set()),
    ],
)
def test_phase_cost_writes_a_row_per_depth_relative_to_the_full_one(
    tmp_path: Path, layout: tuple[str, ...], absent: set[str]
):
    from tools.bench_phase_cost import QUANTITIES, main

    report = _json_of(main, tmp_path / "cost.json", *TINY, "--repeats=1", *layout)
    rows = report["rows"]
    assert report["layers"] == 6
    assert [row["layer"] for row in rows] == [1, 3, 5, 6]
    for key in {quantity.key for quantity in QUANTITIES} - absent:
        assert rows[-1][f"{key}_ratio"] == 1.0
        for row in rows:
            assert row[f"{key}_ratio"] == pytest.approx(row[key] / rows[-1][key])
            assert row[key] > 0
    assert all(row[key] == 0 and f"{key}_ratio" not in row for row in rows for key in absent)
    for row in rows:  # of one repeat, so its parts are those of one update
        parts = row["forward_backward_ms"] + row["optimizer_ms"]
        assert parts >= row["update_ms"] - 1e-6  # of the slowest rank each
        assert row["forward_backward_ms"] <= row["update_ms"]


@pytest.mark.slow
def test_phase_cost_counts_what_a_dumber_count_finds(tmp_path: Path):
    from tools.bench_phase_cost import main

    report = _json_of(main, tmp_path / "cost.json", *TINY, "--repeats=1", "parallel.dp=2")
    hidden, ffn, vocab, head = 16, 24, 32, 8
    norms = 2 * hidden + 2 * head
    layer = hidden * (4 * hidden + 3 * ffn) + norms
    for row in report["rows"]:
        full = row["layer"] == 6
        trained = vocab * hidden + row["layer"] * layer + full * hidden  # the final norm
        assert row["stepped_parameters"] == 2 * trained
        assert row["synced_bytes"] == 4 * trained
        # Gradients in fp32, a norm of the layer above, and some numbers that tell of the update.
        summed = 2 * 4 * (trained + (not full) * hidden)
        assert summed <= row["reduced_bytes"] <= summed + 1000


@pytest.mark.parametrize(("layers", "depths"), [(12, [2, 6, 10, 12]), (3, [1, 2, 3]), (1, [1])])
def test_phase_cost_looks_at_a_sixth_half_five_sixths_and_all_of_the_layers(
    layers: int, depths: list[int]
):
    from tools.shapes import Shape

    assert Shape(layers=layers).depths == depths


def test_phase_cost_takes_apart_what_is_above_its_share_and_nothing_else():
    from tools.bench_phase_cost import QUANTITIES, explanations, with_ratios

    def row(layer: int, **slow: float) -> dict[str, Any]:
        costs = {quantity.key: 10.0 + 10 * layer for quantity in QUANTITIES}
        fixed = {part: 10.0 for quantity in QUANTITIES for part in quantity.fixed}
        return {"layer": layer, "all_peaks_bytes": layer} | costs | fixed | slow

    one, two = Layout(1, 1, 1, 1, 1), Layout(1, 2, 1, 1, 2)
    in_proportion = with_ratios([row(2), row(6), row(12)], 12)
    assert explanations(in_proportion, two) == []
    slow = with_ratios([row(2), row(6, optimizer_ms=130.0), row(12)], 12)
    (line,) = explanations(slow, one)
    assert line == (
        "Layer 6, optimizer: 1.00 is above 0.67. Of 130.00 ms, 10.00 beside Adam's step "
        "(norm, copies, gathers, waiting) are every policy's; the rest is 1.00 of full "
        "depth's, where layers are 0.50."
    )
    assert explanations(slow, two)[0] == line
    assert "all ranks together have 0.54, and of its memory 0.50" in explanations(slow, two)[1]


@pytest.mark.slow
def test_the_analysis_is_compared_with_a_script_that_finds_the_same(tmp_path: Path):
    from tools.bench_analysis import OURS, main

    sizes = ["--layers=2", "--hidden=16", "--ffn=24", "--heads=2", "--kv-heads=2", "--vocab=32"]
    texts = ["--responses=3", "--prompt-tokens=3", "--response-tokens=5"]
    report = _json_of(main, tmp_path / "analysis.json", *sizes, *texts)
    rows = {row.pop("who"): row for row in report["rows"]}
    assert rows.keys() == {"script, all texts", "script, one text", OURS}
    assert report["response_tokens"] == 15
    ours = rows[OURS]
    for row in rows.values():
        assert row.keys() == ours.keys()
        assert row["ffn_entropy_change_nats"] == pytest.approx(
            ours["ffn_entropy_change_nats"], abs=1e-5
        )


@pytest.mark.slow
def test_the_cpu_shim_is_compared_with_a_function_mode_and_with_transformers(
    tmp_path: Path, bed: Path
):
    from tools.bench_cpu_shim import BED_STEP, MODE, NAMES, PLAIN, main

    report = _json_of(main, tmp_path / "shim.json", "--repeats=1", f"--bed={bed}")
    rows = {row["what"]: row for row in report["rows"]}
    for what, row in rows.items():
        kinds = {NAMES, MODE} if what == BED_STEP else {NAMES, MODE, PLAIN}
        assert row["ms"].keys() == row["ratio"].keys() == kinds
        assert row["ratio"][NAMES] == 1.0
        assert row["ratio"][MODE] == pytest.approx(row["ms"][MODE] / row["ms"][NAMES])


@pytest.mark.wide
@pytest.mark.slow
def test_a_step_is_taken_apart_under_each_layout_in_each_phase(tmp_path: Path, bed: Path):
    from tools.bench_step import LAYOUTS, PARTS, main

    options = ("--rounds=1", "--steps=1", f"--bed={bed}")
    rows = _json_of(main, tmp_path / "step.json", *options)["rows"]
    told = [(row["policy"], row["layout"]) for row in rows]
    assert sorted(told) == sorted(
        (p, name) for p in ("internal layer 5", "full") for name in LAYOUTS
    )
    for row in rows:
        parts = sum(row[f"{part}_ms"] for part in (*PARTS, "rest"))
        assert row["step_ms"] == pytest.approx(parts)
        assert row["cpu_ms"] > 0


def test_throughput_counts_the_models_own_operations(tmp_path: Path):
    from tools.bench_throughput import main

    sizes = ("--responses=4", "--prompt-tokens=3", "--response-tokens=5", "--repeats=1")
    report = _json_of(main, tmp_path / "speed.json", *sizes, "--peak-tflops=2")
    internal, full = report["rows"]
    assert (internal["layer"], full["layer"]) == (2, 12)
    for row in (internal, full):
        assert row["mfu"] == pytest.approx(row["tflops_per_rank"] / 2)
    # Queries and output 128 x 128, keys and values 64 x 128, MLP 3 x 384 x 128.
    a_layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128
    flops = {
        row["layer"]: row["tflops_per_rank"] * row["seconds"] * 1e12 / 4 for row in (internal, full)
    }
    tokens = full["tokens_per_s"] * full["seconds"]
    per_layer = (flops[12] - flops[2]) / 10
    assert 2 * a_layer * tokens < per_layer < 2.1 * a_layer * tokens  # attention is the rest


@pytest.mark.wide
@pytest.mark.slow
def test_first_updates_after_the_switch_are_as_large_as_on_paper(tmp_path: Path, bed: Path):
    from tools.plot_optimizer_switch import CHOICES, main

    png, rewards = tmp_path / "switch.png", tmp_path / "rewards.py"
    rewards.write_text(REWARD)
    options = ("--internal-steps=1", "--steps=1", f"--bed={bed}", f"--png={png}")
    settings = (f"reward.function={rewards}:reward", "evaluation.max_prompts=4")
    settings += ("optimizer.warmup_steps=0",)
    runs = _json_of(main, tmp_path / "switch.json", *options, *settings)
    assert tuple(runs) == CHOICES
    for run in runs.values():
        assert run["updates_before"] == 4
        assert run["begin_size"][0] == pytest.approx(run["predicted_first_size"], rel=0.01)
        assert len(run["begin_size"]) == len(run["trained_size"]) == 4
    mean, variance = 0.1 / (1 - 0.9**5), 0.001 / (1 - 0.999**5)
    assert runs["common_step"]["predicted_first_size"] == pytest.approx(mean / variance**0.5)
    assert runs["reset"]["trained_size"][0] == pytest.approx(1.0, rel=0.01)
    assert png.stat().st_size > 10_000


@pytest.mark.parametrize("options", [(), ("--entropy", "--dtype=bfloat16")], ids=str)
def test_chunked_logprobs_hold_a_fraction_of_the_materialised_ones(
    tmp_path: Path, options: tuple[str, ...]
):
    from tools.bench_logprobs import CHUNKED, COLUMNS, WHOLE, main

    sizes = ("--rows=256", "--hidden=4", "--vocab=20000", "--chunk=16", "--repeats=1")
    report = _json_of(main, tmp_path / "logprobs.json", *sizes, *options)
    assert report["logits_bytes"] == {WHOLE: 4 * 20000 * 256, CHUNKED: 4 * 20000 * 16}
    for _, name, _ in COLUMNS:
        assert report[WHOLE][name] > 0
        assert report["ratio"][name] == report[CHUNKED][name] / report[WHOLE][name]
    assert report[WHOLE]["forward_backward_peak_bytes"] > report["logits_bytes"][WHOLE]
    assert report["ratio"]["forward_backward_peak_bytes"] < 0.5
    rounded = 0.1 if options else 1e-5  # bfloat16 logits, which the chunked ones are not
    assert report["largest_difference_nats"] < rounded


@pytest.mark.slow
def test_peers_compute_the_same_loss_and_are_measured_beside_ours(tmp_path: Path, bed: Path):
    pytest.importorskip("trl", reason="the peer is not installed: pip install -e '.[bench]'")
    from tools.bench_peers import AUTHORS, MEASURED, OURS, PLAIN, TRL, main

    shape = [option for option in TINY if not option.startswith("--microbatch")]
    options = ("--rounds=1", "--steps=1", "--target-layer=2", f"--bed={bed}")
    rows = _json_of(main, tmp_path / "peers.json", *shape, *options)["rows"]
    raced: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        raced.setdefault(row["what"], {})[row["who"]] = row
    full, internal, step = raced.values()
    assert set(full) == {TRL, PLAIN, OURS}
    assert set(internal) == {AUTHORS, OURS}
    assert set(step) == {TRL, OURS}
    for race in (full, internal):
        for name in ("loss", "grad_norm"):
            values = [row[name] for row in race.values()]
            assert values == pytest.approx([race[OURS][name]] * len(values), rel=1e-4)
    assert full[OURS]["loss"] != pytest.approx(internal[OURS]["loss"], rel=1e-4)
    for race in raced.values():
        for row in race.values():
            for name in MEASURED:
                assert row[f"{name}_ratio"] == row[name] / race[OURS][name]


@pytest.mark.slow
def test_internal_layout_tells_what_either_way_takes(tmp_path: Path):
    from tools.bench_internal_layout import QUANTITIES, main

    layouts = ["parallel.pp=2", "bupo.internal_layout.dp=2"]
    options = ("--layer=1", "--repeats=1", "--steps=1")
    report = _json_of(main, tmp_path / "layout.json", *TINY, *options, *layouts)
    in_place, own = report["rows"]
    for key, _, _ in QUANTITIES.values():
        assert in_place[key] > 0
        assert own[key] > 0
    assert own["held_bytes"] < in_place["held_bytes"]
    assert own["save_ms"] > 0
    assert own["take_over_ms"] > 0


FAKE_SERVER = [f"--python={sys.executable}", f"servers.env.PYTHONPATH={FAKE}"]


@pytest.mark.wide
@pytest.mark.slow
def test_a_weight_sync_moves_what_a_dumber_count_finds(tmp_path: Path):
    from tools.bench_weight_sync import main

    sizes = [option for option in TINY if "tokens" not in option and "respon" not in option]
    options = [*sizes[:-1], "--layer=2", "--repeats=1", *FAKE_SERVER]
    report = _json_of(main, tmp_path / "sync.json", *options)
    rows = {(row["mode"], row["phase"]): row for row in report["rows"]}
    modes = ("broadcast", "http", "disk", "ipc")
    assert set(rows) == {(mode, phase) for mode in modes for phase in ("full", "internal")}
    hidden, ffn, vocab, head = 16, 24, 32, 8
    layer = hidden * (4 * hidden + 3 * ffn) + 2 * hidden + 2 * head
    for (_, phase), row in rows.items():
        of_layers = 6 * layer + hidden if phase == "full" else 2 * layer  # the final norm
        assert row["sent_bytes"] == 4 * (vocab * hidden + of_layers)
        parts = row["gather_s"] + row["send_s"] + row["rest_s"]
        assert row["seconds"] == pytest.approx(parts)
        assert row["send_s"] > 0
    full = rows["http", "full"]["sent_bytes"]
    assert report["most_bytes"] == 3 / 7 * full + 4 * vocab * hidden


@pytest.mark.slow
def test_the_client_and_the_raw_server_answer_the_same_requests(tmp_path: Path):
    from tools.bench_rollout import OURS, RAW, main

    sizes = ("--concurrency", "4", "16", "--response-tokens=3", "--repeats=1", "--vocab=32")
    report = _json_of(main, tmp_path / "rollout.json", *sizes, "--hidden=16", *FAKE_SERVER)
    assert [row["requests"] for row in report["rows"]] == [4, 16]
    for row in report["rows"]:
        ours, raw = row[OURS], row[RAW]
        assert row["lost"] == pytest.approx(1 - ours["tokens_per_s"] / raw["tokens_per_s"])
        assert ours["client_cpu_s_per_1000_tokens"] > 0
        assert raw["tokens_per_s"] > 0
