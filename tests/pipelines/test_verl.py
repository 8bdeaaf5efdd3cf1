"""verl's engine with a stand-in for verl, held to its real signatures elsewhere."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bupo.errors import InputError
from tests.pipelines.tiny_gpt import known_gpt
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.usefixtures("stand_ins")


def _engine(
    *,
    forward_only: bool = False,
    routes: str = "disabled",
    scheduler_resumes: bool = True,
    contents: tuple[str, ...] = ("model", "optimizer"),
) -> tuple[Any, dict[str, Any]]:
    """What verl would make of a tiny model, and a batch that asks it for its policy's name."""
    from verl.workers.engine import EngineRegistry

    import megatron_bupo.pipelines.verl

    ours = EngineRegistry.engines["language_model", "megatron", "cuda", "nvidia"]
    assert ours is megatron_bupo.pipelines.verl.BupoEngine
    model, computed = known_gpt()
    engine: Any = ours(
        SimpleNamespace(build=lambda: model),
        SimpleNamespace(forward_only=forward_only, router_replay=SimpleNamespace(mode=routes)),
        SimpleNamespace(use_checkpoint_opt_param_scheduler=scheduler_resumes),
        SimpleNamespace(load_contents=contents),
    )
    engine.initialize()
    return engine, {"ask": computed}


def test_an_engine_without_phases_is_refused_rather_than_left_to_train_the_full_policy():
    importlib.import_module("megatron_bupo.pipelines.verl")
    from verl.workers.engine import EngineRegistry

    other: Any = EngineRegistry.engines["language_model", "fsdp2", "cuda", "nvidia"]
    with pytest.raises(InputError, match="strategy=fsdp2: trains the full policy alone"):
        other(model_config=None, engine_config=SimpleNamespace(strategy="fsdp2"))


def _three_steps() -> list[list[str]]:
    (reference, asked_of_it), (actor, asked) = _engine(forward_only=True), _engine()
    found = []
    for _ in range(3):
        old = actor.forward_backward_batch(asked, None, forward_only=True)
        kl_to = reference.forward_backward_batch(asked_of_it, None, forward_only=True)
        new = [actor.forward_backward_batch(asked, loss_function=print) for _ in range(2)]
        actor.lr_scheduler.num_steps += 1  # verl: after the last mini-batch
        found.append([old, kl_to, *new])
    return found


def test_reference_old_and_new_logprobs_of_a_step_are_of_one_policy():
    [found] = run_ranks(1, _three_steps)
    internal = ["internal layer 2"] * 4
    assert found == [internal, internal, ["full"] * 4]


def _made(settings: dict[str, Any]) -> None:
    _engine(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scheduler_resumes": False}, "use_checkpoint_opt_param_scheduler=False.*set True"),
        ({"contents": ("model",)}, r"load_contents=\['model'\]: leaves out the scheduler"),
        ({"routes": "R3"}, "router_replay.mode=R3"),
    ],
)
def test_settings_that_make_the_step_or_the_phase_wrong_are_refused(settings: Any, named: str):
    with pytest.raises(RankError, match=named):
        run_ranks(1, _made, settings)


def test_without_internal_steps_every_setting_is_verls_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUPO_INTERNAL_STEPS", "0")
    run_ranks(1, _made, {"scheduler_resumes": False, "routes": "R3", "contents": ()})


def _updates(step: int, *, scored: bool, loss: Any = print, **batch: Any) -> str:
    actor, asked = _engine()
    actor.lr_scheduler.num_steps = step
    if scored:
        actor.forward_backward_batch(asked, None, forward_only=True)
    return actor.forward_backward_batch({**asked, **batch}, loss)


_UNSUITABLE = {
    "calculate_log_probs=True.*resume with it": {"scored": True, "rollout_log_probs": 0},
    "rollout_correction.rollout_is": {"scored": True, "rollout_is_weights": 0},
    "bypass_mode=True: no old log-probs of the internal layer 2 policy": {"scored": False},
    "distillation.enabled=True": {"scored": True, "loss": partial(print, distillation_config=0)},
}


@pytest.mark.parametrize("named", _UNSUITABLE)
def test_only_the_full_policy_learns_from_log_probs_of_the_full_policy(named: str):
    update = partial(_updates, **_UNSUITABLE[named])
    with pytest.raises(RankError, match=named):
        run_ranks(1, update, 1)
    assert run_ranks(1, update, 2) == ["full"]


def _reference_alone() -> None:
    reference, asked = _engine(forward_only=True)
    reference.forward_backward_batch(asked, None, forward_only=True)


def test_a_reference_without_an_actor_says_that_it_does_not_know_the_step():
    with pytest.raises(RankError, match="keep it with the actor"):
        run_ranks(1, _reference_alone)
