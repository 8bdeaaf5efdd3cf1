from __future__ import annotations

import random

import pytest
import torch

from megatron_bupo.data.packing import in_rounds, pack
from megatron_bupo.types import Prompt, Rollout, RolloutGroup


def some_groups(prompts: int, responses: int, seed: int = 0) -> list[RolloutGroup]:
    dice = random.Random(seed)
    groups = []
    for index in range(prompts):
        prompt = Prompt(index, tuple(dice.choices(range(50), k=dice.randint(1, 6))), "", "")
        lengths = [dice.randint(0, 7) for _ in range(responses)]
        rollouts = tuple(
            Rollout(
                prompt,
                tuple(dice.choices(range(50), k=length)),
                "",
                tuple(-dice.random() for _ in range(length)),
                (0.5,) * length,
                "stop",
                0,
            )
            for length in lengths
        )
        groups.append(RolloutGroup(prompt, rollouts))
    return groups


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_a_loop_over_responses_and_tokens(seed: int) -> None:
    groups = some_groups(4, 3, seed)
    advantages = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    batch = pack(groups, pad_id=99).with_advantages(advantages)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    width = max(len(r.prompt.input_ids) + len(r.response_ids) for r in rollouts)
    assert batch.input_ids.tolist() == [
        list(r.prompt.input_ids + r.response_ids)
        + [99] * (width - len(r.prompt.input_ids) - len(r.response_ids))
        for r in rollouts
    ]
    for i, rollout in enumerate(rollouts):
        begin = len(rollout.prompt.input_ids)
        for t in range(width):
            place = t - begin
            response = 0 <= place < len(rollout.response_ids)
            assert batch.response_mask[i, t] == response
            logprob = torch.tensor(rollout.rollout_logprobs[place] if response else 0.0)
            assert batch.rollout_logprobs[i, t] == logprob
            assert batch.advantages[i, t] == (advantages[i // 3, i % 3] if response else 0.0)


def test_the_tensors_have_the_types_that_the_actor_expects() -> None:
    advantages = torch.ones(2, 2, dtype=torch.float64)
    batch = pack(some_groups(2, 2), pad_id=0).with_advantages(advantages)
    assert batch.input_ids.dtype == torch.int64
    assert batch.response_mask.dtype == torch.bool
    assert batch.advantages is not None
    assert batch.rollout_logprobs.dtype == batch.advantages.dtype == torch.float32
    assert batch.old_logprobs is batch.ref_logprobs is None
    assert batch.response_tokens == sum(
        len(r.response_ids) for g in some_groups(2, 2) for r in g.rollouts
    )


def test_advantages_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="3 advantages for 4 responses"):
        pack(some_groups(2, 2), pad_id=0).with_advantages(torch.ones(3))


@pytest.mark.parametrize("first", [0, 2, 5])
@pytest.mark.parametrize("most", [1, 7, 10, 100])
def test_rounds_take_all_responses_in_order_and_as_many_as_fit(most: int, first: int):
    lengths = [3, 4, 3, 12, 1, 1, 9, 2]
    rounds = list(in_rounds(lengths, most, first=first))
    assert [i for some in rounds for i in range(some.start, some.stop)] == [*range(first, 8)]
    for some in rounds:
        assert sum(lengths[some]) <= most or some.stop == some.start + 1
        assert some.stop == 8 or sum(lengths[some.start : some.stop + 1]) > most
