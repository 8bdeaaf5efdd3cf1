from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_bupo.bed import chain_sums
from megatron_bupo.cli import main
from megatron_bupo.config import load_config
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.durable import whole_lines
from megatron_bupo.engines import benchmarks
from megatron_bupo.evaluation.asking import ask
from megatron_bupo.evaluation.scores import pass_at_k
from megatron_bupo.evaluation.sheets import to_line
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rollout.embedded import EmbeddedEngine
from tests import runs
from tests.moments import at_line, kill_launcher
from tests.ranks import run_ranks
from tests.runs import Bed

pytestmark = pytest.mark.slow
QUESTIONS, RESPONSES = 24, {"AIME24": 6, "own": 3}


@pytest.fixture(scope="module")
def suite(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benchmarks of the same questions."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "asked.jsonl").write_text(chain_sums.jsonl(chain_sums.EVAL[:QUESTIONS]))
    asked = str(folder / "asked.jsonl")
    settings = {
        "data": {"max_prompt_tokens": 16},
        "reward": {"function": f"{bed.folder / 'reward.py'}:reward"},
        "evaluation": {
            "responses_per_prompt": RESPONSES["own"],
            "max_response_tokens": 10,
            "responses_per_batch": 12,
            "bootstrap_samples": 100,
            "pass_at": [1, 2],
            "benchmarks": [
                {"name": "AIME24", "data": asked, "responses_per_prompt": RESPONSES["AIME24"]},
                {"name": "own", "data": asked},
            ],
        },
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(settings))
    return folder / "suite.yaml"


def command(bed: Bed, suite: Path, out: Path, *more: str) -> list[str]:
    return [
        "eval",
        "--model",
        str(bed.folder / "model"),
        "--suite",
        str(suite),
        *more,
        "--out",
        str(out),
    ]


@pytest.fixture(scope="module")
def whole(bed: Bed, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing has disturbed. To be read only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(bed, suite, out)) == 0
    return out


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(out: Path) -> dict[str, Any]:
    """All but what depends on the clock."""
    found = json.loads((out / "results.json").read_text())
    for benchmark in (*found["benchmarks"].values(), *found["settings"]["benchmarks"].values()):
        benchmark.pop("seconds", None)
        benchmark.pop("tokens_per_second", None)
    return found


def test_every_question_and_response_is_written_down_and_counted(whole: Path):
    found = results(whole)["benchmarks"]
    for name, count in RESPONSES.items():
        rows = lines_of(whole / f"{name}.jsonl")
        assert [row["index"] for row in rows] == list(range(QUESTIONS))
        assert {len(row["responses"]) for row in rows} == {count}
        every = [response for row in rows for response in row["responses"]]
        for row in rows:
            for response in row["responses"]:
                digits = [int(c) for c in response["text"] + row["answer"] if c.isdigit()]
                assert response["correctness"] == response["reward"] == (sum(digits) % 3 == 0)
        score = found[name]
        assert score["avg_at_k"]["value"] == fmean(r["correctness"] for r in every)
        assert (
            0 < score["avg_at_k"]["low"] <= score["avg_at_k"]["value"] < score["avg_at_k"]["high"]
        )
        assert score["response_tokens_mean"] == fmean(r["tokens"] for r in every)
        assert score["truncated_fraction"] == fmean(r["finish_reason"] != "stop" for r in every)
        for k in (1, 2):
            correct = [sum(r["correctness"] for r in row["responses"]) for row in rows]
            expected = fmean(pass_at_k(n=count, correct=int(c), k=k) for c in correct)
            assert score["pass_at_k"][str(k)]["value"] == pytest.approx(expected, abs=1e-12)
    assert [a["responses"][0]["text"] for a in lines_of(whole / "AIME24.jsonl")] != [
        b["responses"][0]["text"] for b in lines_of(whole / "own.jsonl")
    ]  # a noise of its own
    assert (whole / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert "Avg" in (whole / "table.md").read_text().splitlines()[0]


def test_neither_batches_nor_a_kill_change_the_results(
    bed: Bed, suite: Path, whole: Path, tmp_path: Path
):
    out = tmp_path / "out"
    slow = [*command(bed, suite, out), "rollout.batch_size=2", "evaluation.responses_per_batch=1"]
    for name in ("AIME24", "own"):
        path = out / f"{name}.jsonl"
        runs.start(*slow, first=at_line(3, path.name, kill_launcher)).wait()
        assert 0 < len(whole_lines(path)) < QUESTIONS
        with path.open("a") as file:  # as if killed inside a line
            file.write('{"index": 5, "que')
        assert not (out / "results.json").exists()
    done = runs.run(*command(bed, suite, out))
    assert done.code == 0, done.err
    assert f"AIME24  {QUESTIONS}/{QUESTIONS} questions done before" in done.out
    for name in RESPONSES:
        assert (out / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    assert results(out) == results(whole)
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_a_finished_suite_is_only_read_again(
    bed: Bed, suite: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in RESPONSES:
        (out / f"{name}.jsonl").chmod(0o400)
    other = ["--beside", "Qwen3-8B", "evaluation.pass_at=[3]", "evaluation.confidence=0.5"]
    assert main(command(bed, suite, out, *other)) == 0
    assert "| Qwen3-8B BuPO (paper)        |             54.06 |" in capsys.readouterr().out
    for name in RESPONSES:
        before, now = (results(folder)["benchmarks"][name] for folder in (whole, out))
        assert now["avg_at_k"]["value"] == before["avg_at_k"]["value"]
        assert now["avg_at_k"]["low"] > before["avg_at_k"]["low"]
        assert list(now["pass_at_k"]) == ["3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["evaluation.temperature=0.5"],
            "its answers were drawn with evaluation.temperature=1.0, which is now 0.5; ",
        ),
        (["evaluation.top_p=0.9"], "its answers were drawn with evaluation.top_p=1.0, which is "),
        (["seed=1"], "its answers were drawn with seed=0, which is now 1; set it as it was, or "),
        (["evaluation.max_response_tokens=9"], "its answers were drawn with evaluation.max_res"),
        (["reward.function=exact_match"], "its answers were drawn with other reward files; "),
        (["evaluation.responses_per_prompt=4"], "own was asked with responses_per_prompt=3, wh"),
        (["evaluation.max_prompts=5"], "AIME24 was asked with other questions; "),
        (["data.system_prompt='1+2=3 '"], "AIME24 was asked with other questions; "),
    ],
)
def test_other_settings_in_the_same_directory_are_refused_by_name(
    bed: Bed,
    suite: Path,
    whole: Path,
    settings: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    assert main(command(bed, suite, whole, *settings)) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: --out {whole}: {message}")
    assert told.out == ""


def test_settings_without_an_answer_yet_bind_nobody(bed: Bed, suite: Path, tmp_path: Path):
    out = tmp_path / "out"
    failing = ["rollout.engine=sglang", "servers.addresses=[http://127.0.0.1:1]"]
    waits = ["servers.start_timeout_s=0.1", "sync.mode=disk"]
    assert main(command(bed, suite, out, *failing, *waits)) != 0
    assert (out / "state.json").exists()
    assert main(command(bed, suite, out, "seed=3", "evaluation.max_prompts=2")) == 0


def test_other_weights_in_the_same_directory_are_refused(
    bed: Bed, suite: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(bed.folder / "model", tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    assert main([*command(bed, suite, whole), *model]) == 0  # the same elsewhere
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert main([*command(bed, suite, whole), *model]) == 2
    told = f"error: --out {whole}: its answers were drawn with other model weights; "
    assert capsys.readouterr().err.startswith(told)


def test_a_damaged_answer_is_named(
    bed: Bed, suite: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "out" / "own.jsonl"
    for damage in ("{}", "", "[1]", '{"index": 3, "answer": "7", "responses": []}'):
        shutil.copytree(whole, path.parent, dirs_exist_ok=True)
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], damage, *lines[4:]]) + "\n")
        assert main(command(bed, suite, path.parent)) == 2
        assert capsys.readouterr().err.startswith(
            f"error: {path}: line 4: is not what an evaluatio"
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["evaluation.benchmarks=[]"], "evaluation.benchmarks: there is nothing to evaluate on; n"),
        (["--beside", "GPT-2"], "--beside GPT-2: the paper has no results for it; choose Qwen3-4B"),
        (["--suite", "none.yaml"], "none.yaml: cannot be read (No such file or directory); "),
        (["--model", "none"], "none: no such directory; "),
        (
            ["data.max_prompt_tokens=7"],
            "data.max_prompt_tokens=7: row 1 of ",
        ),
        (
            ["evaluation.max_response_tokens=121"],
            "evaluation.max_response_tokens=121: AIME24 has a question of 8 tokens, and the model ",
        ),
        (["evaluation.benchmarks=[{name: a, data: none.jsonl}]"], "none.jsonl: there is no such "),
        (["reward.function=nobody:home"], "reward.function=nobody:home: "),
        (["rollout.engine=sglang", "servers.python=/none"], "servers.python=/none: "),
        (["evaluation.benchmarks=[{name: a}]"], "evaluation.benchmarks[0].data: has no value; "),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    bed: Bed,
    suite: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    assert main([*command(bed, suite, tmp_path / "out"), *more]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {message}")
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_evaluates_the_same_suite_to_the_bit(bed: Bed, suite: Path, tmp_path: Path):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"defaults: {suite}\nevaluation: {{every: 2}}\n")
    settings = bed.settings(run_dir, "data.eval=null", "steps=2", "parallel.pp=1")
    settings = [s for s in settings if not s.startswith("evaluation.every")]
    done = runs.run("train", "--config", recipe, *settings)
    assert done.code == 0, done.err
    first, last = runs.metrics(run_dir)
    names = {
        f"{n}_{m}" for n, k in RESPONSES.items() for m in (f"avg_at_{k}", "pass_at_1", "pass_at_2")
    }
    evaluated = {key for key in first | last if key.startswith("eval/")}
    assert evaluated == {
        f"eval/{when}{n}" for when in ("", "initial_") for n in names | {"accuracy_mean"}
    }
    assert main(["eval", "--model", str(run_dir), "--suite", str(suite), "--out", str(out)]) == 0
    for name, count in RESPONSES.items():
        found = results(out)["benchmarks"][name]
        assert found["avg_at_k"]["value"] == last[f"eval/{name}_avg_at_{count}"]
        assert found["pass_at_k"]["2"]["value"] == last[f"eval/{name}_pass_at_2"]
    assert results(out)["average"]["value"] == last["eval/accuracy_mean"]
    assert results(out)["model"] == "run"


def lines_by_rank(bed: Bed, suite: str) -> list[str]:
    config = load_config(suite, [f"model.path={bed.folder / 'model'}"])
    tokenizer = load_tokenizer(config.model.path)
    engine = EmbeddedEngine(config.model.path, tokenizer, batch_size=7)
    grader = Grader(config.reward)
    (first, _) = benchmarks(config, tokenizer)
    batches = ask(first, engine, grader, responses_per_batch=24, first=20)
    lines = [to_line(answered) for batch in batches for answered in batch]
    grader.close()
    return lines


def test_ranks_share_the_responses_and_agree_on_them(bed: Bed, suite: Path, whole: Path):
    expected = (whole / "AIME24.jsonl").read_text().splitlines()[20:]
    assert run_ranks(2, lines_by_rank, bed, str(suite)) == [expected, expected]
