from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_bupo.mcore.microbatches import cut, deal, input_lengths
from megatron_bupo.mcore.packed import Split
from tests.mcore.actors import random_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("max_responses", [1, 2, None])
def test_every_response_token_comes_once_and_knows_where_it_is_predicted(
    ranks: int, cp: int, max_responses: int | None
):
    batch = random_batch(responses=7)
    lengths = input_lengths(batch)
    dealt = deal(lengths, ranks=ranks, max_tokens=40, max_responses=max_responses)
    seen = torch.zeros_like(batch.response_mask, dtype=torch.long)
    for rank in range(ranks):
        for cp_rank in range(cp):
            split = Split(cp=cp, rank=cp_rank)
            for made, responses in zip(
                cut(batch, dealt[rank], split=split, equal=False, device=CPU),
                dealt[rank],
                strict=True,
            ):
                assert made.input_ids.shape == (1, made.packed.tokens)
                for row, at, target in zip(made.rows, made.at, made.targets, strict=True):
                    i, t = divmod(int(at), batch.input_ids.shape[1])
                    assert i in responses
                    assert made.packed.positions[row] == t - 1
                    assert made.input_ids[0, row] == batch.input_ids[i, t - 1]
                    assert target == batch.input_ids[i, t]
                    seen[i, t] += 1
    assert torch.equal(seen, batch.response_mask.long())


def test_the_last_token_of_a_response_is_not_an_input():
    batch = random_batch(responses=7)
    for mask, length in zip(batch.response_mask, input_lengths(batch), strict=True):
        assert length == max([t for t in range(mask.numel()) if mask[t]], default=0)


LENGTHS = [700, 31, 30, 200, 0, 500, 499, 1, 2, 3, 120, 80, 64, 64, 64, 0, 333]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("max_responses", [None, 2])
def test_all_ranks_get_as_many_microbatches_within_the_limits(
    ranks: int, multiple: int, max_responses: int | None
):
    dealt = deal(
        LENGTHS, ranks=ranks, max_tokens=600, max_responses=max_responses, multiple=multiple
    )
    assert len({len(made) for made in dealt}) == 1
    assert len(dealt[0]) % multiple == 0
    everything = [i for made in dealt for responses in made for i in responses]
    assert sorted(everything) == [i for i, n in enumerate(LENGTHS) if n]
    for made in dealt:
        for responses in made:
            sizes = [LENGTHS[i] for i in responses]
            assert sizes == sorted(sizes, reverse=True)
            assert sum(sizes) <= 600 or len(sizes) == 1
            assert max_responses is None or len(sizes) <= max_responses


def test_tokens_are_balanced_over_ranks_and_microbatches():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 2000, (256,), generator=generator).tolist()
    dealt = deal(lengths, ranks=4, max_tokens=16384)
    loads = [[sum(lengths[i] for i in responses) for responses in made] for made in dealt]
    every = [load for made in loads for load in made]
    assert len(dealt[0]) <= sum(lengths) // (4 * 16384) + 2
    assert max(every) < 1.02 * min(every)
    per_rank = [sum(made) for made in loads]
    assert max(per_rank) < 1.005 * min(per_rank)


def test_a_replica_without_responses_still_makes_its_passes():
    batch = random_batch(responses=3)
    dealt = deal(input_lengths(batch), ranks=4, max_tokens=1000, at_least=2)
    assert [len(made) for made in dealt] == [2, 2, 2, 2]
    [rank] = [made for made in dealt if not any(made)][:1]
    for empty in cut(batch, rank, split=Split(multiple=2), equal=True, device=CPU):
        assert len(empty.at) == len(empty.rows) == len(empty.targets) == 0
        assert empty.packed.tokens == 2


def test_rows_of_a_pipeline_are_equally_long():
    batch = random_batch(responses=7)
    dealt = deal(input_lengths(batch), ranks=1, max_tokens=30)
    rows = cut(batch, dealt[0], split=Split(multiple=4), equal=True, device=CPU)
    assert len({row.packed.tokens for row in rows}) == 1
    assert rows[0].packed.tokens % 4 == 0


def test_a_response_without_a_prompt_is_refused():
    batch = random_batch()
    mask = batch.response_mask.clone()
    mask[0, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        input_lengths(replace(batch, response_mask=mask))
