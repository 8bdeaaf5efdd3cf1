"""Who may import whom: the table below is the document, and every import keeps to it.

A line reads: the modules of this package may import these others of ours. It holds for imports
inside functions and under TYPE_CHECKING too, because a name known is a dependency.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_bupo"

MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "collective": {"progress"},
    "stopping": {"collective", "errors"},
    "progress": set(),
    "intervals": set(),
    "pages": set(),
    "durable": set(),
    "checkpoints": {"errors", "durable"},
    "config": {"errors"},
    "hf": {"types", "errors", "durable"},
    "algorithm": {"types"},
    "data": {"types", "config", "errors"},
    "rewards": {"types", "config", "errors", "collective", "progress"},
    "rollout": {
        "types",
        "config",
        "errors",
        "collective",
        "stopping",
        "progress",
        "hf",
        "algorithm",
    },
    "evaluation": {"types", "config", "errors", "hf", "rewards", "rollout", "durable"},
    "mcore": {"types", "config", "errors", "progress", "checkpoints", "algorithm", "hf"},
    "pipelines": {"types", "errors", "algorithm", "mcore"},
    "record": {
        "types",
        "config",
        "errors",
        "durable",
        "intervals",
        "pages",
        "progress",
        "algorithm",
    },
    "analysis": {"errors", "durable", "intervals", "pages"},
    "planner": {"config", "errors", "hf"},
    "bed": {"types", "config", "errors", "durable", "data", "hf"},
}
# What puts the parts together may import all of them.
ON_TOP = {
    "__init__",
    "__main__",
    "build",
    "credit",
    "planning_credit",
    "engines",
    "run",
    "train",
    "sample",
    "score",
    "analyze",
    "logit_lens",
    "auto_layer",
    "generate",
    "evaluate",
    "replay",
    "rollout_only",
    "arguments",
    "command_line",
    "convert_arguments",
    "launch_arguments",
    "plan_arguments",
    "doctor",
    "cli",
    "convert",
    "convert_source",
    "resumable",
    "commands",
    "preflight",
    "probe",
    "probe_texts",
    "guard",
    "verification",
    "launch",
}

# Packages of others that only one part of ours knows.
ONLY_IN = {
    "megatron": {"mcore", "pipelines"},
}
# Parts of ours that know few packages of others.
ONLY_OTHERS = {
    "types": {"torch"},
    "errors": set(),
    "progress": set(),
    "durable": set(),
    "config": {"omegaconf", "yaml"},
    "algorithm": {"torch", "ahocorasick", "regex"},
}

# What runs inside SGLang's processes, whose environment has nothing of ours.
SERVER_SIDE = PACKAGE / "rollout" / "server_side"

# These answer (a config error, --help, a dry run) before anything heavy is imported.
WITHOUT_TORCH = {
    "types",
    "errors",
    "durable",
    "checkpoints",
    "config",
    "hf",
    "planner",
    "plan_arguments",
    "arguments",
    "command_line",
    "cli",
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package, a folder or a top-level module, that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, by its full dotted name."""
    module = ("megatron_bupo", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module[: len(module) - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours_and_others(path: Path) -> tuple[set[str], set[str]]:
    """The parts of ours and the packages of others that a file imports; its own part left out."""
    names = {tuple(name.split(".")) for name in imports_of(path)}
    ours = {name[1] for name in names if name[0] == "megatron_bupo" and len(name) > 1}
    others = {name[0] for name in names if name[0] != "megatron_bupo"}
    parts = {part_of(module) for module in MODULES}
    return ours & parts - {part_of(path)}, others - sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_the_table_allows(path: Path):
    part = part_of(path)
    assert part in MAY_IMPORT or part in ON_TOP, f"{part} has no line in the table"
    ours, others = ours_and_others(path)
    assert part in ON_TOP or ours <= MAY_IMPORT[part]
    assert part not in ONLY_OTHERS or others <= ONLY_OTHERS[part]
    assert not {name for name in others if part not in ONLY_IN.get(name, {part})}


@pytest.mark.parametrize(
    "path", sorted(SERVER_SIDE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVER_SIDE))
)
def test_what_servers_import_needs_nothing_of_ours(path: Path):
    own = ("megatron_bupo", *SERVER_SIDE.relative_to(PACKAGE).parts)
    roots = {name.split(".")[0] for name in imports_of(path) if not name.startswith(".".join(own))}
    assert roots - sys.stdlib_module_names <= {"sglang", "torch"}


def test_only_servers_import_sglang():
    importers = {path for path in MODULES if "sglang" in ours_and_others(path)[1]}
    assert {path for path in importers if not path.is_relative_to(SERVER_SIDE)} == set()
    assert importers


def test_config_and_command_line_import_without_torch():
    names = [
        ".".join(("megatron_bupo", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in MODULES
        if part_of(path) in WITHOUT_TORCH
    ]
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "megatron", "datasets", "matplotlib"}} & set(sys.modules)
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
