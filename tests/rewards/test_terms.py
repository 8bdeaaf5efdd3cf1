from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.config.schema import RewardConfig, RewardTermConfig
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.rewards.terms import check_terms
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup


def group(*responses: str, answer: str = "7") -> RolloutGroup:
    prompt = Prompt(0, (1, 2), answer, "3+4=", {"n": 5})
    rollouts = (Rollout(prompt, tuple(range(len(r))), r, (), (), "stop", 0) for r in responses)
    return RolloutGroup(prompt, tuple(rollouts))


def composed(*terms: RewardTermConfig) -> RewardConfig:
    return RewardConfig(terms=list(terms), timeout_s=30.0)


def test_a_reward_is_the_weighted_sum_of_its_terms_and_knows_each(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def scaled(response, answer, *, by): return by * len(answer)\n"
    )
    reward = composed(
        RewardTermConfig("math"),
        RewardTermConfig("format", weight=0.5),
        RewardTermConfig("overlong", weight=0.25, options={"cache_tokens": 10}),
        RewardTermConfig(f"{tmp_path}/mine.py:scaled", -2.0, "mine", {"by": 3}),
    )
    check_terms(reward, 20)
    grader = Grader(reward, max_response_tokens=20)
    right, late = r"\boxed{7}", r"\boxed{8}, I think"  # 9 and 18 tokens
    [[first, second]] = grader.grade([group(right, late)])
    grader.close()
    assert first.components == {"math": 1.0, "format": 1.0, "overlong": 0.0, "mine": 3.0}
    assert second.components == {"math": 0.0, "format": 0.0, "overlong": -0.8, "mine": 3.0}
    assert first.reward == pytest.approx(1 + 0.5 - 6)
    assert second.reward == pytest.approx(0.25 * -0.8 - 6)
    assert (first.correctness, second.correctness) == (1.0, 0.0)
    assert first.warning is None


def test_a_term_that_fails_is_0_and_the_others_count(tmp_path: Path) -> None:
    text = (
        "import os\ndef die(response, answer): os._exit(3)\ndef bad(response, answer): 1 / 0\n"
        "def huge(response, answer): return 1e308\n"
    )
    (tmp_path / "mine.py").write_text(text)
    terms = [RewardTermConfig(f"{tmp_path}/mine.py:{name}") for name in ("die", "bad")]
    grader = Grader(composed(*terms, RewardTermConfig("format")))
    [grades] = grader.grade([group(r"\boxed{7}", "no")])
    grader.close()
    assert [grade.reward for grade in grades] == [1.0, 0.0]
    for grade in grades:
        assert "die: reward function ended its process with exit code 3" in (grade.warning or "")
        assert "bad: reward function raised ZeroDivisionError" in (grade.warning or "")
    huge = RewardTermConfig(f"{tmp_path}/mine.py:huge", weight=10.0)
    grader = Grader(composed(huge))
    [[grade]] = grader.grade([group("x")])
    grader.close()
    assert (grade.reward, grade.warning) == (0.0, "the sum of the terms is inf")


def test_correctness_of_a_single_function_is_its_reward() -> None:
    assert Grade(0.25).correctness == 0.25
    assert Grade(-3.0, None, {"right": 1.0, "long": -1.0}).correctness == 1.0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (RewardConfig("math", {"quirk": True}), "reward.options.quirk: is no option of math"),
        (
            RewardConfig("exact_match", {"quirk": True}),
            "reward.options.quirk: is no option of exact_match; the nearest is quirks",
        ),
        (RewardConfig("exactmatch"), "reward.function=exactmatch: is neither built in nor"),
        (RewardConfig("math", {"answer": "7"}), "reward.options.answer: is no option of math"),
        (RewardConfig("length"), "reward.function=length: has parameters that nothing fills"),
        (
            RewardConfig("length", {"target_tokens": "many"}),
            "reward.options={target_tokens: many}: do not fit length",
        ),
        (
            RewardConfig("length", {"target_tokens": 10, "per_token": float("nan")}),
            "reward.options={target_tokens: 10, per_token: nan}: do not fit length",
        ),
        (
            RewardConfig("format", {"style": "xml"}),
            "reward.options={style: xml}: do not fit format",
        ),
        (
            composed(
                RewardTermConfig("math"), RewardTermConfig("overlong", options={"cache_tokens": 99})
            ),
            "reward.terms[1].options={max_response_tokens: 20, cache_tokens: 99}: do not fit",
        ),
        (
            composed(RewardTermConfig("math"), RewardTermConfig("nowhere:fn")),
            "reward.terms[1].function=nowhere:fn: there is no module nowhere",
        ),
        (
            RewardConfig("http://127.0.0.1:1/x", {"batchsize": 2}),
            "reward.options.batchsize: is no option of a remote grader; the nearest is batch_size",
        ),
        (
            RewardConfig(
                "http://127.0.0.1:1/x", {"headers": {"Authorization": "$NO_SUCH_VARIABLE"}}
            ),
            "reward.options: do not fit a remote grader (headers.Authorization needs",
        ),
    ],
)
def test_what_does_not_fit_a_function_is_refused_by_name(
    reward: RewardConfig, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_terms(reward, 20)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
