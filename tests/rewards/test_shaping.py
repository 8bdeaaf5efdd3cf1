from __future__ import annotations

import pytest

from megatron_bupo.rewards.shaping import format_, length, overlong, repetition


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"So \boxed{5}", 1.0),
        (r"So $\boxed{\frac{1}{2}}$.", 1.0),
        ("So\n\\[\n\\boxed{5}\n\\]\n", 1.0),
        (r"**\boxed{5}**", 1.0),
        (r"\boxed{5} and more", 0.0),
        (r"\boxed{5} \boxed{5}", 0.0),
        (r"\boxed{5", 0.0),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_a_response_in_form_ends_in_its_only_box(response: str, reward: float) -> None:
    assert format_(response) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a</think>\n<answer>b</answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_thoughts_and_answer_stand_in_their_tags(response: str, reward: float) -> None:
    assert format_(response, style="think") == reward


def test_overlong_responses_are_punished_as_in_dapo() -> None:
    most, cache = 20480, 4096

    def equation_13(y: int) -> float:
        if y <= most - cache:
            return 0.0
        return ((most - cache) - y) / cache if y <= most else -1.0

    for tokens in (0, 1, 16383, 16384, 16385, 18432, 20479, 20480, 20481, 30000):
        mine = overlong(range(tokens), cache_tokens=cache, max_response_tokens=most)
        assert mine == pytest.approx(equation_13(tokens), abs=1e-12)


def test_a_response_is_punished_for_each_token_off_the_target() -> None:
    values = [length(range(n), target_tokens=100) for n in (100, 0, 200, 10**6)]
    assert values == pytest.approx([0.0, -0.03, -0.03, -1.0])


def test_repetition_is_the_share_of_word_grams_that_have_been_there() -> None:
    assert repetition("a b c d", words=2) == 0.0
    assert repetition("a b a b a b", words=2) == pytest.approx(2 / 5 - 1)  # ab ba ab ba ab
    assert repetition("a " * 1000, words=20) == pytest.approx(1 / 981 - 1)
    assert repetition("too short") == 0.0
