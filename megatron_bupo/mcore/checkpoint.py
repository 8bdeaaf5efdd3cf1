"""Everything a step depends on, in Megatron's torch_dist format, which any layout can load.

Weights, optimizer moments and each unit's own step counter, and every random number generator; of
PPO's critic the same in a directory of its own. The loop adds its own plain values, and
`megatron_bupo.checkpoints` says when a directory of these is whole.

Each layer has keys of its own, so an actor that has fewer layers than the checkpoint loads what it
has, and of one that has more the layers above stay as they were built: with the initial weights
and moments of zero. That is how the whole model takes over from the lower part of itself
(`bupo.internal_layout`).
"""

from __future__ import annotations

import inspect
import queue
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_bupo import checkpoints
from megatron_bupo.config import expand
from megatron_bupo.config.layout import parallel_sizes
from megatron_bupo.hf.writer import copy_side_files
from megatron_bupo.mcore.critic import MegatronCritic
from megatron_bupo.mcore.learner import LearningModel
from megatron_bupo.mcore.torch_dist import METADATA
from megatron_bupo.mcore.trainer import MegatronTrainer

_LAYER = re.compile(r"\bdecoder\.layers\.(\d+)\.")


def save(
    trainer: MegatronTrainer,
    run_dir: Path,
    step: int,
    run: Mapping[str, Any],
    *,
    keep: int,
    spared: int | None = None,
    critic: MegatronCritic | None = None,
) -> None:
    """Write the state before `step`, with the loop's own plain values `run`; then drop all but
    the `keep` newest and that before step `spared`. Collective.
    """
    work = checkpoints.partial_path(run_dir, step)
    if dist.get_rank() == 0:
        checkpoints.begin(run_dir, step)
    dist.barrier()
    _write(trainer, work, {"rng": _rng_object(_rng_state())})
    if critic is not None:
        (work / checkpoints.CRITIC).mkdir(exist_ok=True)
        dist.barrier()
        _write(critic, work / checkpoints.CRITIC, {})
    dist.barrier()
    if dist.get_rank() == 0:
        _copy_side_files(trainer, work)
        checkpoints.seal(run_dir, step, run)
        checkpoints.drop_old(run_dir, keep=keep, spared=spared)
    dist.barrier()


def _write(model: LearningModel, folder: Path, beside: Mapping[str, Any]) -> None:
    """Write weights and optimizer of `model` to `folder`, with what belongs `beside` them."""
    state: dict[str, Any] = {**_sharded_state(model, loading=False), **beside}
    state["common"] = {
        "steps_by_unit": dict(model.optimizer.steps),
        "layers": model.arch.layers,
        "layout": _layout(model),
    }
    with _writing_in_this_process():
        dist_checkpointing.save(_keyed(state), str(folder), **_release_options())


def _copy_side_files(trainer: MegatronTrainer, work: Path) -> None:
    """Keep what stands beside the weights of the model, so that the checkpoint can be converted
    without it.
    """
    model_dir = Path(expand(trainer.config.model.path))
    if model_dir.is_dir():
        copy_side_files(model_dir, work / checkpoints.SIDE)


def load(trainer: MegatronTrainer, path: Path, *, critic: MegatronCritic | None = None) -> None:
    """Put the state at `path` into `trainer`, `critic` and, under the same layout, this process.
    Layers that the checkpoint does not have stay as they are. Collective.
    """
    if critic is not None:
        _read(critic, path / checkpoints.CRITIC, with_rng=False)
    _read(trainer, path, with_rng=True)


def _read(model: LearningModel, path: Path, *, with_rng: bool) -> None:
    common = dist_checkpointing.load_common_state_dict(str(path))["common"]
    whole = common["layers"] >= model.arch.layers
    state = _sharded_state(model, loading=whole)
    wanted = _keyed(state if whole else _keeping_above(common["layers"], state))
    with_rng &= common["layout"] == _layout(model)
    if with_rng:
        wanted["rng"] = _rng_object(None)
    loaded: Any = dist_checkpointing.load(wanted, str(path))
    if with_rng:
        _set_rng_state(loaded["rng"])
    loaded = _filled(state, loaded)
    for i, chunk in enumerate(model.gpt_chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)  # extra states are optional
    model.optimizer.load(loaded["optimizer"], common["steps_by_unit"])


