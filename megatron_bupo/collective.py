"""Work shared out over all ranks and gathered again, in order. One process: both are the
identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_bupo import progress

T = TypeVar("T")
WAIT_S = 5.0  # between two words of a first rank that has nothing to tell yet


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


def is_first() -> bool:
    """Is this the rank that speaks to the outside?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(begin: Callable[[], Future[T]]) -> T:
    """What the first rank's `begin()` comes to, on every rank; if it raises, every rank raises.

    However long it takes: ranks hear from the first one all the time, so no collective times out
    and no rank looks as if it stood still.
    """
    word: list[Any] = [None]
    future = begin() if is_first() else None
    while word[0] is None:
        if future is not None:
            word = [_word(future)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(word, src=0)
        progress.beat()
    kind, value = word[0]
    if kind == "error":
        raise value
    return value


def _word(future: Future[Any]) -> tuple[str, Any] | None:
    """What `future` has come to; None: nothing within `WAIT_S` seconds."""
    try:
        return "result", future.result(timeout=WAIT_S)
    except TimeoutError as error:
        return ("error", error) if future.done() else None
    except Exception as error:
        return "error", error
