from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_bupo.bed import chain_sums
from megatron_bupo.config import load_config

DEMO = Path(__file__).parents[2] / "conf" / "demo.yaml"
DRAWS = 20_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    chain_sums.save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def trace(sums: list[int]) -> str:
    return "".join(f">{total}" for total in sums[1:]) + f"#{sums[-1]}$"


def running_sums(operands: chain_sums.Operands) -> list[int]:
    return [sum(operands[: i + 1]) for i in range(4)]


def demonstrations(operands: chain_sums.Operands) -> list[str]:
    rng = random.Random(0)
    return [chain_sums.demonstration(operands, rng) for _ in range(DRAWS)]


def assert_share(hits: int, of: int, expected: float) -> None:
    """Within five standard deviations: a false alarm in two million."""
    deviation = math.sqrt(expected * (1 - expected) / of)
    assert abs(hits / of - expected) < 5 * deviation


def test_held_out_prompts_are_256_and_never_trained_on() -> None:
    train, held_out = set(chain_sums.TRAIN), set(chain_sums.EVAL)
    assert len(held_out) == len(chain_sums.EVAL) == 256
    assert not train & held_out
    assert len(train | held_out) == len(chain_sums.TRAIN) + 256 == 10_000


def test_held_out_prompts_are_as_hard_as_the_others() -> None:
    def carries(operands: chain_sums.Operands) -> int:
        return sum(
            total % 10 + operand >= 10
            for total, operand in zip(running_sums(operands), operands[1:], strict=False)
        )

    means = [
        sum(map(carries, prompts)) / len(prompts) for prompts in (chain_sums.TRAIN, chain_sums.EVAL)
    ]
    assert abs(means[0] - means[1]) < 0.05


def test_a_fifth_of_the_demonstrations_guess_and_fifteen_percent_of_guesses_are_right() -> None:
    texts = demonstrations((9, 9, 9, 9))
    guesses = [text for text in texts if ">" not in text]
    assert_share(len(guesses), DRAWS, 0.2)
    assert_share(guesses.count("#36$"), len(guesses), 0.15)


@pytest.mark.parametrize(
    ("operands", "right_step"),
    [((1, 2, 3, 3), 0.98), ((9, 9, 9, 9), 0.5 * 0.98)],  # no sum carries; every sum does
)
def test_traces_forget_half_of_the_carries_and_slip_in_two_percent(
    operands: chain_sums.Operands, right_step: float
) -> None:
    traces = [text for text in demonstrations(operands) if ">" in text]
    assert_share(traces.count(trace(running_sums(operands))), len(traces), right_step**3)


def test_errors_propagate_to_the_answer() -> None:
    for text in demonstrations((9, 1, 0, 5)):
        if ">" in text:
            steps, _, answer = text.removesuffix("$").rpartition("#")
            assert answer == steps.split(">")[-1]
    assert trace([9, 0, 0, 5]) in demonstrations((9, 1, 0, 5))  # the carry of 9 + 1, forgotten


def test_every_prompt_and_every_demonstration_fit_the_demo_s_limits() -> None:
    config = load_config(str(DEMO), [])
    rng = random.Random(0)
    for operands in (*chain_sums.TRAIN, *chain_sums.EVAL):
        assert len(chain_sums.prompt(operands)) == chain_sums.PROMPT_TOKENS
        for text in (chain_sums.demonstration(operands, rng), trace(running_sums(operands))):
            assert len(text) <= config.rollout.max_response_tokens
    assert config.data.max_prompt_tokens >= chain_sums.PROMPT_TOKENS


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (">13>16>22#22", 1.0),
        ("#22", 1.0),
        (">3#13#22", 1.0),
        ("#22#13", 0.0),
        (">13>16>22", 0.0),
        ("22", 0.0),
        ("#022", 0.0),
        ("#22=", 0.0),
        ("#", 0.0),
        ("", 0.0),
    ],
)
def test_reward_is_for_exactly_the_answer_after_the_last_mark(response: str, reward: float) -> None:
    assert chain_sums.reward(response, "22") == reward


def test_every_text_survives_the_tokenizer(tokenizer: Any) -> None:
    rng = random.Random(0)
    texts = [
        chain_sums.prompt(operands) + chain_sums.demonstration(operands, rng)
        for operands in chain_sums.EVAL
    ]
    for text in [*texts, chain_sums.CHARACTERS, "__$_"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == chain_sums.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("$", "").replace(
            "_", ""
        )


def test_the_tokenizer_knows_its_end_and_its_padding(tokenizer: Any) -> None:
    assert len(tokenizer) == 16
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("$", 14)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("_", 15)


def test_data_rows_hold_the_prompts_and_their_sums() -> None:
    rows = [json.loads(line) for line in chain_sums.jsonl(chain_sums.EVAL).splitlines()]
    assert len(rows) == 256
    for row in rows:
        assert row["prompt"].endswith("=")
        assert int(row["answer"]) == sum(map(int, row["prompt"][:-1].split("+")))
