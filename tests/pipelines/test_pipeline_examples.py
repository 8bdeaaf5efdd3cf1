"""The examples for slime, verl and NeMo-RL name what is there, and hand on what they say."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from megatron_bupo.algorithm.bupo import PhaseSchedule
from megatron_bupo.pipelines.asked import from_environment, schedule_of
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


@pytest.mark.usefixtures("stand_ins")
def test_every_policy_of_nemo_rls_script_has_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script, out = tmp_path / "run_grpo.py", tmp_path / "out.json"
    script.write_text(
        "import json, sys\n"
        "from nemo_rl.distributed.ray_actor_environment_registry import *\n"
        "from nemo_rl.models.policy.lm_policy import Policy\n"
        "class OfTransferQueue(Policy):\n"
        "    def __init__(self, *args, dp_cfg, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "made = [Policy(0, {}, None), OfTransferQueue(0, config={}, tokenizer=None, dp_cfg=1)]\n"
        "told = [ACTOR_ENVIRONMENT_REGISTRY[policy.worker] for policy in made]\n"
        "open(sys.argv[1], 'w').write(json.dumps([told, [policy.worker for policy in made]]))\n"
    )
    monkeypatch.setattr(sys, "argv", ["nemo_rl_bupo.py", str(script), str(out)])
    runpy.run_path(str(EXAMPLES / "nemo_rl_bupo.py"), run_name="__main__")
    worker = "megatron_bupo.pipelines.nemo_rl.BupoPolicyWorker"
    assert json.loads(out.read_text()) == [["uv run --extra mcore"] * 2, [worker] * 2]


def test_workers_read_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUPO_TARGET_LAYER", "6")
    monkeypatch.setenv("BUPO_INTERNAL_STEPS", "30")
    assert from_environment() == PhaseSchedule.of([(6, 30)])
