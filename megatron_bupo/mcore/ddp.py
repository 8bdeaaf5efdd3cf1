"""Megatron's DDP, made to exchange nothing for layers that the step's policy does not train.

Above an internal policy's target every rank's gradients are zero and parameters stay as they are:
to sum the first over data-parallel ranks, and gather the second, is traffic for nothing. Megatron
exchanges bucket by bucket, so a bucket without a trained parameter is left out, and one with some
waits for those alone where the exchange overlaps with the passes
(`megatron.overlap_grad_reduce`, `megatron.overlap_param_gather`).

So that the exchange stops at the target on every pipeline stage, a bucket is a whole number of
layers: as few as hold `megatron.bucket_size` parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

PARAMETER_ALIGNMENT = 64  # elements: where the distributed optimizer lets a parameter begin


class _PhasedBucketGroup(_ParamAndGradBucketGroup):
    """Buckets that are exchanged together. `params`, which Megatron waits for, are the trained
    ones.
    """

    written = False  # may gradients be other than zero?
    stepping = False  # is the optimizer at work?

    def train_only(self, trained: Set[nn.Parameter]) -> None:
        """From the next reset on, exchange for the sake of `trained` alone."""
        params = set(trained & self.param_to_bucket.keys())
        if params != self.params:
            self.params = params
            # In what Megatron calls the first batch it learns how often each gradient comes, and
            # starts the exchange after the backward pass.
            self.is_first_batch = True
            self.per_param_grad_ready_counts = {}

    def register_grad_ready(self, param: nn.Parameter, *args: Any, **kwargs: Any) -> None:
        if param in self.params:
            super().register_grad_ready(param, *args, **kwargs)

    def start_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        if self.params:
            self.written = True
            super().start_grad_sync(*args, **kwargs)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        if self.params:
            super().finish_grad_sync(*args, **kwargs)

    def start_param_sync(self, force_sync: bool = False) -> None:
        stale = not self.param_gather_dispatched and not self.stepping
        under_way = self.param_gather_handle is not None
        if stale or (force_sync and under_way):
            super().start_param_sync(force_sync=force_sync)

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        following = self.next_param_gather_bucket_group
        gathered = following is not None and following.param_gather_dispatched
        super().finish_param_sync(skip_next_bucket_dispatch or gathered)

    def zero_gradients(self) -> None:
        """Zero what may have been written since the last time."""
        if self.written:
            for bucket in self.buckets:
                bucket.grad_data.zero_()
            self.written = False
        self.reset()


class PhasedDDP(DistributedDataParallel):
    """A model chunk with its gradient buffers."""

    def __init__(
        self, native: TransformerConfig, ddp_config: DistributedDataParallelConfig, chunk: nn.Module
    ) -> None:
        gpt: Any = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
        # Parameters are laid out in the order of registration. With the unembedding, which every
        # policy trains, before the layers, it shares no bucket with the uppermost of them.
        gpt._modules["decoder"] = gpt._modules.pop("decoder")
        # Megatron makes buckets only where it overlaps their exchange with the backward pass.
        overlapped, ddp_config.overlap_grad_reduce = ddp_config.overlap_grad_reduce, True
        super().__init__(native, ddp_config, chunk)
        ddp_config.overlap_grad_reduce = overlapped
        for group in self._groups:
            group.__class__ = _PhasedBucketGroup
            group.param_gather_dispatched = True  # no rank has stepped: all hold the same weights
        for buffer in self._gradient_buffers:
            _count_padding_between(buffer)
        unembedding = gpt.output_layer.parameters() if gpt.post_process else ()
        self._read_out = {self.param_to_bucket_group[p] for p in unembedding}

    @property
    def _groups(self) -> list[Any]:
        return [*self.bucket_groups, *self.expert_parallel_bucket_groups]

    @property
    def _gradient_buffers(self) -> list[Any]:
        return [*cast("list[Any]", self.buffers), *self.expert_parallel_buffers]

    @property
    def bucket_size(self) -> int:
        """Parameters that fill a bucket."""
        return self._bucket_size

    @bucket_size.setter
    def bucket_size(self, least: int | None) -> None:
        if least is not None:  # None from Megatron on stages after the first: one bucket for all
            distributed = self.ddp_config.use_distributed_optimizer
            alignment = PARAMETER_ALIGNMENT if distributed else 1
            self._bucket_size = _whole_layers(self.module, least, alignment=alignment)

    def train_only(self, trained: Set[nn.Parameter]) -> None:
        """From the next `zero_grad_buffer` on, collectives leave out buckets without `trained`
        parameters.
        """
        for group in self._groups:
            group.train_only(trained)

    def zero_grad_buffer(self) -> None:
        """Make gradients ready to add to; those that nothing was added to are zero already."""
        parameters: list[Any] = self.params_with_grad
        for param in parameters:
            param.grad_added_to_main_grad = False
        for group in self._groups:
            group.zero_gradients()
        for buffer in self._gradient_buffers:
            extra: list[Tensor] = getattr(buffer, "extra_main_grads", [])  # since 0.18
            for gradient in extra:
                gradient.zero_()

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        accumulate = super()._make_backward_post_hook(param)
        group = self.param_to_bucket_group[param]

        def hook(*unused: Any) -> None:
            group.written = True
            accumulate(*unused)

        return hook

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The chunk's output, and the unembedding gathered, which is read without a call of its
        module, on which Megatron's gathering hangs.
        """
        gathered = self._read_out if self.ddp_config.overlap_param_gather else ()
        for group in gathered:
            group.start_param_sync()
        output = super().forward(*args, **kwargs)
        for group in gathered:
            group.finish_param_sync(skip_next_bucket_dispatch=True)
        return output

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around a step of the optimizer: parameters are gathered once at its end, not after the
        step of each of Megatron's optimizers, of which experts have one of their own.
        """
        for group in self._groups:
            group.stepping = True
        try:
            yield
        finally:
            for group in self._groups:
                group.stepping = False
        config = self.ddp_config
        if config.use_distributed_optimizer and not config.overlap_param_gather:
            self.start_param_sync()

    def gather_parameters(self) -> None:
        """Bring this rank's parameters up to date: overlapped, they are gathered by the forward
        pass that needs them. Collective.
        """
        if self.ddp_config.overlap_param_gather:
            with torch.no_grad():
                self.start_param_sync(force_sync=True)


def overlap(native: TransformerConfig, chunks: Sequence[PhasedDDP]) -> None:
    """Tell the pipeline schedule when to exchange, where that is asked for: as Megatron-LM does."""

    def each(functions: list[Callable[..., Any]]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    config = chunks[0].ddp_config
    if config.overlap_grad_reduce:
        native.no_sync_func = each([chunk.no_sync for chunk in chunks])
        native.grad_sync_func = each([chunk.start_grad_sync for chunk in chunks])
    if config.overlap_param_gather and config.align_param_gather:
        native.param_sync_func = each([chunk.start_param_sync for chunk in chunks])


def _count_padding_between(buffer: Any) -> None:
    """Let a checkpoint of the distributed optimizer hold the padding between buckets.

    Megatron's lays the buckets end to end without it, and then looks parameters up where they are
    with it: in all buckets but the first, states would be another parameter's.
    """
    for bucket in buffer.buckets[:-1]:
        bucket.numel_unpadded = bucket.grad_data.numel()
    buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def _whole_layers(chunk: nn.Module, least: int, *, alignment: int) -> int:
    """The elements of a bucket with as few layers as hold `least`.

    Megatron fills a bucket parameter by parameter, from the last one of the chunk on, until it
    holds what this returns: it is full with the first parameter of a layer.
    """
    decoder: Any = get_attr_wrapped_model(chunk, "decoder")
    extents = []
    for layer in decoder.layers:
        sizes = [p.numel() for p in layer.parameters() if getattr(p, "allreduce", True)]
        padded = [-(-size // alignment) * alignment for size in sizes]
        extents.append((sum(padded), padded[0] - sizes[0]))
    if not extents:
        return least
    extent, padding = max(extents)
    return -(-least // extent) * extent - padding
