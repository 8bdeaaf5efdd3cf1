"""Failed responses are judged, each once, whatever the judge does now and then."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_bupo.record.rollout_files import write_rollouts
from megatron_bupo.types import Grade, Prompt, RolloutGroup
from tests.http_server import Posted, Reply, serving
from tests.record.dumps import rollout
from tools.classify_errors import main
from tools.error_judge import choice_of
from tools.failed_responses import failures_of, read_responses

ANSWERS = {"plan": "C", "slip": "B", "nothing": "A", "right": "D", "busy": "B", "crash": "C"}
ANSWERS |= {"garbage": "C", "hang up": "B", "slow": "C", "no choices": "B", "key": "C"}
ONCE = {"busy", "crash", "garbage", "hang up", "slow", "no choices"}  # then they are answered

asked: Counter[str] = Counter()


def judged(posted: Posted) -> Reply | None:
    """What the response that is to be judged says."""
    [word] = re.findall(r"# Response.*\n(.*)\n\n# Choices", posted.body["messages"][0]["content"])
    asked[word] += 1
    fails = word not in ONCE or asked[word] == 1
    status = {"busy": 429, "crash": 500, "long": 400, "stranger": 401}.get(word, 200)
    if word == "slow" and fails:
        time.sleep(3)
    if word == "hang up" and fails:
        return None
    if word == "key" and posted.headers.get("Authorization") != "Bearer k3y":
        status = 401
    text = "They went astray.\n**Verdict: " + ANSWERS.get(word, "?") + "**"
    reply: Any = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if word == "no choices" and fails:
        reply = {"choices": []}
    return Reply(b"<html>" if word == "garbage" and fails else reply, status if fails else 200)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(judged) as address:
        yield f"{address}/v1"


@pytest.fixture(autouse=True)
def _nothing_asked_yet() -> None:
    asked.clear()


def dump(run_dir: Path, steps: dict[int, list[str]]) -> Path:
    """Rollouts with these texts, all of them failed; one that is correct and one that could not be
    graded beside them.
    """
    for step, texts in steps.items():
        prompt = Prompt(step, (4, 10), "13", "4+9=")
        rollouts = tuple(
            rollout(prompt, [1, 3], text=text) for text in [*texts, "good", "ungraded"]
        )
        grades = [*(Grade(0.0) for _ in texts), Grade(1.0), Grade(0.0, "took longer than 5 s")]
        write_rollouts(run_dir, step, [RolloutGroup(prompt, rollouts)], [grades])
    return run_dir


def classify(server: str, out: Path, *more: object) -> int:
    options = ["--judge", server, "--model", "judge", "--out", out, "--backoff-s", "0.01"]
    return main([str(word) for word in [*options, *more]])


def written(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = json.loads((out / "summary.json").read_text())["rows"]
    return rows, [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]


def test_every_failure_is_judged_once_through_all_faults_and_counted_by_its_step(
    server: str, tmp_path: Path
):
    texts = {0: ["plan", "slip", "busy", "crash", "garbage"], 7: ["hang up", "slow", "no choices"]}
    texts[7] += ["nothing", "right", "mumble", "plan", "plan"]
    run, out = dump(tmp_path / "run", texts), tmp_path / "out"
    assert classify(server, out, run, "--timeout-s=2") == 0
    rows, errors = written(out)
    kinds = {"A": "other", "B": "execution", "C": "planning", "D": "other"}
    for row, (step, words) in zip(rows, texts.items(), strict=True):
        expected = [kinds.get(ANSWERS.get(word, ""), "unclear") for word in words]
        assert row["step"] == step
        assert (row["responses"], row["failed"]) == (len(words) + 2, len(words))
        assert (row["not_graded"], row["unanswered"]) == (1, 0)
        for kind in ("planning", "execution", "other", "unclear"):
            assert row[kind] == expected.count(kind)
        share = expected.count("planning") / len(words)
        assert row["planning_fraction"] == pytest.approx(share)
        mine = [error for error in errors if error["step"] == step]
        assert [error["kind"] for error in mine] == expected
        assert [error["choice"] for error in mine] == [ANSWERS.get(word) for word in words]
    assert imread(out / "errors.png").std() > 0
    alike = {word: 1 + (word in ONCE) for words in texts.values() for word in words}
    assert asked == alike  # of two that are the same, one
    assert classify(server, out, run) == 0
    assert asked == alike
    assert written(out) == (rows, errors)


def test_what_was_not_answered_is_asked_again_and_nothing_else(server: str, tmp_path: Path):
    run, out = dump(tmp_path / "run", {0: ["slip", "long", "plan"]}), tmp_path / "out"
    assert classify(server, out, run) == 1
    [row], errors = written(out)
    assert (row["unanswered"], row["execution"], row["planning"]) == (1, 1, 1)
    assert [error["kind"] for error in errors] == ["execution", None, "planning"]
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"question": "torn')  # as a kill leaves it
    dump(run, {1: ["nothing"]})
    assert classify(server, out, run) == 1
    assert asked == {"slip": 1, "long": 2, "plan": 1, "nothing": 1}
    assert len(written(out)[0]) == 2


def test_a_judge_that_refuses_or_is_gone_ends_it_in_a_line(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run, out = dump(tmp_path / "run", {0: ["stranger", "plan"]}), tmp_path / "out"
    assert classify(server, out, run, "--concurrency=1") == 2
    assert "refuses: HTTP 401" in capsys.readouterr().err
    assert not asked["plan"]
    with serving(judged) as closed:
        address = f"{closed}/v1"
    gone = dump(tmp_path / "gone", {step: ["plan", "slip"] for step in range(9)})
    assert classify(address, tmp_path / "none", gone, "--attempts=2") == 1
    assert "without an answer" in capsys.readouterr().err
    many = dump(tmp_path / "many", {0: [f"plan {i}" for i in range(9)]})
    assert classify(address, tmp_path / "none", many, "--attempts=2", "--concurrency=2") == 1
    assert "is gone" in capsys.readouterr().err
    key = dump(tmp_path / "key", {0: ["key"]})
    assert classify(server, out, key, "--api-key-env=JUDGE_KEY") == 2
    assert "JUDGE_KEY: is not set" in capsys.readouterr().err
    monkeypatch.setenv("JUDGE_KEY", "k3y")
    assert classify(server, out, key, "--api-key-env=JUDGE_KEY") == 0


def test_a_sheet_of_an_evaluation_is_read_and_a_step_is_drawn_from_by_its_seed(
    server: str, tmp_path: Path
):
    responses = [
        {"text": word, "correctness": right, "warning": warning, "finish_reason": "length"}
        for word, right, warning in [("plan", 0.0, None), ("x", 1.0, None), ("y", 0.0, "hung")]
    ]
    line = {"index": 3, "question": "4+9=", "answer": "13", "responses": responses}
    sheet = tmp_path / "aime.jsonl"
    sheet.write_text(json.dumps(line) + "\n")
    assert classify(server, tmp_path / "out", sheet) == 0
    [row], _ = written(tmp_path / "out")
    assert (row["step"], row["responses"], row["failed"], row["planning"]) == (None, 3, 1, 1)
    assert not (tmp_path / "out" / "errors.png").exists()
    run = str(dump(tmp_path / "run", {0: [f"text {i}" for i in range(40)], 1: ["one"]}))

    def chosen(seed: int) -> list[str]:
        settings = {"min_reward": 1.0, "per_step": 5, "seed": seed}
        return [r.text for r in failures_of(read_responses(run, "all"), **settings).chosen]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(chosen(0)) == 6
    assert failures_of(read_responses(run, "0"), min_reward=0.0, per_step=None, seed=0).chosen == []


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("Verdict: C", "C"),
        ("It slipped at 7+8.\n\n**Verdict:** B (low-level execution)", "B"),
        ("<think>Verdict: A? No.</think>\nVerdict: D.", "D"),
        (" (A).\n", "A"),
        ("verdict: B\nverdict: B", "B"),
        ("Verdict: B\nNo, wait.\nVerdict: C", None),
        ("Verdict: A, B, C or D", None),
        ("Verdict: A plan that could not work", None),
        ("Verdict: Because it is wrong", None),
        ("Verdict: E", None),
        ("verdict: c", None),
        ("A slip.", None),
        ("<think>Verdict: A", None),
        ("", None),
    ],
)
def test_a_choice_is_one_letter_said_as_such_and_nothing_is_guessed(reply: str, choice: str | None):
    assert choice_of(reply) == choice


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl", '{"responses": [{}]}', "line 1: is not what an evaluation wrote"),
        ("a.jsonl", '{"responses": [], "index": 0}', "there are no responses"),
        ("a.jsonl", '{"step": 0}', "line 1: has no"),
        (".", "", "holds no rollouts"),
    ],
)
def test_what_is_no_rollouts_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, told: str
):
    (tmp_path / "a.jsonl").write_text(text)
    assert classify("http://localhost:1/v1", tmp_path / "out", tmp_path / name) == 2
    assert told in capsys.readouterr().err
