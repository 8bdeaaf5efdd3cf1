"""What does one step of a policy cost this rank? Time, memory and traffic, all of it measured.

Times are of the slowest rank. Traffic is counted where tensors are handed to a collective over
data-parallel ranks, and parameters where the inner optimizer steps them. Memory is the peak of what
is allocated in an update's forward and backward passes beyond what was there before: on a GPU the
allocator tells, on a CPU the profiler adds up every allocation and release.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.mcore import model
from megatron_bupo.mcore.logprobs import chunked_logprobs
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.types import TokenBatch

ENDS = ("embedding", "unembedding", "tied unembedding")  # the units that every policy trains
OF_ALL_RANKS = (
    "work_ms unembedding_work_ms all_peaks_bytes reduced_bytes ends_reduced_bytes gathered_bytes "
    "ends_gathered_bytes stepped_parameters ends_stepped_parameters"
).split()


class PhaseCost:
    """A trainer under watch."""

    def __init__(self, trainer: MegatronTrainer, batch: TokenBatch) -> None:
        self.trainer, self.batch = trainer, batch
        self.within: defaultdict[str, float] = defaultdict(float)  # parts, added up
        self._watch_times()
        self._watch_traffic()

    def of(self, policy: Policy) -> dict[str, float]:
        """What a step of `policy` costs, over all ranks. Collective."""
        trainer, within = self.trainer, self.within
        start = together_ms()
        old, _ = trainer.logprobs(self.batch, policy, with_entropy=False)
        scored = together_ms()
        within.clear()
        trainer.update(self.batch.with_old_logprobs(old), policy, lr=1e-6)
        updated = together_ms()
        parts = dict(within)
        sent = dict(trainer.changed_weights(policy))
        synced = together_ms()
        return over_ranks(
            dict.fromkeys(OF_ALL_RANKS, 0.0)
            | parts
            | self._unembedding()
            | self._ends()
            | {
                "old_logprobs_ms": scored - start,
                "beside_step_ms": parts["optimizer_ms"] - parts["inner_step_ms"],
                "forward_backward_ms": updated - scored - parts["optimizer_ms"],
                "update_ms": updated - scored,
                "sync_ms": synced - updated,
                "synced_bytes": sum(tensor.nbytes for tensor in sent.values()),
            }
        )

    def peak_bytes(self, policy: Policy) -> dict[str, float]:
        """The peak of an update's passes, and of the unembedding's part of a micro-batch."""
        trainer: Any = self.trainer
        run, peaks = trainer._run, {}
        old, _ = trainer.logprobs(self.batch, policy)

        def looking(*args: Any, **kwargs: Any) -> Any:
            result, peaks["peak_bytes"] = peak_of(lambda: run(*args, **kwargs))
            return result

        trainer._run = looking
        trainer.update(self.batch.with_old_logprobs(old), policy, lr=1e-6)
        trainer._run = run
        size = trainer.config.trainer.microbatch_size
        _, peaks["unembedding_peak_bytes"] = peak_of(lambda: self._read_out(slice(size)))
        return over_ranks(peaks | {"all_peaks_bytes": peaks["peak_bytes"]})

    def _watch_times(self) -> None:
        trainer: Any = self.trainer
        optimizer, native = trainer.optimizer, trainer.native
        optimizer.step = self._timed("optimizer_ms", optimizer.step)
        for inner in optimizer._unit_of:
            inner.step = self._timed("inner_step_ms", inner.step)
            inner.register_step_pre_hook(self._count_stepped)
        native.finalize_model_grads_func = self._timed(
            "reduce_grads_ms", native.finalize_model_grads_func
        )
        for chunk in trainer.wrapped:
            chunk.zero_grad_buffer = self._timed("zero_grads_ms", chunk.zero_grad_buffer)
        for name in ("forward_step", "backward_step"):
            setattr(schedules, name, self._timed("work_ms", getattr(schedules, name)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now_ms()
            result = function(*args, **kwargs)
            self.within[name] += now_ms() - start
            return result

        return call

    def _count_stepped(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        units = self.trainer.optimizer._unit_of[inner]
        for group in inner.param_groups:
            for p in group["params"]:
                stepped = 0 if p.grad is None else p.numel()
                self.within["stepped_parameters"] += stepped
                self.within["ends_stepped_parameters"] += stepped * (units[p] in ENDS)

    def _watch_traffic(self) -> None:
        groups = [group for chunk in self.trainer.wrapped for group in chunk._groups]
        replicas = {
            getattr(group, "intra_distributed_optimizer_instance_group", None)
            or group.data_parallel_group
            for group in groups
        }

        def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
            def call(out: Tensor, *args: Any, **kwargs: Any) -> Any:
                if kwargs.get("group") in replicas and kwargs["group"].size() > 1:
                    whole = args[0] if name == "reduced_bytes" and args else out
                    self.within[name] += whole.nbytes
                return collective(out, *args, **kwargs)

            return call

        buffers: Any = param_and_grad_buffer
        dist.all_reduce = counted("reduced_bytes", dist.all_reduce)
        scatter, gather = buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func
        buffers.dist_reduce_scatter_func = counted("reduced_bytes", scatter)
        buffers.dist_all_gather_func = counted("gathered_bytes", gather)

    def _unembedding(self) -> dict[str, float]:
        """Log-probs of this rank's responses, and back, from given hidden states."""
        start = now_ms()
        self._read_out(slice(None), learn=False)
        scored = now_ms()
        self._read_out(slice(None))
        both = now_ms() - scored
        return {
            "unembedding_forward_ms": scored - start,
            "unembedding_ms": both,
            "unembedding_work_ms": both,
        }

    def _read_out(self, responses: slice, *, learn: bool = True) -> None:
        chunk = model.last_chunk(self.trainer.gpt_chunks)
        if chunk is None:
            return
        weight, replicas = model.unembedding(chunk), self.trainer.wrapped[0].dp_group.size()
        mine = self.batch.rows(slice(len(self.batch) // replicas)).rows(responses)
        targets = mine.input_ids[mine.response_mask].to(weight.device)
        hidden = torch.zeros(
            len(targets), weight.shape[1], dtype=weight.dtype, device=weight.device
        )
        with torch.set_grad_enabled(learn):
            logprobs, _ = chunked_logprobs(
                hidden.requires_grad_(), weight, targets, shard=self.trainer.shard
            )
        if learn:
            torch.autograd.grad(logprobs.sum(), [hidden, weight])

    def _ends(self) -> dict[str, float]:
        """What embedding and unembedding alone take of a step's traffic."""
        weights: Any = self.trainer.weights
        start = together_ms()
        sent = dict(weights.tensors([unit for unit in weights.owner if unit in ENDS[:2]]))
        sync_ms = together_ms() - start
        held = [part.parameter for unit in ENDS for part in weights.held.get(unit, ())]
        return {
            "ends_sync_ms": sync_ms,
            "ends_synced_bytes": sum(tensor.nbytes for tensor in sent.values()),
            "ends_reduced_bytes": sum(p.main_grad.nbytes for p in held),
            "ends_gathered_bytes": sum(p.nbytes for p in held),
        }


def over_ranks(cost: dict[str, float]) -> dict[str, float]:
    """The sum over ranks of what they share, and the largest of anything else. Collective."""
    values = torch.tensor(list(cost.values()), dtype=torch.float64)
    largest, total = values.clone(), values
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {
        name: float(total[i] if name in OF_ALL_RANKS else largest[i]) for i, name in enumerate(cost)
    }


def peak_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, and the peak of the bytes that it allocates."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every start and stop is told
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return result, peak


def together_ms() -> float:
    """The time when all ranks have come here."""
    dist.barrier()
    return now_ms()


def now_ms() -> float:
    """The time when all that was asked of the device is done."""
    torch.cuda.synchronize()
    return 1000 * time.perf_counter()
