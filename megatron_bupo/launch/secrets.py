"""Keys do not travel in files. A launch writes its overrides and the cluster's `env` into scripts,
`launch.json` and NeMo-Run's own files, which others may read: there a key has a name only, and its
value comes from the environment, which a job on Slurm has from whoever runs sbatch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_bupo.errors import InputError

_SECRET = re.compile(r"(\w+_)?(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)", re.IGNORECASE)
_REASON = "would be written to files of the launch"


def refuse_in_overrides(overrides: Sequence[str]) -> None:
    """A `key=value` names a key, and does not hold it.

    Raises:
        InputError: one does.
    """
    found = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    servers = found.get("servers") if isinstance(found, dict) else None
    if not isinstance(servers, dict):
        return
    env = servers.get("env")
    named = {f"servers.env.{name}": value for name, value in env.items()} if env else {}
    for key, value in {"servers.api_key": servers.get("api_key"), **named}.items():
        if _is_held(key.rpartition(".")[2], value):
            name = "SGLANG_API_KEY" if key == "servers.api_key" else key.rpartition(".")[2]
            way_out = f"export {name} where you launch, and write '{key}=${{oc.env:{name}}}'"
            raise InputError(key, _REASON, way_out)


def refuse_in_env(env: Mapping[str, Any], path: Path, *, inherited: bool) -> None:
    """Nor does the `env` of the cluster's file at `path`; `inherited`: a job has an environment
    from whoever submits it.

    Raises:
        InputError: it does.
    """
    for name, value in env.items():
        if inherited and _SECRET.fullmatch(name) and value is not None:
            way_out = "remove it, and export it where sbatch runs: the job has it from there"
            raise InputError(f"env.{name} ({path})", _REASON, way_out)
        if _is_held(name, value):
            way_out = f"export it where you launch, and write {name}: ${{oc.env:{name}}}"
            raise InputError(f"env.{name} ({path})", _REASON, way_out)


def _is_held(name: str, value: Any) -> bool:
    return bool(_SECRET.fullmatch(name)) and value is not None and "${" not in str(value)
