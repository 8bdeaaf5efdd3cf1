from __future__ import annotations

import random

import pytest

from megatron_bupo.data.contamination import SHARE, WORDS, Asked, normal_form, words

LONG = "Let $a_n$ be the number of ways to tile a two by n board with dominoes so that no two " * 2


def match(evaluation: str, training: str) -> bool:
    return Asked([(evaluation, True)]).match(training) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find x.", "  find\tX.\n"),
        ("Find $x+1$.", "Find \\( x + 1 \\)."),
        (r"\[ x \; + \, 1 \]", "$$x+1$$"),
        (r"\left( \dfrac{1}{2} \right)", r"(\frac{1}{2})"),
        ("x² and ﬁve", "x2 and five"),  # NFKC: superscripts, ligatures, full width
        ("".join(chr(ord(c) + 0xFEE0) for c in "Find") + " x", "find x"),
    ],
)
def test_case_white_space_and_latex_spacing_do_not_matter(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)
    assert match(one, other)
    assert match(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("4+9+3+6=", "4+9+3+7="),
        (r"\leftarrow x", r"\rightarrow x"),
        ("x-1", "x+1"),
        ("Sort 1 23.", "Sort 12 3."),
        ("a b", "ab"),
        ("$", " "),  # nothing is left of either
    ],
)
def test_what_asks_something_else_is_another_question(one: str, other: str) -> None:
    assert not match(one, other)


def test_long_questions_match_by_half_of_the_evaluations_grams_as_a_dumber_count_has_it() -> None:
    dice, seen = random.Random(0), set()
    vocabulary = [f"w{i}" for i in range(40)]
    for _ in range(300):
        asked = dice.choices(vocabulary, k=dice.randint(5, 40))
        cut = sorted(dice.sample(range(len(asked) + 1), 2))
        training = [*dice.choices(vocabulary, k=4), *asked[cut[0] : cut[1]], "end"]
        text = " ".join(training)
        grams = {" ".join(asked[i : i + WORDS]) for i in range(len(asked) - WORDS + 1)}
        there = sum(f" {gram} " in f" {text} " for gram in grams)
        expected = bool(grams) and there >= SHARE * len(grams)
        assert match(" ".join(asked), text) == expected
        seen.add((expected, there > 0))
    assert seen == {(True, True), (False, True), (False, False)}


def test_an_instruction_around_a_question_does_not_hide_it_but_a_common_ending_is_no_repeat() -> (
    None
):
    assert match(LONG, f"Solve this step by step. {LONG} Put the answer in \\boxed{{}}.")
    ending = "where $m$ and $n$ are relatively prime positive integers. Find the sum of $m+n$."
    other = f"A bag holds three red balls and two blue ones and one is drawn at random, {ending}"
    assert len(words(ending)) > WORDS
    assert not match(f"{LONG}, {ending}", other)


def test_the_question_that_shares_most_is_named() -> None:
    asked = Asked([(f"{LONG} and also three more words", "near"), (LONG, "same")])
    assert asked.match(f"{LONG} indeed") == "same"
    assert asked.match("Nothing of the kind.") is None
