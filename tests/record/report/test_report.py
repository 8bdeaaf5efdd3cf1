from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_bupo.record.report import charts, facts
from megatron_bupo.record.report.curves import Curve, Shown, each, grouped
from megatron_bupo.record.report.page import POINTS, page, thinned
from megatron_bupo.record.report.runs import RunRecord
from megatron_bupo.record.report.write import write_report
from tests.record.runs import probed, records, write
from tests.runs import run

BUPO = ("internal layer 5", 4), ("full", 20)


def shown_run(name: str, of: list[dict[str, Any]], **more: Any) -> RunRecord:
    return RunRecord(name, Path("/runs") / name, tuple(of), **more)


def probed_run(name: str, *phases: tuple[str, int], **more: Any) -> RunRecord:
    of = records(*phases, evaluate_every=4)
    probed(of, every=4, layer=5, layers=9)
    return shown_run(name, of, **more)


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', text)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_every_metric_of_every_run_and_needs_nothing_else():
    hostile = '</script><script>alert("x")</script>'
    one = probed_run(hostile, *BUPO)
    other = shown_run("short", [{"step": 0, "policy": "full", "new/thing_s": float("nan")}])
    text = page("<b>title</b>", each([one, other, shown_run("none", [])]))
    assert hostile not in text
    assert "<b>" not in text
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    report = data_of(text)
    assert report["lines"][0]["name"] == hostile
    names = {key for record in one.records for key in record if "/" in key}
    assert set(report["metrics"]) == names - {"eval/initial_accuracy_mean"} | {"new/thing_s"}
    column = report["lines"][0]["columns"]["entropy/full_nats"]
    assert column == {"f": 0, "v": pytest.approx([0.5 - 0.001 * k for k in range(24)])}
    probes = report["lines"][0]["columns"]["probe/perplexity"]
    assert probes["a"] == [0, 4, 8, 12, 16, 20]
    assert report["lines"][1]["columns"] == {}
    assert report["lines"][0]["phases"] == [["internal layer 5", 5, 0, 4], ["full", None, 4, 24]]


def test_profiles_go_over_later_layers_for_each_probe():
    cosines = charts.PROFILES[0][1]
    (found,) = charts.profiles(each([probed_run("a", *BUPO)]), cosines)
    assert (found.layers, found.steps) == ([6, 7, 8, 9], [0, 4, 8, 12, 16, 20])
    assert found.values[0] == pytest.approx([1 - (layer - 5) / 9 for layer in found.layers])
    assert found.values[-1][-1] == pytest.approx(1 - 4 / 9 * (1 - 0.5 * 20 / 24))
    of = records(*BUPO)
    probed(of, every=4, layer=5, layers=6)
    one_above = each([shown_run("a", of)])
    assert charts.profiles(one_above, cosines) == []
    titles = [chart.title for section in charts.sections(one_above) for chart in section.charts]
    assert "Cosine of h_l with layer 6" in titles


def test_a_long_line_is_thinned_to_means():
    values = [float(k) for k in range(3 * POINTS + 1)]
    found = thinned(Curve(values, values))
    assert len(found.values) <= POINTS
    assert found.values[:2] == [1.5, 5.5]
    assert found.at == found.values


def test_tables_say_what_differs_and_what_came_of_it_and_hide_secrets():
    settings = {
        "steps": 60,
        "seed": 1,
        "run_dir": "a",
        "servers.env.HF_TOKEN": "hf_1",
        "reward.function": "http://me:pw@host/grade",
    }
    one = probed_run("a", *BUPO, settings=settings)
    other = probed_run("b", ("full", 24), settings={**settings, "steps": 24, "seed": 2})
    assert facts.differences(each([one, other])) == [("steps", ["60", "24"])]
    told = dict(facts.differences(each([one])))
    assert told["servers.env.HF_TOKEN"] == ["(hidden)"]
    assert told["reward.function"] == ["http://(hidden)@host/grade"]
    identity = facts.identity(Shown("a", (one,)))
    assert identity.trained == "internal layer 5 for 4, then full policy for 20"
    assert identity.steps == "24 of 60"
    found = {fact.label: fact.results[0] for fact in facts.results(each([one]))}
    assert found["accuracy at the end"] == facts.Result(pytest.approx(0.49), step=24)
    assert found["entropy at the end"] == facts.Result(pytest.approx(0.479))


