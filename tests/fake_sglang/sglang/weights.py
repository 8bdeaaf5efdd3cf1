"""New weights for a running server: every way of sending them that works without a GPU.

Each answers `(success, message)` as the real one does, and kills the server where that raises in
its scheduler: a payload that is no list of named tensors, a tensor of another shape, a file that
is no safetensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from sglang.faults import FAULTS, die
from sglang.model import read_weights
from sglang.scheduler import Scheduler

Answer = tuple[bool, str]
NO_SESSION = " must run between begin_weight_update() and end_weight_update()"
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or "
    "queued. Retract or finish them, then call /flush_cache."
)
ALLOWED = {
    "_codecs": {"encode"},
    "collections": {"OrderedDict"},
    "torch": {"Tensor", "Size", "device", "dtype", "float16", "bfloat16", "float32"}
    | {"HalfStorage", "BFloat16Storage", "FloatStorage", "UntypedStorage"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.multiprocessing.reductions": {"rebuild_tensor", "rebuild_typed_storage"}
    | {"rebuild_storage_filename"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage", "_load_from_bytes"},
}


class Unpickler(pickle.Unpickler):
    """Tensors and plain data, nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise RuntimeError(f"Blocked unsafe global ({module}.{name})")
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        return super().find_class(module, name)


