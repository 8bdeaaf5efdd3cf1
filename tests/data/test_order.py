from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_bupo.data.order import PromptStream
from megatron_bupo.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index, (1,), "", "") for index in range(count)]


def indices(stream: PromptStream, *steps: int) -> list[int]:
    return [prompt.index for step in steps for prompt in stream.prompts_at(step)]


def cases(count: int):
    dice = random.Random(0)
    return [(dice.randint(1, 40), dice.randint(1, 60), dice.randint(0, 9)) for _ in range(count)]


@pytest.mark.parametrize(("size", "per_step", "seed"), cases(30))
def test_every_epoch_asks_every_prompt_once_even_where_a_step_is_longer(
    size: int, per_step: int, seed: int
) -> None:
    stream = PromptStream(prompts(size), prompts_per_step=per_step, seed=seed)
    asked = indices(stream, *range(3 * size))  # at least three epochs
    assert len(asked) == 3 * size * per_step
    for start in range(0, len(asked), size):
        assert sorted(asked[start : start + size]) == list(range(size))


@pytest.mark.parametrize(("size", "per_step", "seed"), cases(10))
def test_a_step_depends_on_nothing_but_the_seed_and_its_number(
    size: int, per_step: int, seed: int
) -> None:
    stream = PromptStream(prompts(size), prompts_per_step=per_step, seed=seed)
    steps = list(range(50))
    straight = {step: indices(stream, step) for step in steps}
    random.Random(seed).shuffle(steps)
    random.seed(1)  # nor on the global generator
    for step in steps:
        fresh = PromptStream(prompts(size), prompts_per_step=per_step, seed=seed)
        assert indices(fresh, step) == straight[step]


def test_seeds_and_epochs_each_have_an_order_of_their_own() -> None:
    orders = Counter(
        tuple(indices(PromptStream(prompts(50), prompts_per_step=50, seed=seed), epoch))
        for seed in range(20)
        for epoch in range(20)
    )
    assert len(orders) == 400


def test_every_place_is_equally_likely() -> None:
    stream = PromptStream(prompts(4), prompts_per_step=4, seed=0)
    firsts = Counter(indices(stream, epoch)[0] for epoch in range(4000))
    assert all(abs(count - 1000) < 5 * 27.4 for count in firsts.values())  # 5 sigma


def test_without_shuffling_the_file_order_repeats() -> None:
    stream = PromptStream(prompts(3), prompts_per_step=2, seed=0, shuffle=False)
    assert indices(stream, 0, 1, 2) == [0, 1, 2, 0, 1, 2]


def test_the_order_is_the_same_in_every_process() -> None:
    script = (
        "from megatron_bupo.data.order import PromptStream\n"
        "from megatron_bupo.types import Prompt\n"
        "rows = [Prompt(i, (1,), '', '') for i in range(10)]\n"
        "stream = PromptStream(rows, prompts_per_step=10, seed=3)\n"
        "print([p.index for p in stream.prompts_at(5)])\n"
    )
    here = indices(PromptStream(prompts(10), prompts_per_step=10, seed=3), 5)
    command = [sys.executable, "-c", script]
    there = subprocess.check_output(command, text=True, cwd=Path(__file__).parents[2])
    assert there.strip() == str(here)
    assert here == [7, 9, 1, 6, 4, 3, 0, 5, 2, 8]  # and in every release: runs resume on it