def test_the_guards_story_is_told():
    guard = {
        "left_before_step": 4,
        "policy": "internal layer 5",
        "reasons": ["perplexity 9"],
        "checkpoint": "checkpoints/step_000004",
    }
    one = probed_run("a", *BUPO, guard=guard)
    assert facts.guard_story(one) == (
        "left internal layer 5 before step 4: perplexity 9 (kept checkpoints/step_000004)"
    )
    assert facts.guard_story(probed_run("a", *BUPO, guard={})).startswith("left ? before step ?")


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs",
    [
        [probed_run("$a_b$", *BUPO), probed_run("b", ("full", 9)), shown_run("none", [])],
        [shown_run("a", [{"step": 3, "policy": "critic alone", "rollout/reward_mean": -1.0}])],
        [shown_run("a", [{"step": 0, "policy": "full", "probe/cosine_to_layer_07": 0.5}])],
        [shown_run("a", [{"step": 0, "policy": "full", "time/step_s": 0.0, "update/loss": -1e59}])],
        [shown_run(str(n), records(*[(f"internal layer {n}", 2)] * 9)) for n in range(1, 11)],
    ],
    ids=[
        "different lengths",
        "one odd step",
        "one probe",
        "a step in no time",
        "ten runs of nine phases",
    ],
)
def test_unusual_runs_are_drawn_without_a_warning(
    tmp_path: Path, runs: list[RunRecord], recwarn: pytest.WarningsRecorder
):
    html, *figures = write_report(tmp_path, each(runs))
    assert len(data_of(html.read_text())["lines"]) == len(runs)
    assert figures
    assert all(np.std(imread(figure)) > 0 for figure in figures)
    assert not [str(warning.message) for warning in recwarn]


def test_the_names_of_many_runs_fit_above_a_narrow_figure(tmp_path: Path):
    runs = [shown_run(f"{n}{'m' * 20}", records(("full", 2))) for n in range(12)]
    _, *figures = write_report(tmp_path, each(runs))
    (narrow,) = (figure for figure in figures if figure.name == "time.png")
    assert np.min(imread(narrow)[:100, -3:]) == 1  # no name reaches the edge


def test_seeds_of_a_group_are_one_line_with_intervals(tmp_path: Path):
    runs = [probed_run(f"bupo-{s}", *BUPO, settings={"seed": s}) for s in range(3)]
    report = data_of(page("t", grouped(runs)))
    (line,) = report["lines"]
    assert (line["name"], line["runs"]) == ("bupo, 3 seeds", 3)
    assert line["columns"]["eval/accuracy_mean"]["h"] == [0] * 7


def test_the_command_reads_directories_and_says_where_the_report_is(tmp_path: Path):
    for seed in range(2):
        folder = write(tmp_path / f"grpo-{seed}", records(("full", 3)))
        (folder / "config.yaml").write_text(f"seed: {seed}\nsteps: 3\n")
    one, other = tmp_path / "grpo-0", tmp_path / "grpo-1"
    done = run("report", one)
    assert (done.code, done.err) == (0, "")
    assert str(one / "report" / "report.html") in done.out
    assert (one / "report" / "figures" / "learning.png").exists()
    done = run("report", one, other, one, "--group-seeds")
    assert done.code == 0, done.err
    report = tmp_path / "report-grpo-0-grpo-1" / "report.html"
    assert data_of(report.read_text())["lines"][0]["name"] == "grpo, 2 seeds"
    done = run("report", tmp_path)
    assert done.code == 2
    assert re.fullmatch(r"error: .* is no run: .*\n", done.err)
    done = run("report", one, "--out", one / "metrics.jsonl")
    assert (done.code, done.err.count("\n")) == (2, 1)
