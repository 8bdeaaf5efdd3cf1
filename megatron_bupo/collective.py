"""Work shared out over all ranks and gathered again, in order. One process: both are the
identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's contiguous share of `items`; every rank holds the same list."""
    if not dist.is_initialized():
        return items
    rank, world = dist.get_rank(), dist.get_world_size()
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def gather(mine: Sequence[T]) -> list[T]:
    """The shares of all ranks put together again, on every rank, in the order `share` dealt
    them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(mine)
    shares: list[Sequence[T]] = [()] * dist.get_world_size()
    dist.all_gather_object(shares, list(mine))
    return [item for part in shares for item in part]
