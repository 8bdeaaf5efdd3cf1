"""What does this machine offer: GPUs, shared memory, descriptors, a clock?"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_bupo.config import Config
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 1.0  # GiB; a container's own 64 MiB are soon full
SPARE_FILES = 512  # beside a connection for each response
BUSY = 0.1  # of a GPU's memory, by others


def devices() -> Iterator[Finding]:
    """GPUs as torch sees them, and whether they are free."""
    import torch

    area, there = "devices", Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    if not torch.cuda.is_available():
        if there:
            reason = f"there is a GPU, but torch {torch.__version__} sees none"
            way_out = "install a torch built for CUDA that this driver knows; see nvidia-smi"
            yield Finding(area, PROBLEM, reason, way_out)
        else:
            yield Finding(area, OK, "no GPU: everything runs on the CPU, over gloo")
        return
    for i in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(i)
        free, total = torch.cuda.mem_get_info(i)
        said = f"GPU {i}: {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        busy = total - free > BUSY * total
        way_out = "see nvidia-smi for whose processes they are" * busy
        yield Finding(area, WARNING if busy else OK, said, way_out)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    yield Finding(area, OK, f"CUDA {torch.version.cuda}, NCCL {nccl}")


def machine(config: Config | None) -> Iterator[Finding]:
    """Limits that end a run hours after its start."""
    yield from _shared_memory()
    yield _descriptors(config)
    yield from _locked_memory()
    yield _clock()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", OK, f"{cores} cores")


def _shared_memory() -> Iterator[Finding]:
    if not SHARED_MEMORY.is_dir():
        return
    space = shutil.disk_usage(SHARED_MEMORY)
    small = space.total < LEAST_SHARED * GIB
    said = f"{SHARED_MEMORY}: {space.free / GIB:.2f} of {space.total / GIB:.2f} GiB free"
    way_out = "start the container with --shm-size=16g, or --ipc=host" * small
    yield Finding("machine", WARNING if small else OK, said, way_out)


def _descriptors(config: Config | None) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = SPARE_FILES
    if config is not None and config.rollout.engine == "sglang":
        needed += config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    said = f"{soft} open files allowed"
    if soft != resource.RLIM_INFINITY and soft < needed:
        possible = hard == resource.RLIM_INFINITY or hard >= needed
        way_out = f"ulimit -n {needed}" if possible else f"have the hard limit, {hard}, raised"
        return Finding("machine", PROBLEM, f"{said}, and a step may need {needed}", way_out)
    return Finding("machine", OK, said)


def _locked_memory() -> Iterator[Finding]:
    """What InfiniBand needs."""
    if not Path("/dev/infiniband").exists():
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("machine", OK, "InfiniBand, and any memory may be locked")
        return
    reason = f"InfiniBand is here, but only {soft} bytes may be locked: NCCL would fall back"
    yield Finding(
        "machine", WARNING, reason, "ulimit -l unlimited; in containers --ulimit memlock=-1"
    )


def _clock() -> Finding:
    """Not before this package was written: certificates, checkpoints' order and logs go by it."""
    behind = Path(__file__).stat().st_mtime - time.time()
    if behind > 60:
        reason = f"the clock is at least {behind:.0f} s slow: files here are from its future"
        return Finding("machine", WARNING, reason, "have it set by NTP")
    return Finding("machine", OK, f"the clock says {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
