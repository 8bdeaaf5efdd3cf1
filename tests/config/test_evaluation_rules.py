from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.evaluation_rules import benchmarks_of
from megatron_bupo.errors import InputError

CONF = Path(__file__).parents[2] / "conf"
BASE = ["model.path=model", "data.train=train.jsonl"]


def refusal(*settings: str) -> str:
    config = load_config(None, [*BASE, *settings])
    with pytest.raises(InputError) as error:
        check(config, None)
    return str(error.value)


def test_a_benchmark_has_what_evaluation_says_where_it_is_silent():
    other = "{name: B, data: b.csv, responses_per_prompt: 2, pass_at: []}"
    config = load_config(
        None,
        [
            *BASE,
            "evaluation.responses_per_prompt=8",
            "evaluation.pass_at=[4, 1, 4]",
            f"evaluation.benchmarks=[{{name: A, data: a.csv}}, {other}]",
        ],
    )
    check(config, None)
    a, b = benchmarks_of(config)
    assert (a.responses_per_prompt, a.pass_at) == (8, [1, 4])
    assert (b.responses_per_prompt, b.pass_at) == (2, [])


def test_data_eval_is_a_benchmark():
    config = load_config(None, [*BASE, "data.eval=held_out.csv", "evaluation.every=5"])
    check(config, None)
    (only,) = benchmarks_of(config)
    assert (only.name, only.data, only.responses_per_prompt) == ("eval", "held_out.csv", 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["[{name: a, data: x}, {name: A, data: y}]"], "[1].name=A: a is another benchmark's name"),
        (["[{name: a/b, data: x}]"], "[0].name=a/b: cannot name files and metrics; "),
        (["[{name: ../a, data: x}]"], "[0].name=../a: cannot name files and metrics; "),
        (["[{name: initial_a, data: x}]"], "[0].name=initial_a: cannot name files and metrics; "),
        (["[{name: a, data: x, responses_per_prompt: 0}]"], "[0].responses_per_prompt=0: is out"),
        (
            ["[{name: a, data: x, pass_at: [1, 8]}]", "evaluation.responses_per_prompt=4"],
            "[0].pass_at=[1, 8]: Pass@8 of a cannot be told from evaluation.responses_per_prompt=4",
        ),
        (["[{name: a, data: x, pass_at: [0]}]"], "[0].pass_at=[0]: Pass@0 of a cannot be told "),
        (
            [
                "[{name: a, data: x, pass_at: [2], responses_per_prompt: 2}]",
                "evaluation.temperature=0",
            ],
            "[0].pass_at=[2]: evaluation.temperature=0 draws the same response again and again",
        ),
    ],
)
def test_what_is_wrong_with_a_benchmark_is_named(settings: list[str], message: str):
    benchmarks, *more = settings
    told = refusal(f"evaluation.benchmarks={benchmarks}", *more)
    assert told.startswith(f"evaluation.benchmarks{message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.eval=e.csv", "evaluation.benchmarks=[{name: a, data: x}]"],
            "data.eval=e.csv: and evaluation.benchmarks (a) both say what to evaluate on; ",
        ),
        (["evaluation.every=3"], "evaluation.every=3: there is nothing to evaluate on; set data.e"),
        (
            ["data.eval=e.csv", "evaluation.pass_at=[2]"],
            "evaluation.pass_at=[2]: Pass@2 of eval cannot be told from evaluation.responses_per_",
        ),
    ],
)
def test_contradictions_are_refused(settings: list[str], message: str):
    assert refusal(*settings).startswith(message)


def test_a_list_of_numbers_that_holds_something_else_is_described():
    with pytest.raises(InputError, match="must be a list, each a whole number"):
        load_config(None, [*BASE, "evaluation.pass_at=[1, null]"])


@pytest.mark.parametrize(
    ("suite", "asked"),
    [
        (
            "paper",
            {"AMC23": 16, "MATH500": 16, "AIME24": 32, "AIME25": 32},
        ),
        (
            "pass_at_k",
            {"AMC23": 300, "MATH500": 300, "AIME24": 300, "AIME25": 300},
        ),
    ],
)
def test_the_papers_suites_ask_as_the_paper_says(suite: str, asked: dict[str, int]):
    config = load_config(str(CONF / "eval" / f"{suite}.yaml"), ["model.path=model"])
    check(config, None, training=False)
    evaluation = config.evaluation
    assert (evaluation.temperature, evaluation.top_p) == (1.0, 1.0)
    found = benchmarks_of(config)
    assert {b.name: b.responses_per_prompt for b in found} == asked
    if suite == "pass_at_k":
        assert all(b.pass_at == [1, 4, 16, 64, 256] for b in found)


def test_a_training_run_can_list_the_suite(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"defaults: [{CONF / 'eval' / 'paper.yaml'}]\nevaluation: {{every: 5}}\n"
        "trainer: {max_tokens_per_microbatch: 16384}\n"
    )
    config = load_config(str(recipe), BASE)
    check(config, None)
    assert [b.name for b in benchmarks_of(config)] == ["AMC23", "MATH500", "AIME24", "AIME25"]
