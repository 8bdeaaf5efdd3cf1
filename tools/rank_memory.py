"""What does a rank hold, counted while it trains an update?

Tensors are added up storage by storage, an update's allocations by torch's profiler, and what the
process has in memory is the operating system's word.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.config import Config
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.phase_actor import plan_actor
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.types import TokenBatch
from tools.phase_cost import peak_of

CATEGORIES = ("weights", "gradients", "optimizer", "passes")
PROCESS = "process"  # all of them: by how much the resident set has grown
RESPONSES, PROMPT, RESPONSE = 8, 64, 192  # tokens of each, all of full length
M_MMAP_THRESHOLD, MAPPED = -3, 2**16  # glibc: larger blocks go back to the system when freed


def measure(config: Config, out: Path) -> None:
    """On each rank: train an update; the largest of each stage's ranks go to `out`."""
    policy = next((InternalLayerPolicy(n) for n, _ in config.bupo.phases()), FULL)
    arch = read_architecture(config.model.path)
    plan = plan_actor(policy, arch, config, parallel_sizes(config, None).world)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)
    with parallel.joined(plan.layout, seed=0):
        before = resident_bytes("VmRSS")
        trainer, batch = plan.build(), random_batch(arch.vocab_size)

        def update() -> None:
            old, _ = trainer.logprobs(batch, policy)
            trainer.update(batch.with_old_logprobs(old), policy, lr=1e-6)

        update()  # what stays is made
        grown = resident_bytes("VmHWM") - before
        mine = held_bytes(trainer) | {"passes": peak_of_passes(trainer, update), PROCESS: grown}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            stages = [
                [everyone[r] for r in plan.layout.stage_ranks(s)] for s in range(plan.layout.pp)
            ]
            names = (*CATEGORIES, PROCESS)
            worst = [{c: max(rank[c] for rank in ranks) for c in names} for ranks in stages]
            out.write_text(json.dumps(worst))


def peak_of_passes(trainer: MegatronTrainer, update: Callable[[], None]) -> float:
    """What forward and backward passes of an update allocate at most: the least of five updates,
    for threads of gloo's let go of what they have sent whenever they get to it.
    """
    run: Any = trainer._run
    peaks: list[float] = []
    of_updates = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        result, peak = peak_of(lambda: run(*args, **kwargs))
        peaks.append(peak)
        return result

    trainer._run = counted  # type: ignore[method-assign]
    for _ in range(5):
        update()
        of_updates.append(peaks[-1])  # it scores before
    trainer._run = run
    return min(of_updates)


def held_bytes(trainer: MegatronTrainer) -> dict[str, float]:
    """What this rank holds for good, each storage once, by category."""
    seen: set[int] = set()

    def bytes_of(tensors: list[Any]) -> float:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    weights = bytes_of([p for chunk in trainer.wrapped for p in chunk.parameters()])
    buffers = [b for c in trainer.wrapped for b in (*c.buffers, *c.expert_parallel_buffers)]
    gradients = bytes_of([buffer.grad_data for buffer in buffers])
    optimizer = 0.0
    for inner in trainer.optimizer._unit_of:
        stepped = [p for group in inner.param_groups for p in group["params"]]
        optimizer += bytes_of([t for p in stepped for t in (p, *inner.state[p].values())])
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def resident_bytes(name: str) -> int:
    """Of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def random_batch(vocabulary: int) -> TokenBatch:
    """Responses of full length."""
    tokens = PROMPT + RESPONSE
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (RESPONSES, tokens), generator=generator)
    mask = (torch.arange(tokens) >= PROMPT).expand_as(ids)
    advantages = torch.randn(RESPONSES, 1, generator=generator) * mask
    return TokenBatch(ids, mask, torch.zeros(ids.shape), advantages)
