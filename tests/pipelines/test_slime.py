"""slime calls the hooks as `signatures.json` says: log-prob passes, then the train steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.pipelines import slime
from tests.pipelines.tiny_gpt import LAYERS, known_gpt, tiny_gpt
from tests.ranks import RankError, run_ranks


def _args(**settings: Any) -> Namespace:
    defaults = {
        "num_layers": LAYERS,
        "bupo_target_layer": 2,
        "bupo_internal_steps": 2,
        "start_rollout_id": 0,
        "load": None,
        "finetune": True,
        "ckpt_step": None,
        "use_critic": False,
        "num_critic_only_steps": 0,
        "use_tis": False,
        "rollout_top_p": 1.0,
    }
    return Namespace(**{**defaults, **settings})


def _policies_of(args: Namespace, first: int, rollouts: int) -> list[tuple[str, str, str]]:
    """For each rollout the policies of the reference's, the old and the new log-probs, as slime
    gets them.
    """
    gpt, computed = known_gpt()
    model, found = [gpt], []
    for rollout in range(first, first + rollouts):
        passes = []
        for prefix in ("ref_", ""):
            slime.before_log_prob(args, model, prefix)
            passes.append(computed(gpt))
        for step in range(2):
            slime.before_train_step(args, rollout, step, model, None, None)
        found.append((*passes, computed(gpt)))
    return found


def test_reference_old_and_new_logprobs_of_a_rollout_are_of_one_policy():
    [policies] = run_ranks(1, _policies_of, _args(), 0, 3)
    internal = ("internal layer 2",) * 3
    assert policies == [internal, internal, ("full",) * 3]


def test_a_run_resumed_by_megatrons_count_is_in_the_phase_of_its_rollout(tmp_path: Path):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    resumed = {"load": str(tmp_path), "start_rollout_id": None, "finetune": False}
    for counted, expected in (("0", "internal layer 2"), ("1", "full")):
        tracker.write_text(f"{counted}\n")
        [policies] = run_ranks(1, _policies_of, _args(**resumed), int(counted) + 1, 1)
        assert policies == [(expected,) * 3]


def test_the_phase_waits_for_the_critic_that_learns_alone():
    args = _args(use_critic=True, num_critic_only_steps=5)
    [policies] = run_ranks(1, _policies_of, args, 5, 3)
    assert [policy for *_, policy in policies] == ["internal layer 2"] * 2 + ["full"]


def test_logprobs_of_another_rollouts_policy_are_refused():
    with pytest.raises(RankError, match="pass --start-rollout-id 7"):
        run_ranks(1, _policies_of, _args(), 7, 1)


def _critic() -> bool:
    model = [tiny_gpt()]
    before = type(model[0].decoder.layers[0])
    model[0].role = "critic"  # type: ignore[assignment]
    slime.before_log_prob(_args(), model, "")
    slime.before_train_step(_args(), 0, 0, model, None, None)
    return type(model[0].decoder.layers[0]) is before


def test_the_critic_is_left_alone():
    assert run_ranks(1, _critic) == [True]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_tis": True}, "--use-tis=True: .*internal layer 2.*resume with it"),
        ({"rollout_top_p": 0.9}, "--rollout-top-p=0.9"),
        ({"bupo_target_layer": 4}, "internal layer 4: the model has 4 layers.*choose a layer of"),
        ({"bupo_target_layer": None}, "bupo_target_layer: is not set"),
        ({"bupo_target_layer": "six"}, "bupo_target_layer=six: is no layer"),
        ({"bupo_internal_steps": 1.5}, "bupo_internal_steps=1.5: is no whole number"),
    ],
)
def test_what_cannot_work_is_refused_before_there_is_a_model(settings: Any, named: str):
    with pytest.raises(InputError, match=named):
        slime.check(_args(**settings))


def test_the_full_policys_phase_may_correct_for_the_sampler():
    slime.check(_args(use_tis=True, start_rollout_id=2))


@pytest.mark.slow
@pytest.mark.skipif(
    not {"SLIME_SOURCE", "MEGATRON_LM_SOURCE"} <= os.environ.keys() or sys.version_info < (3, 12),
    reason="SLIME_SOURCE and MEGATRON_LM_SOURCE name no checkouts, or Python is too old for them",
)
def test_slimes_own_passes_are_of_the_phases_policy():
    root = Path(__file__).parents[2]
    path = f"{root}:{os.environ['SLIME_SOURCE']}:{os.environ['MEGATRON_LM_SOURCE']}"
    command = [sys.executable, str(root / "tests" / "pipelines" / "slime_for_real.py")]
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert max(found["old"], found["new against old"], found["then"]) < 1e-6
    assert found["moved"] == ["0", "1", "ends"]
