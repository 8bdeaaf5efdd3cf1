"""Do adapters and stand-ins agree with what was recorded of the pipelines' sources, and do these
still say what was recorded? For the latter name checkouts: SLIME_SOURCE, VERL_SOURCE,
NEMO_RL_SOURCE, MEGATRON_LM_SOURCE, MEGATRON_BRIDGE_SOURCE. `tools/record_signatures.py` records
them anew.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.pipelines import slime
from tests.pipelines.conftest import STAND_INS
from tools.record_signatures import QUESTIONS, RECORD, functions, record

RECORDED = json.loads(RECORD.read_text())


def _recorded(kind: str, *pipelines: str) -> dict[str, Any]:
    """Every recorded function or call, under its last name, which is the class's for __init__."""
    files = [f for pipeline in pipelines for f in RECORDED[pipeline]["files"].values()]
    known = {name: found for f in files for name, found in f.get(kind, {}).items()}
    return {n.replace(".__init__", "").split(".")[-1]: found for n, found in known.items()}


def _parameters(function: Any) -> str:
    return ", ".join(inspect.signature(function).parameters)


@pytest.mark.parametrize("pipeline", QUESTIONS)
def test_the_sources_answered_every_question(pipeline: str):
    for file, questions in QUESTIONS[pipeline].items():
        found = RECORDED[pipeline]["files"][file]
        assert {kind: sorted(names) for kind, names in found.items()} == {
            kind: sorted(names) for kind, names in questions.items()
        }


def test_slimes_calls_fit_the_hooks():
    calls = _recorded("calls", "slime")
    assert calls["custom_init"] == [_parameters(slime.check)]
    assert calls["custom_before_log_prob_hook"] == [_parameters(slime.before_log_prob)]
    assert calls["custom_before_train_step_hook"] == [_parameters(slime.before_train_step)]


def test_slimes_recorded_options_are_those_that_are_refused_by_name():
    [options] = [f["strings"] for f in RECORDED["slime"]["files"].values() if "strings" in f]
    assert {f"--{name.replace('_', '-')}" for name in slime.REFUSED} <= set(options)


@pytest.mark.usefixtures("stand_ins")
def test_adapters_take_what_the_pipelines_pass():
    from megatron_bupo.pipelines import nemo_rl, verl

    known = _recorded("functions", "verl", "nemo_rl")
    engine = verl.BupoEngine
    assert _parameters(engine.forward_backward_batch) == known["forward_backward_batch"]
    assert set(nemo_rl.REFUSED) == set(
        RECORDED["nemo_rl"]["files"]["nemo_rl/algorithms/loss/loss_functions.py"]["attributes"]
    )


@pytest.mark.parametrize("stand_in", sorted(STAND_INS.rglob("*.py")), ids=str)
def test_stand_ins_have_the_parameters_of_what_they_stand_for(stand_in: Path):
    known = _recorded("functions", "verl", "nemo_rl")
    for name, parameters in functions(ast.parse(stand_in.read_text())):
        last = name.replace(".__init__", "").replace("WithLMHead", "").split(".")[-1]
        assert parameters == known.get(last, parameters), name


@pytest.mark.parametrize("pipeline", QUESTIONS)
def test_the_sources_still_say_what_was_recorded(pipeline: str):
    variable = f"{pipeline.upper()}_SOURCE"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout; {RECORDED[pipeline]['commit'][:8]} is recorded")
    assert record(pipeline, Path(os.environ[variable]))["files"] == RECORDED[pipeline]["files"]
