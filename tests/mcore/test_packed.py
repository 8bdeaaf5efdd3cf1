from __future__ import annotations

import pytest
import torch

from megatron_bupo.mcore.packed import Packing, Split

CPU = torch.device("cpu")


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[13, 12, 7, 3, 1], [5], [], [4, 4, 4]])
def test_every_token_has_one_place_and_ranks_look_back_at_as_many(cp: int, lengths: list[int]):
    splits = [Split(cp=cp, rank=rank) for rank in range(cp)]
    tokens = splits[0].tokens(lengths) + 2
    seen, looks = [], []
    for split in splits:
        packing = Packing(lengths, tokens, split)
        ids = torch.arange(1, len(packing.place) + 1)
        row, held = packing.row(CPU), packing.scatter(ids)
        seen += [int(i) for i in held if i]
        looks.append(int((row.positions + 1)[held > 0].sum()))
        for sequence, length in enumerate(lengths):
            for position in range(length):
                here, place = packing.locate(torch.tensor(sequence), torch.tensor(position))
                if here:
                    assert row.positions[place] == position
                    assert held[place] == 1 + sum(packing.lengths[:sequence]) + position
        own = torch.cat([held[r.queries].flatten() for r in row.rectangles] or [held[:0]])
        assert torch.equal(own[row.read], held[held > 0])
        assert all(padded % (2 * cp if cp > 1 else 1) == 0 for padded in row.lengths)
    assert sorted(seen) == list(range(1, len(seen) + 1))
    assert len(seen) >= sum(lengths)
    assert len(set(looks)) == 1


def test_rectangles_waste_less_than_half():
    packing = Packing([64, 40, 32, 31, 16, 15, 3, 1], 400, Split())
    for rectangle in packing.row(CPU).rectangles:
        lengths = [1 + len(set(row.tolist()) - {0, int(row[0])}) for row in rectangle.keys]
        assert min(lengths) * 2 >= rectangle.keys.shape[1]


@pytest.mark.parametrize(
    ("cp", "multiple", "tokens"), [(1, 1, 9), (1, 4, 12), (2, 1, 6), (2, 3, 6)]
)
def test_rows_are_as_long_as_sequence_parallelism_and_chunks_ask(
    cp: int, multiple: int, tokens: int
):
    assert Split(cp=cp, multiple=multiple).tokens([5, 4]) == tokens
