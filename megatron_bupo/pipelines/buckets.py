"""Somebody's DDP, made to exchange nothing for layers that the phase does not train.

Megatron exchanges gradients bucket by bucket, and parameters before the layer that needs them.
Where that overlaps with the passes it waits for the gradient of every parameter and for the forward
pass of every layer, and a phase that skips layers would trip its assertions. So each group of
buckets waits for the parameters that the phase trains, and a group without any stays at rest.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import nn

from megatron_bupo.errors import InputError


class _RestingBuckets(_ParamAndGradBucketGroup):
    """Buckets that are exchanged together; `params`, which Megatron waits for, are the trained
    ones.
    """

    def train_only(self, trained: Set[nn.Parameter]) -> None:
        params = set(trained & self.param_to_bucket.keys())
        if params == self.params:
            return
        self.params = params
        # In what Megatron calls the first batch it learns how often each gradient comes, and
        # starts the exchange after the backward pass.
        self.is_first_batch, self.per_param_grad_ready_counts = True, {}
        if self.param_gather_handle is not None:  # begun for a layer that did not run
            self.param_gather_handle.wait()
            self.param_gather_handle = None

    def register_grad_ready(self, param: nn.Parameter, *args: Any, **kwargs: Any) -> None:
        if param in self.params:
            super().register_grad_ready(param, *args, **kwargs)

    def start_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        if self.params:
            super().start_grad_sync(*args, **kwargs)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        if self.params:
            super().finish_grad_sync(*args, **kwargs)

    def start_param_sync(self, force_sync: bool = False) -> None:
        at_rest = not self.params and self.param_gather_dispatched
        if force_sync or not at_rest:
            super().start_param_sync(force_sync=force_sync)

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        following = self.next_param_gather_bucket_group
        gathered = following is not None and following.param_gather_dispatched
        super().finish_param_sync(skip_next_bucket_dispatch or gathered)


def _groups(ddp: Any) -> list[Any]:
    return [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups]


def train_only(ddp: DistributedDataParallel, trained: Set[nn.Parameter]) -> None:
    """From now on, exchange for the sake of `trained` alone; between two steps, on every rank."""
    if getattr(ddp, "overlap_param_gather_with_optimizer_step", False):
        reason = "gathers parameters of layers that do not run"
        where = "overlap_param_gather_with_optimizer_step=True"
        raise InputError(where, reason, "set it to False")
    for group in _groups(ddp):
        if type(group) is _ParamAndGradBucketGroup and not group.params <= trained:
            group.__class__ = _RestingBuckets
        if type(group) is _RestingBuckets:
            group.train_only(trained)


def gather(ddp: Any, parameters: Set[nn.Parameter]) -> None:
    """Wait for `parameters` that overlap with the forward pass, and whose own module may not be
    called, or only after a bucket-mate that is skipped.
    """
    if ddp.ddp_config.overlap_param_gather:
        for group in {
            ddp.param_to_bucket_group[p] for p in parameters if p in ddp.param_to_bucket_group
        }:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def release(ddp: Any) -> None:
    """Give the buckets of `ddp` back as they were."""
    for group in _groups(ddp):
        if type(group) is _RestingBuckets:
            group.train_only(group.param_to_bucket.keys())
            group.__class__ = _ParamAndGradBucketGroup  # type: ignore[assignment]
