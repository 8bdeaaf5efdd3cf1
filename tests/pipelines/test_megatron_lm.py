"""Megatron-LM's RL calls a builder, and asks nothing else of us; see signatures.json."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bupo.errors import InputError
from megatron_bupo.pipelines import controller, megatron_lm
from megatron_bupo.pipelines.megatron_lm import BupoBuilder, PhaseSchedule
from tests.pipelines.tiny_gpt import known_gpt
from tests.ranks import run_ranks
from tools.record_signatures import RECORD

RECORDED = json.loads(RECORD.read_text())["megatron_lm"]["files"]
KNOWN = {name for file in RECORDED.values() for name in file.get("attributes", ())}
SCHEDULE = PhaseSchedule.of([(2, 2)])


def _args(**changed: Any) -> SimpleNamespace:
    """Arguments of a run of GRPO: all that we know Megatron-LM to have."""
    sizes = {"grpo_prompts_per_step": 8, "grpo_group_size": 4, "global_batch_size": 16}
    settings = {"perform_rl_step": True, "grpo_iterations": 2, **sizes}
    unset = dict.fromkeys(KNOWN - {"curr_iteration"}, False)
    return SimpleNamespace(**unset | settings | changed)


def test_the_builder_is_called_as_recorded():
    parameters = inspect.signature(BupoBuilder.__call__).parameters
    [call] = RECORDED["model_provider.py"]["calls"]["model_builder"]
    named = call.replace("config=config", "config").replace("pg_collection=pg_", "pg_")
    assert ", ".join(parameters) == f"self, {named}"
    assert RECORDED["gpt_builders.py"]["functions"]["gpt_builder"] == named
    assert set(megatron_lm.REFUSED) <= KNOWN


def _build(args: SimpleNamespace) -> tuple[Any, Any, BupoBuilder]:
    """As `model_provider` does."""
    gpt, computed = known_gpt()
    told: list[Any] = []

    def builder(*positional: Any, **named: Any) -> Any:
        told.append((positional, named))
        return gpt

    bupo = BupoBuilder(builder, SCHEDULE)
    model = bupo(args, True, True, None, config=None, pg_collection=None)
    assert told == [((args, True, True, None), {"config": None, "pg_collection": None})]
    assert model is gpt
    return model, computed, bupo


def _through_a_run() -> list[str]:
    args = _args()
    model, computed, _ = _build(args)
    seen = [computed(model)]
    for iteration in range(0, 17, 2):  # two passes over 32 responses, 16 at a time, are a step
        args.curr_iteration = iteration
        seen.append(computed(model))
    return seen


def test_a_step_is_a_collection_of_rollouts():
    [seen] = run_ranks(1, _through_a_run)
    assert seen == ["full", *["internal layer 2"] * 4, *["full"] * 5]


class Mode:
    """Megatron-Core's flag, as recorded; the installed release may be older than it."""

    active = False

    @classmethod
    def is_active(cls) -> bool:
        return cls.active


def _while_serving() -> list[str]:
    controller.InferenceMode = Mode
    args = _args(curr_iteration=0)
    model, computed, _ = _build(args)
    seen = []
    for Mode.active in (False, True, False):
        seen.append(computed(model))
    return seen


def test_an_inference_engine_serves_the_full_policy():
    known = RECORDED["megatron/core/inference/utils.py"]["functions"]
    assert known["InferenceMode.is_active"] == "cls"
    assert run_ranks(1, _while_serving) == [["internal layer 2", "full", "internal layer 2"]]


def _resume(iteration: int) -> str:
    model, computed, _ = _build(_args(curr_iteration=iteration))
    try:
        return computed(model)
    except InputError as error:
        return str(error)


def test_a_run_resumes_in_its_phase_but_not_in_the_midst_of_a_collection():
    assert run_ranks(1, _resume, 4) == ["internal layer 2"]
    assert run_ranks(1, _resume, 8) == ["full"]
    [refused] = run_ranks(1, _resume, 6)
    assert "iteration 6" in refused
    assert "--save-interval" in refused


@pytest.mark.parametrize("name", megatron_lm.REFUSED)
def test_what_cannot_be_with_internal_phases_is_refused_before_the_model_is_built(name: str):
    def builder(*_: Any, **__: Any) -> Any:
        raise AssertionError("built")

    with pytest.raises(InputError, match="--" + name.replace("_", "-")):
        BupoBuilder(builder, SCHEDULE)(_args(**{name: True}), True, True)


def _other_model() -> str:
    try:
        BupoBuilder(lambda *_, **__: torch.nn.Linear(2, 2), SCHEDULE)(_args(), True, True)
    except InputError as error:
        return str(error)
    return "attached"


def test_a_model_that_is_no_gpt_is_refused():
    assert "Linear: is no Megatron-Core GPTModel" in run_ranks(1, _other_model)[0]


def test_the_example_adds_two_lines_to_the_recorded_sources(tmp_path: Path):
    patch = Path(__file__).parents[2] / "examples" / "megatron_lm_bupo.patch"
    lines = patch.read_text().splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert len(added) == 2
    assert "megatron_bupo.pipelines.megatron_lm import BupoBuilder, PhaseSchedule" in added[0]
    if "MEGATRON_LM_SOURCE" not in os.environ:
        pytest.skip("MEGATRON_LM_SOURCE names no checkout that the example could be applied to")
    source = Path(os.environ["MEGATRON_LM_SOURCE"]) / "train_rl.py"
    (tmp_path / "train_rl.py").write_text(source.read_text())
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    compile((tmp_path / "train_rl.py").read_text(), "train_rl.py", "exec")