def _layout(model: LearningModel) -> dict[str, Any]:
    """A rank's random numbers belong to its place in this."""
    return asdict(parallel_sizes(model.config, dist.get_world_size()))


def _sharded_state(model: LearningModel, *, loading: bool) -> dict[str, Any]:
    """What this rank has of weights and optimizer, as Megatron saves it; `loading`: room for it."""
    model.gather_parameters()
    state: dict[str, Any] = {
        f"model{i}": chunk.sharded_state_dict(metadata=dict(METADATA))
        for i, chunk in enumerate(model.gpt_chunks)
    }
    state["optimizer"] = model.optimizer.sharded_state_dict(
        dict(state), loading=loading, metadata=METADATA
    )
    return state


def _keeping_above(layers: int, node: Any) -> Any:
    """`node`, to be loaded but for what belongs to layers above the lowest `layers`."""
    if isinstance(node, dict):
        return {key: _keeping_above(layers, value) for key, value in node.items()}
    if isinstance(node, list):
        return [_keeping_above(layers, value) for value in node]
    if isinstance(node, ShardedBase):
        layer = _LAYER.search(node.key)  # counted from 0
        if layer is not None and int(layer[1]) >= layers:
            return LocalNonpersistentObject(node.data)
    return node


def _keyed(node: Any) -> Any:
    """`node` with lists as dicts by index: Megatron closes the gap where it takes elements out of a
    list, and puts them back to the wrong places.
    """
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        return {key: _keyed(value) for key, value in node.items()}
    return node


def _filled(state: Any, loaded: Any) -> Any:
    """`state` with what was `loaded` for its tensors. All else is this run's own: the checkpoint's
    optimizer may have been of other parts, and its settings are not what the config says now.
    """
    if isinstance(state, list):
        return [_filled(value, loaded.get(i, {})) for i, value in enumerate(state)]
    if isinstance(state, dict):
        return {key: _filled(value, loaded.get(key, {})) for key, value in state.items()}
    is_tensor = isinstance(state, ShardedBase | LocalNonpersistentObject)
    return loaded if is_tensor else state


def _rng_state() -> dict[str, Any]:
    """Every random number generator of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": _rng_tracker().get_states(),
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
    _rng_tracker().set_states(state["megatron"])


def _rng_tracker() -> Any:
    return get_cuda_rng_tracker()


def _rng_object(state: Any) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _release_options() -> dict[str, Any]:
    """Megatron-Core 0.18 and later would write through nvidia-resiliency-ext unless told
    otherwise.
    """
    takes = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in takes else {}


def _write_here(
    transforms: Any, _use_msc: bool, _rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """What `FileSystemWriterAsync.write_preloaded_data_multiproc` does, without its processes."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    written = {}
    for i, bucket in enumerate(buckets):
        outcome: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(i)
        writer.write_preloaded_data(transforms, i, bucket, outcome, running, True)
        _, answer = outcome.get()
        if isinstance(answer, Exception):
            results.put(answer)
            return
        written[i] = answer
    results.put(written)


@contextmanager
def _writing_in_this_process() -> Iterator[None]:
    """Megatron-Core collects what was written through a manager process, and before 0.18 writes
    from forked ones.

    The manager outlives a killed rank and holds its output pipes open for ever; forks of a process
    that has gloo threads are a gamble. Saves here are synchronous, so plain calls do.
    """
    writer: Any = filesystem_async.FileSystemWriterAsync
    wanted = [  # as 0.16 and as 0.19 call them
        (filesystem_async, "_get_write_results_queue", queue.Queue),
        (filesystem_async, "get_write_results_queue", queue.Queue),
        (writer, "write_preloaded_data_multiproc", staticmethod(_write_here)),
        (torch_strategy, "_logged_mcore_async_deprecation", True),  # of asynchronous saves
    ]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in wanted if name in vars(owner)]
    for owner, name, value in wanted:
        if name in vars(owner):
            setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
