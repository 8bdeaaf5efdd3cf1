from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_bupo.rewards.boxes import last_boxed
from megatron_bupo.rewards.exact_match import exact_match, normalize
from megatron_bupo.rewards.math_answers import math


@pytest.mark.parametrize(
    ("response", "boxed"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7$.", "7"),
        (r"it is \boxed 7. Done", "7"),
        (r"\boxed{\left\{ x : x > 0 \right.}", r"\left\{ x : x > 0 \right."),
        (r"\boxed{a \\} b", r"a \\"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} and \fbox{3}", "5"),
        (r"\boxed{}", ""),
        (r"\boxedtext{5}", None),
        (r"\boxed{1} then cut off at \boxed{\frac{1}{2", None),
        (r"\boxed", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_box_is_read_with_its_braces_balanced(response: str, boxed: str | None) -> None:
    assert last_boxed(response) == boxed


SAME = [
    ("42", "42"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"\left(0, 1\right]", "(0,1]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
    (r"5\text{ cm}", "5"),
    (r"10\%", "10"),
    (r"90^\circ", "90"),
    (r"\$5", "5"),
    ("x = 5", "5"),
    ("1,000", "1000"),
    ("007", "7"),
    ("+3", "3"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("3, 1, 2", "1,2,3"),
    (r"\text{Yes}", "Yes"),
    (r"\text{(B)}", "B"),
    ("$7$", "7"),
    ("\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("4", r"We add them. The sum is $\boxed{4}$."),
]
DIFFERENT = [
    ("42", "43"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("(0, 1)", "(0, 1]"),
    ("(2, 1)", "(1, 2)"),
    (r"-\infty", r"\infty"),
    ("No", "Yes"),
    ("3.14", r"\pi"),
    ("1, 2", "1,2,3"),
    ("", "5"),
    ("", r"\text{ even}"),  # the normaliser takes the gold for a unit and leaves nothing
    ("1" * 5000, "7"),  # longer than Python's int() takes
]


@pytest.mark.parametrize(("boxed", "answer"), SAME)
def test_math_accepts_another_way_to_write_the_answer(boxed: str, answer: str) -> None:
    assert math(f"Thus \\boxed{{{boxed}}}.", answer) == 1.0


@pytest.mark.parametrize(("boxed", "answer"), DIFFERENT)
def test_math_refuses_another_answer(boxed: str, answer: str) -> None:
    assert math(f"Thus \\boxed{{{boxed}}}.", answer) == 0.0


@pytest.mark.parametrize("rule", [math, exact_match])
def test_an_answer_outside_a_box_is_worth_nothing(rule) -> None:
    assert rule("The answer is $7$.", "7") == 0.0
    assert rule(r"\boxed{6}, I mean $7$.", "7") == 0.0


def test_math_works_off_the_main_thread_where_signals_cannot_be_set() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math, r"\boxed{\sqrt{8}}", r"2\sqrt{2}").result() == 1.0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (r"\dfrac{3}{4}", r"\frac{3}{4}"),
        (r"\tfrac34", r"\frac{3}{4}"),
        (r"\frac3{4}", r"\frac{3}{4}"),
        (r"\frac{3}4", r"\frac{3}4"),  # the rule leaves this one alone
        ("3/4", r"\frac{3}{4}"),
        ("a/4", "a/4"),
        ("1/2/3", "1/2/3"),
        ("0.5", r"\frac{1}{2}"),
        (".5", r"\frac{1}{2}"),
        (r"{.5}", "{0.5}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"x = 5", "5"),
        (r"abc = 5", "abc=5"),
        (r"a = b = 5", "a=b=5"),
        (r"12\text{ meters}", "12"),
        (r"\text{yes}", r"\text{yes}"),
        (r"50\%", "50"),
        (r"30^{\circ}", "30"),
        (r"\$ 3", "3"),
        (r"1{,}000\!", "1{,}000"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("1\n2", "12"),
        ("", ""),
    ],
)
def test_normalisation_follows_the_math_data_set(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def test_exact_match_compares_strings_and_not_meanings() -> None:
    assert exact_match(r"\boxed{\dfrac12}", "0.5") == 1.0
    assert exact_match(r"\boxed{0.50}", "0.5") == 0.0
    assert exact_match(r"\boxed{\sqrt{12}}", r"2\sqrt{3}") == 0.0
