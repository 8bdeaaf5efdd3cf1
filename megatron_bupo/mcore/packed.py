"""Sequences laid end to end in one row of tokens; nothing but attention knows where one ends.

Context parallelism gives each rank two pieces of every sequence: of `2 * cp` equal chunks rank r
holds the r-th from the front and the r-th from the back, so that all ranks look back at as many
keys. Sequences are then padded to whole chunks. A row may end in tokens that belong to no
sequence, where the pipeline or sequence parallelism asks for a length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How a row is cut over the context-parallel ranks, of which this is `rank`."""

    cp: int = 1
    rank: int = 0
    multiple: int = 1  # what each rank's tokens must divide into, for sequence parallelism

    @property
    def chunks(self) -> int:
        """Equal pieces of a sequence."""
        return 2 * self.cp if self.cp > 1 else 1

    def padded(self, length: int) -> int:
        """The length of a sequence in whole chunks."""
        return -(-length // self.chunks) * self.chunks

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of each rank's row that holds sequences of `lengths`; at least one."""
        held = sum(map(self.padded, lengths)) // self.cp
        # Transformer Engine cuts the tokens at the end in chunks, too.
        multiple = self.multiple if self.cp == 1 else self.multiple * (1 + self.multiple % 2)
        return -(-max(held, 1) // multiple) * multiple

    def locate(self, position: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """The rank that holds `position` of a sequence, and its place among that rank's tokens of
        that sequence.
        """
        size = padded // self.chunks
        chunk = position // size
        from_back = chunk >= self.cp
        owner = torch.where(from_back, 2 * self.cp - 1 - chunk, chunk)
        return owner, position - chunk * size + torch.where(from_back, size, 0)


@dataclass(frozen=True)
class Rectangle:
    """Neighbouring sequences of like length as a batch, for kernels that know no packing.

    Beyond a sequence's end the indices say 0: tokens that nobody looks back at, and results that
    nobody reads.
    """

    queries: Tensor  # [sequences, tokens]: this rank's, as places in its row
    keys: Tensor  # [sequences, keys]: all ranks', as places in their rows laid end to end
    mask: Tensor | None  # [sequences, 1, tokens, keys]: who sees whom; None: causal


@dataclass
class PackedRow(PackedSeqParams):
    """One rank's part of a packed row, as Megatron hands it through to every layer's attention."""

    lengths: tuple[int, ...] = ()  # of the sequences, padded, over all context-parallel ranks
    tokens: int = 0  # on this rank
    positions: Tensor = field(default_factory=lambda: torch.empty(0))  # [tokens], in its sequence
    rectangles: tuple[Rectangle, ...] = ()
    read: Tensor = field(default_factory=lambda: torch.empty(0))  # [tokens of sequences], in the
    # rectangles' queries, flattened and laid end to end


class Packing:
    """Where every token of sequences of `lengths`, longest first, goes in rows of `tokens`."""

    def __init__(self, lengths: Sequence[int], tokens: int, split: Split) -> None:
        self.split, self.tokens = split, tokens
        self.lengths = [split.padded(length) for length in lengths]
        assert self.lengths == sorted(self.lengths, reverse=True), "longest first"
        assert sum(self.lengths) <= tokens * split.cp, "the row is too short"
        padded = torch.tensor(self.lengths, dtype=torch.long)
        self.begins = padded.cumsum(0) - padded
        of = torch.repeat_interleave(padded, padded)
        begin = torch.repeat_interleave(self.begins, padded)
        self.position = torch.arange(len(of)) - begin
        owner, place = split.locate(self.position, of)
        # [tokens of all sequences] -> rank * tokens + place in its row
        self.place = owner * tokens + begin // split.cp + place

    def scatter(self, values: Tensor) -> Tensor:
        """This rank's row `[tokens]` of `values` of all sequences' tokens; 0 elsewhere."""
        rows = values.new_zeros(self.split.cp * self.tokens)
        rows[self.place] = values
        return rows[self.split.rank * self.tokens :][: self.tokens]

    def locate(self, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Is that token on this rank, and its place in the row."""
        place = self.place[self.begins[sequence] + position] - self.split.rank * self.tokens
        return (place >= 0) & (place < self.tokens), place

    def row(self, device: torch.device) -> PackedRow:
        """What attention needs to know."""
        rectangles, read, first = [], [], 0
        for group in _of_like_length(self.lengths):
            sizes = torch.tensor(self.lengths[group])
            rectangle = self._rectangle(self.begins[group], sizes)
            inside = torch.arange(rectangle.queries.shape[1]) < sizes[:, None] // self.split.cp
            read.append(first + inside.flatten().nonzero().flatten())
            first += inside.numel()
            rectangles.append(
                Rectangle(
                    rectangle.queries.to(device),
                    rectangle.keys.to(device),
                    None if rectangle.mask is None else rectangle.mask.to(device),
                )
            )
        return PackedRow(
            lengths=tuple(self.lengths),
            tokens=self.tokens,
            positions=self.scatter(self.position).to(device),
            rectangles=tuple(rectangles),
            read=torch.cat(read or [torch.empty(0, dtype=torch.long)]).to(device),
        )

    def _rectangle(self, begins: Tensor, sizes: Tensor) -> Rectangle:
        cp, longest = self.split.cp, int(sizes.max())
        at = torch.arange(longest)
        keys = torch.where(at < sizes[:, None], begins[:, None] + at, 0)
        own = torch.arange(longest // cp)
        queries = torch.where(own < sizes[:, None] // cp, begins[:, None] // cp + own, 0)
        mask = None
        if cp > 1:
            mask = (at <= self.scatter(self.position)[queries][:, :, None]).unsqueeze(1)
        return Rectangle(queries, self.place[keys], mask)


def _of_like_length(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbours of which none is less than half as long as the first."""
    cuts, first = [0], 0
    for i, length in enumerate(lengths):
        if 2 * length < lengths[first]:
            cuts.append(i)
            first = i
    for start, stop in pairwise([*cuts, len(lengths)]):
        if stop > start:
            yield slice(start, stop)
