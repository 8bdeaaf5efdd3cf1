"""Which software is here, and does it go together? Packages are looked up, or imported by another
process: two of them that clash would take the doctor along.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_bupo.config import Config
from megatron_bupo.config.server_rules import server_packages
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING, Finding
from megatron_bupo.rollout.client import OLDEST as OLDEST_SGLANG

AREA = "versions"
OLDEST_PYTHON = (3, 11)
# package: oldest that works, first that is not known to (None: any)
NEEDED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.6", None),
    "megatron-core": ("0.16", "0.20"),
    "transformers": ("4.56", None),
    "psutil": ("0", None),  # without it Megatron-Core's checkpoints hang
}
TE_WAY_OUT = 'use NVIDIA\'s NGC container, or pip install "transformer-engine[pytorch]"'


def versions(config: Config | None, *, gpus: int, timeout_s: float) -> Iterator[Finding]:
    """Of this interpreter, and of the servers'."""
    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info[:2] < OLDEST_PYTHON
    yield Finding(AREA, PROBLEM if old else OK, f"Python {python}", "use 3.11 or newer" * old)
    for package, (oldest, beyond) in NEEDED.items():
        yield _needed(package, oldest, beyond)
    yield transformer_engine(gpus, timeout_s)
    yield apex()
    yield _flash_attention(gpus)
    yield from _clashes()
    if config is not None:
        yield from _servers(config, timeout_s)


def _needed(package: str, oldest: str, beyond: str | None) -> Finding:
    found = version_of(package)
    if found is None:
        return Finding(AREA, PROBLEM, f"{package} is missing", f"pip install {package}")
    if numbers(found) < numbers(oldest):
        way_out = f'pip install "{package}>={oldest}"'
        return Finding(AREA, PROBLEM, f"{package} {found} is older than {oldest}", way_out)
    if beyond is not None and numbers(found) >= numbers(beyond):
        reason = f"{package} {found} is newer than what has been tested, below {beyond}"
        return Finding(AREA, WARNING, reason, f'pip install "{package}<{beyond}"')
    return Finding(AREA, OK, f"{package} {found}")


def transformer_engine(gpus: int, timeout_s: float) -> Finding:
    """Layers are made of its modules where it imports and there is a GPU."""
    found = version_of("transformer-engine")
    if importlib.util.find_spec("transformer_engine") is not None:
        said = f"transformer-engine {found or '(of no package)'}"
        broken = _does_not_import("transformer_engine.pytorch", timeout_s)
        if broken is None:
            return Finding(AREA, OK, said)
        way_out = f"build it for torch {version_of('torch')}, or {TE_WAY_OUT}"
        return Finding(AREA, PROBLEM, f"{said} does not import: {broken}", way_out)
    if found is not None:
        reason = f"transformer-engine {found} is PyPI's empty package, without the library"
        return Finding(AREA, WARNING if gpus else OK, reason, TE_WAY_OUT if gpus else "")
    if not gpus:
        return Finding(AREA, OK, "no transformer-engine, which needs a GPU")
    reason = "no transformer-engine: layers are plain torch, slower and with more activations"
    return Finding(AREA, WARNING, reason, TE_WAY_OUT)


def apex() -> Finding:
    """NVIDIA's has fused optimizers; PyPI has another project of that name, which Megatron-Core
    takes for it.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(AREA, OK, "no apex: torch's or Transformer Engine's Adam steps")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        if importlib.util.find_spec("amp_C") is not None:
            return Finding(AREA, OK, "apex is NVIDIA's")
        reason = "apex is NVIDIA's, but without its CUDA extensions, which its optimizers need"
        return Finding(AREA, WARNING, reason, "build it with them, or pip uninstall apex")
    where = ", ".join(map(str, folders)) or str(spec.origin)
    reason = f"apex at {where} is not NVIDIA's, but another project of that name on PyPI"
    way_out = "pip uninstall apex; NVIDIA's comes with the NGC container or from its source"
    return Finding(AREA, PROBLEM, reason, way_out)


def _does_not_import(module: str, timeout_s: float) -> str | None:
    """Why not, if it does not; asked of another process."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        return f"it takes longer than {timeout_s:g} s"
    return None


def _flash_attention(gpus: int) -> Finding:
    found = version_of("flash-attn")
    if found is not None:
        return Finding(AREA, OK, f"flash-attn {found}")
    other = "Transformer Engine's or torch's own attention does" if gpus else "torch's own does"
    return Finding(AREA, OK, f"no flash-attn: {other}")


def _clashes() -> Iterator[Finding]:
    """Packages that do not import beside each other."""
    nemo, lepton = version_of("nemo-run"), version_of("leptonai")
    if nemo is not None and lepton is not None and numbers(lepton) >= (0, 47):
        reason = f"nemo-run {nemo} does not import beside leptonai {lepton}"
        yield Finding(AREA, PROBLEM, reason, 'pip install "leptonai<0.47"')
    elif nemo is not None:
        yield Finding(AREA, OK, f"nemo-run {nemo}")
    bridge, hf = version_of("megatron-bridge"), version_of("transformers")
    if bridge is not None and hf is not None and numbers(hf) >= (5,):
        reason = f"megatron-bridge {bridge} needs transformers 4, and {hf} is here"
        yield Finding(AREA, WARNING, reason, 'pip install "transformers<5"')


def _servers(config: Config, timeout_s: float) -> Iterator[Finding]:
    """In the interpreter that servers will be started with."""
    python = config.servers.python or sys.executable
    for package, found in server_packages(config, timeout_s=timeout_s).items():
        said = f"{package} {found} at {python}"
        if package == "sglang" and numbers(found) < OLDEST_SGLANG:
            way_out = f'pip install "sglang>={".".join(map(str, OLDEST_SGLANG))}" there'
            yield Finding(AREA, PROBLEM, f"{said} is older than this client speaks to", way_out)
        else:
            yield Finding(AREA, OK, said)


def version_of(package: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
