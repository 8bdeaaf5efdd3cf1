"""The comparison of methods: runs that resume, statistics against dumber ones, mistakes named."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import pytest

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask
from megatron_bupo.config.checks import check
from megatron_bupo.data.gram_files import read_grams
from megatron_bupo.evaluation.scores import passes
from megatron_bupo.intervals import student_inside, student_quantile
from megatron_bupo.record.metrics import read_metrics
from tests import runs
from tests.moments import until
from tools.compare_methods import CONFIG, METHODS, main
from tools.comparison_runs import plan, read_methods
from tools.comparison_statistics import (
    Curve,
    Difference,
    budget_of,
    sampling_noise,
)

ROOT = Path(__file__).parents[1]
TWO = """
all:
  grpo: {bupo.internal_steps: 0}
  bupo: {bupo.internal_steps: 1}
"""


@pytest.fixture(scope="module")
def common(bed: runs.Bed, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two methods with two seeds of two steps on one process, as options."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "methods.yaml").write_text(TWO)
    (folder / "none.yaml").write_text("")
    more = ("parallel.pp=1", "evaluation.every=1", "checkpoint.every=1")
    settings = bed.settings(folder, *more)
    files = ["--table", str(folder / "methods.yaml"), "--config", str(folder / "none.yaml")]
    return [*files, "--seeds=2", "--steps=2", *(f"--set={setting}" for setting in settings)]


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_tells_of_all_runs(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    argv = [*common, "--out", str(out)]
    killed = runs.fork(lambda: main(argv))
    first = out / "grpo" / "seed_0"
    until((out / "bupo" / "seed_0" / "metrics.jsonl").exists, while_=killed.is_alive)
    killed.kill()  # and with it the run that was under way
    assert not (out / "comparison.json").exists()
    before = (first / "metrics.jsonl").stat().st_mtime_ns

    done = runs.fork(lambda: main(argv)).wait()
    assert done.code == 0, done.err
    assert "3/3" in done.err  # of the four, one had ended
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    told = json.loads((out / "comparison.json").read_text())
    accuracies = {}
    for row, method in zip(told["rows"], ("grpo", "bupo"), strict=True):
        for seed in (0, 1):
            records = read_metrics(out / method / f"seed_{seed}")
            assert [r["policy"] == "full" for r in records] == [method == "grpo", True]
            curve = row["curves"][str(seed)]
            assert curve["tokens"][-1] == sum(
                16 * r["rollout/response_tokens_mean"] for r in records
            )
            accuracies[method, seed] = records[-1]["eval/accuracy_mean"]
            assert row["at_steps"]["of_seeds"][str(seed)] == accuracies[method, seed]
    gaps = [accuracies["bupo", seed] - accuracies["grpo", seed] for seed in (0, 1)]
    assert told["rows"][1]["at_steps"]["to_reference"]["mean"] == pytest.approx(fmean(gaps))
    for name in ("differences", "learning_curves", "entropies"):
        assert (out / f"{name}.png").stat().st_size > 10_000

    for setting, told in (
        ("optimizer.lr=1e-3", "optimizer.lr=0.0005, which is now 0.001"),
        ("optimizer.lr_factors={2: 0}", "optimizer.lr_factors.2=null, which is now 0.0"),
    ):
        assert main([*argv, f"--set={setting}", "--report"]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "options", "told"),
    [
        (TWO, ["--methods", "bopu"], "--methods bopu: is no method of the table"),
        (TWO, ["--set=optimizer.lrr=1"], "grpo: optimizer.lrr (command line): unknown key"),
        (TWO, ["--set=rollout.top_p=2"], "grpo: rollout.top_p=2.0: is out of range"),
        (TWO, ["--set=evaluation.every=0"], "grpo: evaluation.every=0: leaves step 2"),
        (TWO, ["--steps=3", "--set=evaluation.every=2"], "evaluation.every=2: leaves step 3"),
        (f"{TWO}  x: {{steps: 4}}", [], "x: steps=4: methods are compared after as many steps"),
        (f"{TWO}  x: {{algorithm.loss: clip}}", [], "x: algorithm.loss=clip: is not one of"),
        (f"{TWO}  x: {{from: gpro}}", [], "methods.yaml: x: from=gpro: is no method above it"),
        (f"{TWO}  x: 3", [], "methods.yaml: x=3: is not a mapping of settings"),
        (f"{TWO}  ../x: {{}}", [], "methods.yaml: ../x: is no name for a directory"),
        (f"{TWO}more:\n  x:", [], "methods.yaml: x: has no settings in any panel"),
        (f"{TWO}more:\n  bupo: {{}}", [], "methods.yaml: bupo: has settings twice"),
        ("grpo", [], "methods.yaml: is no table of methods"),
        ("{", [], "methods.yaml: is not valid YAML"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(
    common: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    table: str,
    options: list[str],
    told: str,
):
    path, out = tmp_path / "methods.yaml", tmp_path / "out"
    path.write_text(table)
    assert main([*common, f"--table={path}", f"--out={out}", *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_methods_at_hand_can_all_run_and_each_is_another():
    methods, panels = read_methods(METHODS)
    assert set(methods) == {name for names in panels.values() for name in names}
    assert next(iter(methods)) == "grpo"
    planned = [plan(m, 0, Path("x"), config=str(CONFIG), overrides=[]) for m in methods.values()]
    for run in planned:
        check(run.config, None)
        internal = run.method.name.startswith("bupo")
        assert run.config.bupo.phases() == ([(5, 10)] if internal else [])
    settings = [json.dumps(dict(m.settings), sort_keys=True) for m in methods.values()]
    assert len(set(settings)) == len(settings)


def test_of_a_chain_sum_what_goes_on_and_what_answers_plans():
    grams = StrategicGrams(read_grams(ROOT / "examples" / "chain_sums_grams.yaml"))
    for text, planning in (
        (">13>16>22#22$", "^  ^  ^  ^   "),
        ("#7$", "^  "),
        (">5>>9##1", "^ ^^ ^^ "),
    ):
        mask = planning_mask(text, [(i, i + 1) for i in range(len(text))], grams)
        assert "".join("^" if plans else " " for plans in mask) == planning


@pytest.mark.parametrize("df", range(1, 12))
def test_students_distribution_is_its_density_added_up(df: int):
    at = np.linspace(0, 3, 30_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    density = scale * (1 + at**2 / df) ** (-(df + 1) / 2)
    assert student_inside(3.0, df) == pytest.approx(2 * np.trapezoid(density, at), abs=1e-8)
    assert student_inside(student_quantile(0.95, df), df) == pytest.approx(0.95, abs=1e-12)


def test_quantiles_are_those_of_the_tables():
    found = [round(student_quantile(0.95, df), 3) for df in (1, 2, 4, 9)]
    assert found == [12.706, 4.303, 2.776, 2.262]
    assert student_quantile(0.95, 10_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-3)


def test_nineteen_of_twenty_intervals_hold_the_true_difference():
    rng = random.Random(0)
    held = stars = 0
    for _ in range(4000):
        of_seed = [rng.gauss(0, 5) for _ in range(5)]  # what seeds share leaves no trace
        ours = {seed: x + 0.3 + rng.gauss(0, 1) for seed, x in enumerate(of_seed)}
        theirs = {seed: x + rng.gauss(0, 1) for seed, x in enumerate([*of_seed, 99.0])}
        found = Difference.of(ours, theirs, comparisons=1)
        held += abs(found.mean - 0.3) < found.half
        none = Difference.of(ours, {s: x + 0.3 for s, x in theirs.items()}, comparisons=10)
        stars += none.stars == 2
    assert 0.94 < held / 4000 < 0.96
    assert 0.002 < stars / 4000 < 0.009  # of 0.05 / 10


def curve_of(tokens: list[float], accuracy: list[float], every: int) -> Curve:
    """Of a run that was evaluated `every` so many steps; `accuracy` has one more, of before."""
    records = [
        {
            "step": step,
            "rollout/sampled_tokens": count,
            "update/ratio_clipped_fraction": 0.25,
            "time/step_s": 2.0,
            "time/evaluate_s": 0.5,
        }
        | ({"eval/accuracy_mean": accuracy[(step + 1) // every]} if (step + 1) % every == 0 else {})
        for step, count in enumerate(tokens)
    ]
    return Curve.of([{**records[0], "eval/initial_accuracy_mean": accuracy[0]}, *records[1:]])


def test_at_equal_tokens_accuracy_is_interpolated_at_what_all_have_sampled():
    rng = random.Random(1)
    curves = [
        curve_of([rng.uniform(50, 150) for _ in range(12)], [rng.random() for _ in range(5)], 3)
        for _ in range(6)
    ]
    budget = budget_of(curves)
    assert budget in {curve.tokens[-1] for curve in curves}
    for curve in curves:
        assert curve.steps == (0, 3, 6, 9, 12)
        assert curve.step_s == 1.5
        for tokens in (0.0, 100.0, budget):
            after = next(i for i in range(1, 5) if curve.tokens[i] >= tokens)
            low, high = curve.tokens[after - 1 : after + 1]
            share = (tokens - low) / (high - low)
            for values, found in (
                (curve.accuracy, curve.at_tokens(tokens)),
                (curve.steps, curve.at_tokens(tokens, curve.steps)),
            ):
                expected = (1 - share) * values[after - 1] + share * values[after]
                assert found == pytest.approx(expected)


def test_sampling_noise_is_the_mean_of_the_variances_of_questions():
    rng = random.Random(2)
    right = [[float(rng.random() < q / 40) for _ in range(8)] for q in range(40)]
    record = {
        "eval/held_out_avg_at_8": fmean(x for row in right for x in row),
        "eval/held_out_pass_at_2": fmean(passes(right, 2)),
    }
    of_means = [np.var(row, ddof=1) / 8 for row in right]
    assert sampling_noise(record, 40) == pytest.approx(math.sqrt(sum(of_means)) / 40)
    assert math.isnan(sampling_noise(record, None))
