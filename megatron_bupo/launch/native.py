"""What executors of all kinds have in common: native options under their own names, variables, and
the code that runs.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bupo.errors import InputError
from megatron_bupo.launch.cluster import nearest
from megatron_bupo.launch.folder import launch_dir
from megatron_bupo.launch.placement import THERE, Launch, working_tree


def made(kind: Any, native: Mapping[str, Any], **ours: Any) -> Any:
    """An executor of `kind`.

    Raises:
        InputError: it has no such option, or needs one that is not there.
    """
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for key in native:
        if key not in known:
            where = f"executor.{key}"
            raise InputError(where, f"{kind.__name__} has no such option", nearest(key, known))
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.init
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in {**native, **ours}
    ]
    if missing:
        raise InputError(f"executor.{missing[0]}", f"{kind.__name__} needs it", "set it")
    return kind(**{**ours, **native})


def environment(launch: Launch) -> dict[str, str]:
    """Variables of every process of the run."""
    cluster = launch.cluster
    found = {"PYTHONUNBUFFERED": "1"}
    if cluster.code == "tree":
        found["PYTHONPATH"] = str(working_tree()) if cluster.in_place else THERE
    elif cluster.code != "installed" and cluster.in_place:
        found["PYTHONPATH"] = str(_code_dir(launch))
    return {**found, **cluster.env}


def installing(launch: Launch) -> list[str]:
    """Lines that install the package that `code` names, if it names one."""
    cluster = launch.cluster
    if cluster.code in {"tree", "installed"}:
        return []
    words = [cluster.interpreter, "-m", "pip", "install", "--quiet"]
    if cluster.in_place:
        words += ["--no-deps", "--upgrade", "--target", str(_code_dir(launch))]
    return [shlex.join([*words, cluster.code])]


def shipping(launch: Launch) -> Any:
    """What brings the code to nodes that do not see it: the working tree, or of it the recipe and
    what lies beside it.
    """
    from megatron_bupo.launch.shipping import WorkingTree

    tree = working_tree()
    if not (tree / ".git").exists():
        reason = f"{tree} is no git repository, of which one knows what belongs to it"
        raise InputError(f"code={launch.cluster.code}", reason, "launch from a checkout")
    whole = launch.cluster.code == "tree"
    return WorkingTree(tree=str(tree), folder="." if whole else str(Path(launch.recipe).parent))


def _code_dir(launch: Launch) -> Path:
    return launch_dir(launch.run_dir) / "code"
