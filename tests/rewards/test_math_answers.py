from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from math_verify import LatexExtractionConfig, parse

from megatron_bupo.rewards import math_answers
from megatron_bupo.rewards.boxes import last_boxed
from megatron_bupo.rewards.exact_match import exact_match
from megatron_bupo.rewards.magnitude import TooLarge, check_size
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


# (boxed, reference): right, and math-verify alone would say otherwise
MENDED_SAME = [
    ("Yes.", "Yes"),
    ("YES", "Yes"),
    ("true", "True"),
    (r"\textbf{No}", "no"),
    ("\u22125", "-5"),
    (r"1\,000", "1000"),
    ("1 1/2", r"\frac32"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"\varnothing", r"\emptyset"),
    (r"1 \le x \le 2", "[1,2]"),
    ("18", r"18 \text{ integers}"),
    ("864", r"864 \mbox{ inches}^2"),
]
# wrong, and math-verify or the MATH rule alone would accept it
MENDED_DIFFERENT = [
    ("listen", "silent"),
    ("on", "No"),
    ("sey", "Yes"),
    ("THH", "HHT"),
    ("Yes, No", "Yes"),
    (r"5 \text{ or } 6", "5"),
    (r"5\text{ or 6}", "5"),
    (r"\text{not }5", "5"),
    (r"\neq 5", "5"),
    (r"\approx 5", "5"),
    ("A) 5", "5"),
    ("2", r"2^{\aleph_0}"),
    (r"0.\overline{3}", "0"),
    (r"0.\overline{3}", r"0.\overline{6}"),
    ("4343_6", "4343_7"),
    (r"\int_0^1 x\,dx", r"\frac12"),
    (r"\sum_{i=1}^{10} i", "55"),
    (r"\lim_{x\to0}\frac{\sin x}{x}", "1"),
    ("x=5", "y=5"),
]


@pytest.mark.parametrize(("boxed", "answer"), MENDED_SAME)
def test_math_reads_what_math_verify_does_not(boxed: str, answer: str) -> None:
    assert math(f"\\boxed{{{boxed}}}", answer) == 1.0


@pytest.mark.parametrize(("boxed", "answer"), MENDED_DIFFERENT)
def test_math_refuses_what_math_verify_takes_for_the_answer(boxed: str, answer: str) -> None:
    assert math(f"\\boxed{{{boxed}}}", answer) == 0.0


@pytest.mark.slow
def test_different_answers_of_real_kinds_do_not_stand_for_each_other() -> None:
    golds = ["0", "1", "-1", "Yes", "No", "A", "B", "x", "2x", r"\frac{1}{2}", "0.3", r"\pi", "e"]
    golds += [
        r"\sqrt{2}",
        r"\infty",
        "(1,2)",
        "[1,2]",
        "[1,2)",
        r"\mathbb{R}",
        "x>1",
        "n!",
        "1,2,3",
    ]
    golds += [r"\emptyset", "x^2+1", r"2^{10}", r"\sqrt{3}", "i", "-i", r"\{1,3\}", "12_5", "(2,1)"]
    alike = [(a, b) for a in golds for b in golds if math(f"\\boxed{{{a}}}", b) and a != b]
    assert alike == []


@pytest.mark.parametrize(
    ("answer", "is_small"),
    [
        (r"2^{2024}", True),
        (r"100! + \binom{200}{100}", True),
        (r"(x+1)^{50}", True),
        (r"2^{1/1000000}", True),
        (r"(2n)! \cdot 3^{n}", True),
        (r"9^{9^{9^9}}", False),
        (r"10^{10^{10}}!", False),
        (r"\binom{10^9}{5 \cdot 10^8}", False),
        (r"(1+10^{-9})^{10^9}", False),
        (r"e^{e^{e^{e^{e^{e}}}}}", False),
        (r"\sin(10^{10^{10}})", False),
        (r"(x+y+z+w+1)^{60}", False),
        (r"\prod_{i=1}^{10^{7}} i", False),
        (r"\begin{pmatrix} 1 & 7^{7^{7^7}} \\ 2 & 3 \end{pmatrix}", False),
    ],
)
def test_numbers_that_cannot_be_worked_out_are_told_from_others(
    answer: str, is_small: bool
) -> None:
    parsed = parse(f"${answer}$", [LatexExtractionConfig()], parsing_timeout=0)[0]
    if is_small:
        check_size(parsed)
        return
    with pytest.raises(TooLarge):
        check_size(parsed)


def test_an_answer_that_was_interrupted_is_not_tried_again(monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    response, answer = r"\boxed{x^2+1000003}", "x^2+1000033"
    with monkeypatch.context() as context:
        context.setattr(math_answers, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            math(response, answer)
    with pytest.raises(TooLarge, match="given up before"):
        math(response, answer)
