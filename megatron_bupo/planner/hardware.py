"""What can the machines do? A table of rates (`hardware.yaml`), read and checked.

Every number in it is stated with its unit and meaning there; nothing here adds another.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_bupo.config import expand
from megatron_bupo.errors import InputError

TABLE = Path(__file__).parent / "hardware.yaml"
SHIPPED = "megatron_bupo/planner/hardware.yaml"
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device; peaks."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    matmul: float  # the share of both that the best product reaches
    memory_tb_per_s: float
    link_gb_per_s: float

    def flops_per_s(self, dtype: str) -> float:
        """The peak of products in `dtype`."""
        return 1e12 * (self.bf16_tflops if dtype == "bfloat16" else self.fp32_tflops)


@dataclass(frozen=True)
class Node:
    """A machine, and how it is connected."""

    gpus: int
    network_gb_per_s: float


@dataclass(frozen=True)
class Efficiency:
    """Shares of what is possible that are reached."""

    matmul: float
    attention: float
    memory: float
    link: float


@dataclass(frozen=True)
class Overhead:
    """Time that no rate explains."""

    layer_ms: float
    decode_step_ms: float
    decode_layer_ms: float
    decode_sequence_ms: float
    collective_ms: float
    sync_s: float
    bucket_ms: float


@dataclass(frozen=True)
class Reserve:
    """Memory that no tensor explains."""

    trainer_gib: float
    fragments: float
    server_gib: float
    server_asleep_gib: float


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in one kind of node."""

    name: str
    source: str  # the table's file, as people know it
    gpu: Gpu
    node: Node
    efficiency: Efficiency
    overhead: Overhead
    reserve: Reserve

    @property
    def memory_bytes(self) -> float:
        """Of one GPU."""
        return self.gpu.memory_gib * GIB

    @property
    def plain_layers(self) -> bool:
        """Are layers made of plain torch's modules, as on a CPU? Else of Transformer Engine's."""
        return self.name == "CPU"

    def products_per_s(self, dtype: str) -> float:
        """Multiplications with their additions, in large matrices."""
        best = self.gpu.flops_per_s(dtype) * self.gpu.matmul
        return best * self.efficiency.matmul / 2

    def scores_per_s(self, dtype: str) -> float:
        """The same in attention."""
        return self.products_per_s(dtype) * self.efficiency.attention / self.efficiency.matmul

    @property
    def memory_per_s(self) -> float:
        """Bytes from and to the device's memory."""
        return 1e12 * self.gpu.memory_tb_per_s * self.efficiency.memory

    def bytes_per_s(self, ranks: int) -> float:
        """What a collective over `ranks` neighbouring GPUs moves, per GPU."""
        inside = ranks <= self.node.gpus
        rate = self.gpu.link_gb_per_s if inside else self.node.network_gb_per_s
        return 1e9 * rate * self.efficiency.link


SECTIONS = {"node": Node, "efficiency": Efficiency, "overhead": Overhead, "reserve": Reserve}
MAY_BE_ZERO = (Overhead, Reserve)


def read_hardware(gpu: str, path: str | None = None) -> Hardware:
    """The GPU `gpu` of the table at `path`; None: ours."""
    file = TABLE if path is None else Path(expand(path))
    table = _read(file)
    sections = {name: _section(file, name, kind, table) for name, kind in SECTIONS.items()}
    gpus = table.get("gpus")
    if not isinstance(gpus, dict) or gpu not in gpus:
        known = [str(name) for name in gpus] if isinstance(gpus, dict) else []
        near = difflib.get_close_matches(gpu.upper(), known, n=1, cutoff=0)
        way_out = f"the nearest is {near[0]}" if near else "copy the table that is shipped"
        raise InputError(f"--gpu {gpu}", f"{file} knows {', '.join(known) or 'no GPU'}", way_out)
    rates = _section(file, gpu, Gpu, gpus)
    return Hardware(name=gpu, source=SHIPPED if path is None else str(file), gpu=rates, **sections)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = str(error).partition("\n")[0]
        raise InputError(str(file), f"cannot be read ({said})", f"copy {TABLE}") from None
    if not isinstance(table, dict):
        raise InputError(str(file), "is no table of hardware", f"copy {TABLE}")
    return table


def _section(file: Path, name: str, kind: Any, table: Mapping[str, Any]) -> Any:
    found = table.get(name)
    fields = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(found, dict) or set(found) != set(fields):
        wrong = set(found) ^ set(fields) if isinstance(found, dict) else set(fields)
        listed = ", ".join(sorted(map(str, wrong)))
        raise InputError(f"{file}: {name}", f"lacks, or has unknown: {listed}", f"see {TABLE}")
    for key, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0 if kind in MAY_BE_ZERO else math.ulp(0.0)
        share = kind is Efficiency or (kind, key) == (Gpu, "matmul")
        most = 1.0 if share else math.inf
        if not number or not least <= value <= most or value == math.inf:
            expected = "a share of 1" if most == 1 else "a number"
            raise InputError(f"{file}: {name}.{key}={value}", f"must be {expected} above 0")
    if kind is Node and not isinstance(found["gpus"], int):
        raise InputError(f"{file}: node.gpus={found['gpus']}", "must be a whole number")
    return kind(**found)
