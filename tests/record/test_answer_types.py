from __future__ import annotations

import pytest

from megatron_bupo.record.answer_types import answer_type
from megatron_bupo.record.measures import rollout_measures
from megatron_bupo.record.rollout_files import read_rollouts, step_file, write_rollouts
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("42", "integer"),
        ("-7", "integer"),
        ("1,000", "integer"),
        ("$12$", "integer"),
        ("0.5", "number"),
        (r"\dfrac{43}{100}", "number"),
        ("3/4", "number"),
        (r"50\%", "number"),
        ("Yes", "yes_no"),
        (r"\text{no}", "yes_no"),
        ("True", "yes_no"),
        ("B", "choice"),
        (r"\text{(B)}", "choice"),
        ("Evelyn", "text"),
        (r"\text{an ellipse}", "text"),
        ("x", "expression"),
        (r"2\sqrt{3}", "expression"),
        ("(1,2)", "expression"),
        ("", "expression"),
    ],
)
def test_reference_answers_are_of_few_kinds(answer: str, kind: str) -> None:
    assert answer_type(answer) == kind


def groups_of(*answers: str) -> list[RolloutGroup]:
    prompts = [Prompt(i, (1,), answer, "?") for i, answer in enumerate(answers)]
    return [
        RolloutGroup(p, (Rollout(p, (5,), "r", (-1.0,), None, "stop", 0),) * 2) for p in prompts
    ]


def test_rewards_are_told_by_answer_type_and_by_term() -> None:
    right, wrong = (Grade(x - 0.1, None, {"math": x, "long": -0.1}) for x in (1.0, 0.0))
    grades = [[right, right], [wrong, right], [wrong, wrong]]
    told = rollout_measures(groups_of("Yes", "No", "7"), grades)
    assert told["reward/answers_yes_no_mean"] == 0.75
    assert told["reward/answers_integer_mean"] == 0.0
    assert told["reward/math_mean"] == 0.5
    assert told["reward/long_mean"] == pytest.approx(-0.1)
    assert told["rollout/reward_mean"] == pytest.approx(0.4)


def test_one_type_and_one_function_need_no_telling() -> None:
    told = rollout_measures(groups_of("1", "2"), [[Grade(1.0), Grade(0.0)]] * 2)
    assert not [key for key in told if key.startswith("reward/")]


def test_terms_are_dumped_with_the_rollouts_and_older_dumps_are_read(tmp_path) -> None:
    grades = [[Grade(0.5, None, {"math": 1.0, "long": -0.5}), Grade(0.0, "lost", {"math": 0.0})]]
    write_rollouts(tmp_path, 0, groups_of("7"), grades)
    path = step_file(tmp_path, 0)
    read = [rollout.grade for rollout in read_rollouts(path)]
    assert read == grades[0]
    assert [list(grade.components) for grade in read] == [["math", "long"], ["math"]]
    older = path.read_text().replace(', "components": {"math": 0.0}', "")
    path.write_text(older)
    assert read_rollouts(path)[1].grade == Grade(0.0, "lost")
