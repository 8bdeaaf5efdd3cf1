from __future__ import annotations

import pytest

from megatron_bupo.config.reward_rules import check_reward, terms_of
from megatron_bupo.config.schema import RewardConfig, RewardTermConfig
from megatron_bupo.errors import InputError


def terms(*functions: str, **more: object) -> RewardConfig:
    return RewardConfig(terms=[RewardTermConfig(function, **more) for function in functions])  # type: ignore[arg-type]


def test_a_term_is_called_what_its_function_is_called() -> None:
    names = [
        "math",
        "my.package:fn",
        "sub/mine.py:fn.inner",
        "http://judge:8000/v1/grade",
        "http://j:1",
    ]
    assert [term.name for term in terms_of(terms(*names))] == [
        "math",
        "fn",
        "inner",
        "v1_grade",
        "j_1",
    ]


def test_without_terms_the_function_is_the_only_one() -> None:
    [term] = terms_of(RewardConfig("exact_match", {"quirks": True}))
    assert (term.name, term.weight, term.options) == ("exact_match", 1.0, {"quirks": True})
    assert term.where == "reward.function=exact_match"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            RewardConfig("exact_match", terms=[RewardTermConfig("math")]),
            "reward.terms with reward.function=exact_match: are two descriptions",
        ),
        (
            RewardConfig(options={"a": 1}, terms=[RewardTermConfig("math")]),
            "reward.terms with reward.function=math: are two descriptions",
        ),
        (terms("math", "math"), "reward.terms: 2 terms are called math"),
        (terms("math", weight=float("nan")), "reward.terms[0].weight=nan: is not a finite"),
        (terms("math", name="a/b"), "reward.terms[0].name=a/b: would make a metric"),
        (terms("math", name="answers_text"), "reward.terms[0].name=answers_text: would make"),
        (RewardConfig("http://"), "reward.function=http://: is no address"),
        (RewardConfig("http://host:notaport/x"), "reward.function=http://host:notaport/x: is no"),
        (RewardConfig("http://[::1/x"), "reward.function=http://[::1/x: is no address"),
        (RewardConfig("http://me:secret@host/x"), "reward.function=http://me:***@host/x: has a"),
        (terms("math", "https://a b/c"), "reward.terms[1].function=https://a b/c: is no address"),
    ],
)
def test_terms_that_make_no_sense_are_refused(reward: RewardConfig, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_reward(reward)
    assert str(caught.value).startswith(message)
