"""Responses cut into micro-batches of one shape, as the pipeline schedules want them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bupo.types import TokenBatch


@dataclass(frozen=True)
class Microbatch:
    """One forward pass. A response token t is predicted at position t - 1: that is its row of
    hidden states.
    """

    input_ids: Tensor  # [responses, tokens]
    position_ids: Tensor  # [responses, tokens]
    # all [response tokens]:
    rows: Tensor  # flat indices into [tokens, responses]: where they are predicted
    at: Tensor  # flat indices into the batch's [responses, tokens]: where they stand
    targets: Tensor  # their ids


def _rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded_length(batch: TokenBatch, *, multiple: int) -> int:
    """Tokens per response: the longest one's, rounded up to `multiple` (sequence parallelism
    cuts evenly).
    """
    return _rounded_up(batch.input_ids.shape[1], multiple)


def cut(
    batch: TokenBatch,
    rows: slice,
    *,
    size: int,
    length: int,
    count_multiple: int,
    device: torch.device,
) -> Iterator[Microbatch]:
    """Micro-batches of `size` responses by `length` tokens that cover `rows` of `batch`.

    The last one is filled up with empty responses, and empty ones follow until their number is a
    multiple of `count_multiple` (what an interleaved pipeline needs): they cost time and change no
    number.
    """
    first, stop, width = rows.start, rows.stop, batch.input_ids.shape[1]
    count = _rounded_up(max(1, -(-(stop - first) // size)), count_multiple)
    position_ids = torch.arange(length, device=device).expand(size, length)
    for start in range(first, first + count * size, size):
        have = slice(min(start, stop), min(start + size, stop))
        missing = size - (have.stop - have.start)
        pad = (0, length - width, 0, missing)
        ids = F.pad(batch.input_ids[have], pad).to(device)
        mask = F.pad(batch.response_mask[have], pad)
        if bool(mask[:, 0].any()):
            raise ValueError("a response token at position 0 has nothing to be predicted from")
        response, token = mask.nonzero(as_tuple=True)
        yield Microbatch(
            input_ids=ids,
            position_ids=position_ids,
            rows=((token - 1) * size + response).to(device),
            at=((start + response) * width + token).to(device),
            targets=ids[response.to(device), token.to(device)],
        )
