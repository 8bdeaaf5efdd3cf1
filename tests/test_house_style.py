"""Small enough to read: the limits that keep a function on a screen and a module in one's head."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for folder in ("megatron_bupo", "tools") for path in (ROOT / folder).rglob("*.py")
)

FUNCTION_LINES = 60
MODULE_LINES = 300


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small_and_say_their_idea_first(path: Path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) <= MODULE_LINES
    if tree.body:
        assert ast.get_docstring(tree), "no docstring that says the idea"
    long = {
        node.name: lines
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long
