from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_bupo.mcore.microbatches import cut, padded_length
from tests.mcore.actors import random_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [19, 22])
@pytest.mark.parametrize("count_multiple", [1, 4])
def test_every_response_token_comes_once_and_knows_where_it_is_predicted(
    size: int, length: int, count_multiple: int
):
    batch, rows = random_batch(responses=7), slice(2, 7)
    microbatches = list(
        cut(batch, rows, size=size, length=length, count_multiple=count_multiple, device=CPU)
    )
    assert len(microbatches) % count_multiple == 0
    seen = torch.zeros_like(batch.response_mask, dtype=torch.long)
    for microbatch in microbatches:
        assert microbatch.input_ids.shape == microbatch.position_ids.shape == (size, length)
        assert torch.equal(microbatch.position_ids[0], torch.arange(length))
        for row, at, target in zip(microbatch.rows, microbatch.at, microbatch.targets, strict=True):
            place, response = divmod(int(row), size)  # `[tokens, responses]`, as Megatron lays it
            i, t = divmod(int(at), batch.input_ids.shape[1])
            assert place == t - 1
            assert target == batch.input_ids[i, t] == microbatch.input_ids[response, t]
            assert torch.equal(microbatch.input_ids[response, : t + 1], batch.input_ids[i, : t + 1])
            seen[i, t] += 1
    expected = batch.response_mask.long()
    expected[:2] = 0
    assert torch.equal(seen, expected)


def test_a_replica_without_responses_still_makes_its_passes():
    batch = random_batch(responses=3)
    [empty] = cut(batch, slice(3, 3), size=2, length=19, count_multiple=1, device=CPU)
    assert len(empty.at) == len(empty.rows) == len(empty.targets) == 0
    assert len(list(cut(batch, slice(3, 3), size=2, length=19, count_multiple=4, device=CPU))) == 4


def test_lengths_round_up_to_what_sequence_parallelism_divides():
    batch = random_batch(tokens=19)
    assert [padded_length(batch, multiple=m) for m in (1, 2, 4, 19)] == [19, 20, 20, 19]


def test_a_response_without_a_prompt_is_refused():
    batch = random_batch()
    mask = batch.response_mask.clone()
    mask[0, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        list(
            cut(
                replace(batch, response_mask=mask),
                slice(0, 5),
                size=2,
                length=19,
                count_multiple=1,
                device=CPU,
            )
        )
