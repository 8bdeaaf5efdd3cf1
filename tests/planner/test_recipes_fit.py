"""Every recipe that is shipped fits the hardware that it is for, and plans that are printed beside
recipes are what `plan` says today.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_bupo.cli import main
from megatron_bupo.commands.plan import plan_of, recipe_of
from megatron_bupo.planner.hardware import read_hardware

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
LARGE = {"llama3_3_70b": 64, "qwen2_5_72b": 64, "qwen3_32b": 32, "qwen3_30b_a3b": 32}  # GPUs
RECIPES = sorted(path for path in CONF.glob("*.yaml") if "models/" in path.read_text())


def asked(recipe: Path, *overrides: str) -> Namespace:
    return Namespace(
        recipe=str(recipe),
        overrides=list(overrides),
        prompt_tokens=None,
        response_tokens=None,
        gpus=None,
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_h100s(path: Path):
    recipe, _ = recipe_of(asked(path))
    plan = plan_of(recipe, read_hardware("H100"), None)
    assert plan.problems == ()
    assert plan.gpus == next((n for name, n in LARGE.items() if name in path.stem), 8)


@pytest.mark.parametrize("name", LARGE)
def test_the_plan_beside_a_recipe_is_true(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    assert main(["plan", f"conf/bupo_{name}.yaml"]) == 0
    shown = (CONF / "plans" / f"bupo_{name}.txt").read_text()
    assert shown == f"$ megatron-bupo plan conf/bupo_{name}.yaml\n{capsys.readouterr().out}"
