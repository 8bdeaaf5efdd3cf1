from __future__ import annotations

import pytest

from megatron_bupo.rewards.exact_match import exact_match, normalize


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


# (response, answer, with the authors' quirks, without)
QUIRKS = [
    (r"\boxed{5}", "5", 1.0, 1.0),
    (r"\boxed{1} no, \boxed{5}", "5", 1.0, 1.0),
    (r"As \boxed 3, so \boxed{5}", "5", 0.0, 1.0),  # `\boxed ` hides every `\boxed{`
    (r"As \boxed{3}, so \boxed 5", "5", 1.0, 1.0),
    (r"so $\boxed 5$ apples", "5", 1.0, 1.0),  # up to the dollar sign
    (r"so \boxed 5 apples", "5", 0.0, 1.0),  # or else to the end
    (r"\boxed {5}", "{5}", 1.0, 0.0),
    (r"\boxed{\left\{5\right.}", r"\{5.", 0.0, 1.0),  # `\{` counts as a brace
    (r"\boxed5", "5", 0.0, 1.0),
    (r"\fbox{5}", "5", 0.0, 1.0),
    (r"\boxed{5} or \boxedtext{6}", "5", 0.0, 1.0),
    (r"\boxed{\boxed{5}}", "5", 1.0, 1.0),
    ("5", "5", 0.0, 0.0),
]


@pytest.mark.parametrize(("response", "answer", "quirky", "plain"), QUIRKS)
def test_the_authors_find_the_box_in_their_own_way(
    response: str, answer: str, quirky: float, plain: float
) -> None:
    assert exact_match(response, answer, quirks=True) == quirky
    assert exact_match(response, answer) == plain


@pytest.mark.parametrize(
    ("boxed", "answer", "reward"),
    [
        (r"5\text{ m} or 6\text{ m}", r"5\text{ m} or 6\text{ m}", 1.0),
        (r"5\text{ m} or 6\text{ m}", "5", 0.0),
        (r"\sqrt", r"\sqrt", 1.0),
        (r"\frac", "", 0.0),
        (r"\frac1", r"\frac1", 1.0),
    ],
)
def test_what_cannot_be_normalised_is_compared_as_it_is(
    boxed: str, answer: str, reward: float
) -> None:
    assert exact_match(f"\\boxed{{{boxed}}}", answer) == reward
