"""The examples for slime, verl and NeMo-RL name what is there, and hand on what they say."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bupo.algorithm.bupo import PhaseSchedule
from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.asked import from_environment, schedule_of
from tests.pipelines.conftest import STAND_INS
from tests.pipelines.test_signatures import RECORDED

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["slime_bupo.sh", "verl_bupo.sh", "nemo_rl_bupo.py"])
def test_what_an_example_names_is_there(name: str):
    named = re.findall(
        r"megatron_bupo\.pipelines\.(\w+)(?:\.(\w+))?", (EXAMPLES / name).read_text()
    )
    assert named
    for module, attribute in named:
        source = (ROOT / "megatron_bupo" / "pipelines" / f"{module}.py").read_text()
        defined = {getattr(node, "name", None) for node in ast.parse(source).body}
        assert not attribute or attribute in defined


def test_slimes_options_and_settings_are_what_it_and_the_adapter_read():
    script = (EXAMPLES / "slime_bupo.sh").read_text()
    options = RECORDED["slime"]["files"]["slime/utils/arguments.py"]["strings"]
    assert set(re.findall(r"--[a-z-]+", script)) <= set(options)
    show = f'source {EXAMPLES}/slime_bupo.sh; printf "%s\\n" "${{BUPO_ARGS[@]}}"'
    printed = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    settings = yaml.safe_load(Path(printed.stdout.split()[-1]).read_text())
    schedule = schedule_of(vars(Namespace(**settings)), "bupo_target_layer", "bupo_internal_steps")
    assert schedule == PhaseSchedule.of([(6, 30)])


def test_verls_workers_and_settings_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUPO_TARGET_LAYER", "3")
    script = tmp_path / "run.sh"
    script.write_text('printf "%s\\n" "$VERL_USE_EXTERNAL_MODULES" "$BUPO_INTERNAL_STEPS" "$@"')
    run = ["bash", str(EXAMPLES / "verl_bupo.sh"), str(script), "trainer.nnodes=2"]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    workers = "+ray_kwargs.ray_init.runtime_env.env_vars"
    assert told == [
        "megatron_bupo.pipelines.verl",
        "30",
        f"{workers}.VERL_USE_EXTERNAL_MODULES=megatron_bupo.pipelines.verl",
        f"{workers}.BUPO_TARGET_LAYER='3'",
        f"{workers}.BUPO_INTERNAL_STEPS='30'",
        "actor_rollout_ref.actor.optim.use_checkpoint_opt_param_scheduler=True",
        "actor_rollout_ref.rollout.calculate_log_probs=False",
        "trainer.nnodes=2",
    ]


def _run_in_nemo_rls_place(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a script of NeMo-RL's, of these `lines`, writes to its `out` through the example."""
    script, out = folder / "run_grpo.py", folder / "out.json"
    script.write_text(f"import json, sys\n{lines}\nopen(sys.argv[1], 'w').write(json.dumps(out))\n")
    monkeypatch.setattr(sys, "argv", ["nemo_rl_bupo.py", str(script), str(out)])
    runpy.run_path(str(EXAMPLES / "nemo_rl_bupo.py"), run_name="__main__")
    return json.loads(out.read_text())


@pytest.mark.usefixtures("stand_ins")
def test_every_policy_of_nemo_rls_script_has_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = _run_in_nemo_rls_place(
        "from nemo_rl.distributed.ray_actor_environment_registry import *\n"
        "from nemo_rl.models.policy.lm_policy import Policy\n"
        "class OfTransferQueue(Policy):\n"
        "    def __init__(self, *args, dp_cfg, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "made = [Policy(0, {}, None), OfTransferQueue(0, config={}, tokenizer=None, dp_cfg=1)]\n"
        "out = [[policy.worker, ACTOR_ENVIRONMENT_REGISTRY[policy.worker]] for policy in made]",
        tmp_path,
        monkeypatch,
    )
    worker = "megatron_bupo.pipelines.nemo_rl.BupoPolicyWorker"
    assert told == [[worker, "uv run --extra mcore"]] * 2


_SETUPS = {
    "grpo": "from nemo_rl.algorithms.grpo import setup\n",
    "single controller": (
        "from nemo_rl.algorithms.single_controller_utils import setup_single_controller as setup\n"
    ),
}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("script", _SETUPS)
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("config.grpo.seq_logprob_error_threshold = 2.0", "grpo.seq_logprob_error_threshold=2.0"),
        ("config.loss_fn.use_importance_sampling_correction = True", "set loss_fn.*=False"),
        ("config.on_policy_distillation = name(enabled=True)", "on_policy_distillation.enabled"),
        ("config.policy = {'dtensor_cfg': {'enabled': True}}", "megatron_cfg.enabled=False"),
    ],
)
def test_what_nemo_rls_script_would_make_of_the_sampler_is_refused_before_anything_is_set_up(
    script: str, changed: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = (
        f"{_SETUPS[script]}"
        "from types import SimpleNamespace as name\n"
        "config = name(grpo=name(seq_logprob_error_threshold=None), on_policy_distillation=None)\n"
        "config.loss_fn = name(use_importance_sampling_correction=False)\n"
        "config.policy = {'megatron_cfg': {'enabled': True}}\n"
    )
    others = ", None" * (3 if script == "grpo" else 1)
    setup = f"\nout = setup(config{others}) is config"
    assert _run_in_nemo_rls_place(lines + setup, tmp_path, monkeypatch) is True
    with pytest.raises(InputError, match=named):
        _run_in_nemo_rls_place(lines + changed + setup, tmp_path, monkeypatch)
    monkeypatch.setenv("BUPO_INTERNAL_STEPS", "0")
    assert _run_in_nemo_rls_place(lines + changed + setup, tmp_path, monkeypatch) is True


_MEGATRON_IS_NOT_THERE = """
import sys
sys.modules["megatron.core"] = None
from megatron_bupo.pipelines import nemo_rl_driver
"""


def test_nemo_rls_script_needs_no_megatron():
    subprocess.run(
        [sys.executable, "-c", _MEGATRON_IS_NOT_THERE],
        env={**os.environ, "PYTHONPATH": f"{STAND_INS}:{ROOT}"},
        check=True,
    )


def test_workers_read_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUPO_TARGET_LAYER", "6")
    monkeypatch.setenv("BUPO_INTERNAL_STEPS", "30")
    assert from_environment() == PhaseSchedule.of([(6, 30)])
