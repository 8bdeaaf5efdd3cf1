from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_bupo.config.schema import RewardConfig, RewardTermConfig
from megatron_bupo.errors import RunStopped
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.types import Prompt, Rollout, RolloutGroup
from tests.http_server import Posted, Reply, serving

seen: Counter[str] = Counter()


def grade(posted: Posted) -> Reply | None:
    """What the response says; a list in, a list out."""
    rows, key = posted.body, posted.headers.get("Authorization")
    if isinstance(rows, dict):
        return one(rows, key)
    replies = [one(row, key) for row in (rows[:-1] if posted.path == "/short" else rows)]
    return Reply([reply and reply.body for reply in replies])


def one(row: dict[str, Any], key: str | None) -> Reply | None:
    word = row["response"]
    seen[word] += 1
    if word == "hang up":
        return None
    if word == "slow":
        time.sleep(2.0)
    known = {
        "garbage": b"<html>",
        "null": None,
        "text": "1.0",
        "nan": float("nan"),
        "big": 10**400,
        "object": {"reward": 0.5},
        "row": float(row["row"]["n"]),
        "key": float(key == "Bearer k3y"),
    }
    status = {"500": 500, "404": 404, "busy": 429 if seen[word] < 3 else 200}.get(word, 200)
    return Reply(known.get(word, float(word == row["answer"])), status)


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    with serving(grade) as address:
        yield address


def group(*responses: str) -> RolloutGroup:
    prompt = Prompt(0, (1,), "7", "3+4=", {"n": 5})
    return RolloutGroup(
        prompt, tuple(Rollout(prompt, (5,), r, (), (), "stop", 0) for r in responses)
    )


def graded(url: str, *responses: str, **options: Any) -> list[tuple[float, str]]:
    options = {"backoff_s": 0.01, "attempts": 3} | options
    # Short only where it is waited for: this machine may be busy
    grader = Grader(RewardConfig(url, options, timeout_s=1.0 if "slow" in responses else 60.0))
    try:
        return [(g.reward, g.warning or "") for g in grader.grade([group(*responses)])[0]]
    finally:
        grader.close()


def test_a_server_grades_by_number_or_object(judge: str, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k3y")
    headers = {"Authorization": "Bearer $JUDGE_KEY"}
    words = ("7", "8", "object", "row", "key")
    assert graded(judge, *words, headers=headers) == [
        (1.0, ""),
        (0.0, ""),
        (0.5, ""),
        (5.0, ""),
        (1.0, ""),
    ]
    assert [r for r, _ in graded(judge, *words, batch_size=2)] == [1.0, 0.0, 0.5, 5.0, 0.0]


def test_what_may_pass_is_tried_again_and_the_rest_is_not(judge: str) -> None:
    seen.clear()
    assert graded(judge, "7", "busy", "500", "404", "hang up", "slow", "garbage")[:2] == [
        (1.0, ""),
        (0.0, ""),  # graded, as wrong
    ]
    counts = {"7": 1, "busy": 3, "500": 3, "404": 1, "hang up": 3, "slow": 3, "garbage": 1}
    assert dict(seen) == counts


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("500", "status 500"),
        ("404", "status 404"),
        ("hang up", "ServerDisconnectedError"),
        ("slow", "no reply within 1 s"),
        ("garbage", "the reply is no JSON: <html>"),
        ("null", "the reply is no finite number: null"),
        ("text", 'the reply is no finite number: "1.0"'),
        ("nan", "the reply is no finite number: NaN"),
        ("big", "the reply is no finite number: 1000"),
    ],
)
def test_a_bad_reply_costs_its_own_rollout_the_reward(judge: str, word: str, says: str) -> None:
    good, (reward, warning) = graded(judge, "7", word, attempts=1)
    assert good == (1.0, "")
    assert reward == 0.0
    assert warning.startswith("remote grader: ")
    assert says in warning


def test_a_list_of_the_wrong_length_grades_nothing(judge: str) -> None:
    with pytest.raises(
        RunStopped, match="a list of 2 rewards was asked for, the reply is 1 entries"
    ):
        graded(f"{judge}/short", "7", "7", batch_size=2)


def test_a_grader_that_is_gone_stops_the_run_soon(judge: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        RunStopped, match=r"none of 200 responses was graded \(remote grader: Client"
    ):
        graded("http://127.0.0.1:9/nobody", *["7"] * 200)
    assert time.monotonic() - began < 60


def test_a_remote_term_stands_beside_functions(judge: str) -> None:
    terms = [RewardTermConfig("exact_match"), RewardTermConfig(judge, -2.0, "judge")]
    grader = Grader(RewardConfig(terms=terms))
    [[grade]] = grader.grade([group("object")])
    grader.close()
    assert (grade.reward, grade.components) == (-1.0, {"exact_match": 0.0, "judge": 0.5})
