"""Megatron's DDP, made to exchange nothing for layers that the step's policy does not train.

Above an internal policy's target every rank's gradients are zero and parameters stay as they are:
to sum the first over data-parallel ranks, and gather the second, is traffic for nothing. Megatron
exchanges bucket by bucket, so buckets without a trained parameter are left out.
`megatron.bucket_size` says how many parameters make a bucket; pipeline stages after the first have
one bucket per model chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn


class PhasedDDP(DistributedDataParallel):
    """A model chunk with its gradient buffers."""

    bucket_groups: list[Any]

    def __init__(
        self, native: Any, ddp_config: DistributedDataParallelConfig, chunk: nn.Module
    ) -> None:
        # Megatron makes buckets only where it overlaps their exchange with the backward pass, and a
        # bucket partly above the target would wait for ever. So: its buckets without its overlap.
        ddp_config.overlap_grad_reduce = True
        super().__init__(native, ddp_config, chunk)
        ddp_config.overlap_grad_reduce = False

    @contextmanager
    def exchanging_only(self, trained: Set[nn.Parameter]) -> Iterator[None]:
        """Inside the block, collectives leave out buckets without `trained` parameters."""
        every = self.bucket_groups
        self.bucket_groups = [group for group in every if not trained.isdisjoint(group.params)]
        try:
            yield
        finally:
            self.bucket_groups = every