class WeightUpdates:
    """The weight endpoints of one server; `body` is what was posted."""

    def __init__(self, scheduler: Scheduler, *, model_path: str, tp_size: int) -> None:
        self.scheduler, self.tp_size = scheduler, tp_size
        self.model_path = model_path
        self.session = False
        self.groups: dict[str, dist.ProcessGroup] = {}

    def begin(self, body: dict[str, Any]) -> Answer:
        if body.get("selector", "all") not in ("target", "draft", "all"):
            raise ValueError(f"selector: {body['selector']!r}")
        with self.scheduler.updating():
            if self.session:
                return False, (
                    "a weight-update session is already open; call end_weight_update() first"
                )
            self.session = True
            return True, "Success"

    def end(self, _body: dict[str, Any]) -> Answer:
        with self.scheduler.updating():
            if not self.session:
                return False, ("no weight-update session is open; call begin_weight_update() first")
            self.session = False
            return True, "Success"

    def from_tensor(self, body: dict[str, Any], payloads: list[bytes]) -> Answer:
        """Pickled `[(name, tensor)]`, or a flattened bucket, for each tensor-parallel rank."""

        def update() -> Answer:
            if not self.session and not FAULTS.old:
                return False, f"update_weights_from_tensor{NO_SESSION}"
            if len(payloads) < self.tp_size:
                die(f"{len(payloads)} payloads for {self.tp_size} ranks")
            try:
                tensors = Unpickler(io.BytesIO(payloads[0])).load()
                self._load([(name, tensor) for name, tensor in tensors])
            except Exception as error:
                die(repr(error))
            return True, "Success"

        if body.get("load_format") is not None:
            return False, "the fake knows no load_format of tensors"
        return self._updated(body, update)

    def from_distributed(self, body: dict[str, Any]) -> Answer:
        """Tensors that rank 0 of the group broadcasts in the order of `names`."""

        def update() -> Answer:
            if not self.session and not FAULTS.old:
                return False, f"update_weights_from_distributed{NO_SESSION}"
            try:
                received = self._receive(body)
            except Exception as error:
                return False, f"Failed to receive weights: {error}"
            try:
                self._load(received)
            except Exception as error:
                return False, (
                    f"Failed to update parameter online: {error}. The full weights of the "
                    f"ModelRunner are partially updated. Please discard the whole weights."
                )
            return True, "Succeeded to update parameter online."

        return self._updated(body, update)

    def _receive(self, body: dict[str, Any]) -> list[tuple[str, Tensor]]:
        name = body.get("group_name", "weight_update_group")
        if name not in self.groups:
            raise RuntimeError(
                f"Group {name} not in {list(self.groups)}. Please call "
                f"`init_weights_update_group` first."
            )
        group = self.groups[name]
        dtypes = [getattr(torch, dtype) for dtype in body["dtypes"]]
        shapes = [torch.Size(shape) for shape in body["shapes"]]
        empty = [torch.empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
        if body.get("load_format") == "flattened_bucket":
            flat = torch.empty(sum(t.nbytes for t in empty), dtype=torch.uint8)
            dist.broadcast(flat, src=0, group=group)
            parts = flat.split([t.nbytes for t in empty])
            filled = [
                part.clone().view(t.dtype).view(t.shape)
                for part, t in zip(parts, empty, strict=True)
            ]
        else:
            filled = empty
            for tensor in filled:
                dist.broadcast(tensor, src=0, group=group)
        return list(zip(body["names"], filled, strict=True))

    def from_disk(self, body: dict[str, Any]) -> Answer:
        """All safetensors in the directory `model_path`; whole checkpoints and parts alike."""

        def update() -> Answer:
            path = Path(body["model_path"])
            if not list(path.glob("*.safetensors")):
                return False, (
                    f"Failed to get weights iterator: Cannot find any model weights with `{path}`."
                )
            try:
                self._load(read_weights(path).items())
            except Exception as error:
                die(f"{error!r}; the rollback reads the same files again")
            if not FAULTS.forget_updates:
                self.model_path = str(path)
            return True, "Succeeded to update model weights."

        return self._updated(body, update)

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if not FAULTS.forget_updates:
            self.scheduler.model.load(tensors)

    def _updated(self, body: dict[str, Any], update: Callable[[], Answer]) -> Answer:
        """Run `update` while the scheduler rests, and see to version and cache."""
        scheduler, version = self.scheduler, body.get("weight_version")
        if body.get("abort_all_requests"):
            scheduler.abort(everything=True)
        with scheduler.updating():
            if FAULTS.due("refuse_updates"):
                return False, "the fake was told to refuse"
            success, message = update()
            if not success or FAULTS.due("forget_updates"):
                return success, message
            scheduler.set_version(version)
            if body.get("flush_cache", True) and not scheduler.flush():
                return False, NOT_FLUSHED
        if version is not None:
            message += f" Weight version updated to {version}."
        return True, message

    def init_group(self, body: dict[str, Any]) -> Answer:
        """Join a process group as rank `rank_offset`."""
        if self.tp_size > 1 or body.get("backend", "nccl") != "gloo":
            return False, "Failed to initialize custom process group: the fake is one gloo rank."
        name = body.get("group_name", "weight_update_group")
        try:
            self.groups[name] = join_group(
                name,
                f"tcp://{body['master_address']}:{body['master_port']}",
                rank=body["rank_offset"],
                world=body["world_size"],
            )
        except Exception as error:
            return False, f"Failed to initialize custom process group: {error}."
        return True, "Succeeded to initialize custom process group."

    def destroy_group(self, body: dict[str, Any]) -> Answer:
        group = self.groups.pop(body.get("group_name", "weight_update_group"), None)
        if group is None:
            return False, "The group to be destroyed does not exist."
        dist.destroy_process_group(group)
        return True, "Succeeded to destroy custom process group."

    def checksum(self) -> dict[str, Any]:
        """What /weights_checker says to `checksum`."""
        checksums = self.scheduler.model.checksums()
        of_rank = _sha256("".join(name + checksums[name] for name in sorted(checksums)))
        place = {"role": "target", "tp_rank": 0, "tp_size": self.tp_size, "dp_rank": 0}
        place |= {"dp_size": 1, "pp_rank": 0, "pp_size": 1, "rank": 0, "size": self.tp_size}
        rank = {"checksums": checksums, "per_gpu_checksum": of_rank, "parallelism_info": [place]}
        return {
            "success": True,
            "message": "Success.",
            "ranks": [rank],
            "per_engine_checksum": _sha256(of_rank),
        }


def join_group(name: str, address: str, *, rank: int, world: int) -> dist.ProcessGroup:
    """A gloo group beside torch's default one, which this process has none of."""
    timeout = timedelta(seconds=120)
    store, _, _ = next(dist.rendezvous(address, rank, world, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world,
        rank,
        [],
        c10d.Backend("gloo"),
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
    return group


def _sha256(text: str) -> str:
    return sha256(text.encode()).hexdigest()
