from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
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


def test_the_first_prompts_are_those_that_steps_ask_first_each_once():
    stream = PromptStream(prompts(7), prompts_per_step=3, seed=1)
    asked = indices(stream, 0, 1, 2)[:7]
    assert [p.index for p in stream.first(5)] == asked[:5]
    assert [p.index for p in stream.first(99)] == asked
    mixed = PromptStream(prompts(3), prompts(9)[3:], weights=[5, 1], prompts_per_step=3, seed=1)
    first = [p.index for p in mixed.first(6)]
    assert len(first) == len({*first})
    assert first == list(dict.fromkeys(indices(mixed, 0, 1)))


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


def test_every_source_of_a_mixture_has_its_share_at_every_moment() -> None:
    dice = random.Random(0)
    for sources in [2, 2, 2, 3, 3, 4, 5] * 3:
        weights = [dice.choice([dice.randint(1, 9), dice.random()]) for _ in range(sources)]
        exact = [Fraction(str(weight)) for weight in weights]
        named = [[Prompt(i, (1,), "", "", source=str(s)) for i in range(7)] for s in range(sources)]
        stream = PromptStream(*named, weights=weights, prompts_per_step=1, seed=0)
        owners = [stream.prompts_at(step)[0].source for step in range(200)]
        d = Fraction(1, 2 * sources - 2)
        for source, share in enumerate(weight / sum(exact) for weight in exact):
            ahead, count = [Fraction(0)], 0
            for position, owner in enumerate(owners, start=1):
                count += owner == str(source)
                ahead.append(count - share * position)
            assert max(map(abs, ahead)) <= 1 - d, weights  # less than one prompt
            assert max(ahead) - min(ahead) <= 2 - 2 * d, weights  # of all windows; two sources: 1


def test_a_mixture_is_a_function_of_seed_and_step_and_repeats_no_prompt_within_an_epoch() -> None:
    sources = [prompts(5), [Prompt(100 + i, (1,), "", "") for i in range(3)]]

    def mixture(seed: int) -> PromptStream:
        return PromptStream(*sources, weights=[2.0, 0.5], prompts_per_step=4, seed=seed)

    straight = [indices(mixture(3), step) for step in range(40)]
    assert [indices(mixture(3), step) for step in reversed(range(40))] == straight[::-1]
    assert [indices(mixture(4), step) for step in range(40)] != straight
    asked = [index for step in straight for index in step]
    first, second = ([i for i in asked if (i >= 100) == later] for later in (False, True))
    assert (len(first), len(second)) == (128, 32)
    for of_source, size in ((first, 5), (second, 3)):
        epochs = [of_source[i : i + size] for i in range(0, len(of_source) - size, size)]
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
        assert len({tuple(epoch) for epoch in epochs}) > 1
    alone = PromptStream(sources[0], prompts_per_step=5, seed=3)
    assert first[:5] == indices(alone, 0)  # the first source is asked as if it were alone
