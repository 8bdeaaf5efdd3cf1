"""Whatever a policy writes into its box costs no more than its own reward, and earns none."""

from __future__ import annotations

import math
import time
from itertools import product

import pytest

from megatron_bupo.config.schema import RewardConfig, RewardTermConfig
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup

pytestmark = pytest.mark.slow

LIMIT_S = 0.5
ANSWERS = ("17", r"\frac{1}{2}", "Yes", "(1,2)")

BOXED = [
    # numbers that nobody has time for
    *(r"9^{9^{9^9}}", r"2^{2^{2^{2^{2^2}}}}", r"10^{10^{10}}!", "99999999999!", r"(10^7)!"),
    *(r"\binom{10^{9}}{5\cdot 10^{8}}", r"3^{100000000}", r"(1+\frac{1}{10^9})^{10^9}"),
    *(r"7^{7^{7^7}} \mod 100", r"\sin(10^{10^{10}})", r"e^{e^{e^{e^{e^e}}}}", r"\Gamma(10^{10})"),
    *(r"\lfloor\pi^{10^7}\rfloor", r"1\times10^{10^9}", "1e999999999", r"1.0001^{10^{12}}"),
    *(r"\sum_{i=1}^{10^{12}}\frac1{i^2}", r"\prod_{i=1}^{10^6}i", r"(x+y+z+w+1)^{60}"),
    *(r"\int_0^1\sin(x^{x^x})dx", r"\lim_{n\to\infty}n!^n", r"\zeta(10^8)", r"H_{10^9}"),
    # size and depth
    *("7" * 10**6, "x+" * 10**5 + "1", "0." + "3" * 10**5, "1," * 3000, "%" * 20000),
    *("(" * 3000 + "1" + ")" * 3000, r"\frac{1}{" * 5000 + "x" + "}" * 5000, r"\left(" * 2000),
    *(r"\sqrt{2+" * 60 + "x" + "}" * 60, r"^\circ" * 5000, "|" * 2000, "1 000" * 5000),
    r"\begin{pmatrix}" + r"\\".join(["&".join("12345678")] * 200) + r"\end{pmatrix}",
    r"\cup".join(f"({2 * i},{2 * i + 1})" for i in range(300)),
    r"\times".join([r"\{1,2,3,4,5,6,7,8,9\}"] * 12),
    # no mathematics
    *("", " ", "$", "$$", "\\", "\\\\", "{}", "\\{", "&", "^", "_", "=", "\0", "\n" * 99, "\ufeff"),
    *("\ud800", "💥", "٣", "NaN", "nan", "inf", r"\infty", "None", "__import__('os')", "lambda: 1"),
    *(r"\text{", r"\text{}", r"\boxed{", r"\frac", r"\frac{}{}", r"\frac{1}{0}", r"\frac00"),
    *(r"\sqrt", r"\sqrt{}", r"\begin{matrix}", r"\end{matrix}", r"\input{/etc/passwd}"),
    # what would like to pass for one of the answers
    *(r"17 \text{ or } 18", r"\neq 17", r"\text{not }17", "17, 18", "1 7", "1.7", "17x", "-17"),
    *(r"\pm\frac12", r"\frac12,\frac13", "0.49", "1:2:3", r"\approx\frac12", r"\frac{1}{2}\neq0"),
    *("No", "Yes No", "yeS?no", "sey", "Yes or No", r"\text{Yes and No}", "Y", "True", "esy"),
    *("(2,1)", "[1,2]", "(1,2]", "(1,2,3)", "(1,2),(3,4)", "1<x<3", r"(1,2)\cup(3,4)", "[2,1]"),
]
WHOLE = ["", "17", r"\boxed", r"\boxed{17", r"17}", r"\boxed17}{", r"\fbox", "Yes", r"\boxed{}{17}"]


def test_there_are_enough_of_them() -> None:
    assert len(set(BOXED)) + len(WHOLE) >= 100


@pytest.fixture(scope="module")
def grades() -> list[tuple[str, str, Grade]]:
    """(response, answer, grade) of each hostile response, twice, to each question."""
    responses = [rf"\boxed{{{boxed}}}" for boxed in BOXED] + WHOLE
    names = ("math", "exact_match", "format", "repetition")
    terms = [RewardTermConfig(name) for name in names]
    terms.append(RewardTermConfig("exact_match", name="authors", options={"quirks": True}))
    terms.append(RewardTermConfig("overlong", options={"cache_tokens": 10}))
    terms.append(RewardTermConfig("length", options={"target_tokens": 10}))
    reward = RewardConfig(terms=terms, timeout_s=LIMIT_S, memory_mb=400, processes=1)
    grader = Grader(reward, max_response_tokens=50)
    groups = []
    for i, (response, answer) in enumerate(product(responses, ANSWERS)):
        prompt = Prompt(i, (1,), answer, "?", {})
        pair = [Rollout(prompt, (5,), response, (), (), "stop", 0)] * 2
        groups.append(RolloutGroup(prompt, tuple(pair)))
    began = time.monotonic()
    found = grader.grade(groups)
    seconds = time.monotonic() - began
    grader.close()
    assert seconds < 90 + LIMIT_S * sum(bool(g.warning) for pair in found for g in pair)
    pairs = zip(groups, found, strict=True)
    return [(g.rollouts[0].text, g.prompt.answer, grade) for g, its in pairs for grade in its]


def test_every_hostile_response_gets_a_number_in_range_or_a_warning(grades) -> None:
    ranges = {"format": (0, 1), "repetition": (-1, 0), "overlong": (-1, 0), "length": (-1, 0)}
    for _, _, grade in grades:
        assert math.isfinite(grade.reward)
        for name, value in grade.components.items():
            low, high = ranges.get(name, (0, 1))
            assert low <= value <= high
        if grade.warning:
            assert len(grade.warning) < 500
            assert "\n" not in grade.warning


def test_no_hostile_response_is_right(grades) -> None:
    right = {
        (response, answer, name)
        for response, answer, grade in grades
        for name in ("math", "exact_match", "authors")
        if grade.components[name]
    }
    # the rule of the MATH data set takes all that follows `\text{ ` for a unit, and says so
    cut = [(r"\boxed{17 \text{ or } 18}", "17"), (r"\boxed{1 7}", "17")]
    assert right == {(*pair, name) for pair in cut for name in ("exact_match", "authors")}


def test_each_hostile_answer_is_worked_at_once(grades) -> None:
    """The second of two equal rollouts costs nothing."""
    tried = [grade.warning or "" for _, _, grade in grades]
    for first, second in zip(tried[::2], tried[1::2], strict=True):
        if "took longer" in first and "killed" not in first and first.startswith("math"):
            assert "given up before" in second
