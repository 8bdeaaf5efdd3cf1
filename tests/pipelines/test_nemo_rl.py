"""NeMo-RL's worker with stand-ins for NeMo-RL and Ray, held to its real signatures elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.pipelines.tiny_gpt import known_gpt
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.usefixtures("stand_ins")
BATCH = 8


def _worker(*, counted: int = 0, **settings: Any) -> tuple[Any, Any]:
    """A worker whose scheduler has `counted` samples, and what names a policy by its logits."""
    from megatron_bupo.pipelines.nemo_rl import BupoPolicyWorker

    model, computed = known_gpt()
    config = {
        "model": model,
        "scheduler": SimpleNamespace(num_steps=counted),
        "train_global_batch_size": BATCH,
        "sampling_params": settings.pop("sampling_params", None),
    }

    worker: Any = BupoPolicyWorker(config, None, worker_sharding_annotations=None, **settings)
    return worker, computed


def _three_steps() -> list[list[str]]:
    worker, computed = _worker()
    found = []
    for _ in range(3):
        old = worker.get_logprobs(data=computed)
        reference = worker.get_reference_policy_logprobs(data=computed)
        teacher = worker.get_topk_logits(data=computed, k=4)
        trained = worker.train(data=computed, loss_fn=SimpleNamespace())
        found.append([old, reference, *trained, teacher])
    return found


def test_reference_old_and_new_logprobs_of_a_step_are_of_one_policy():
    [found] = run_ranks(1, _three_steps)
    internal = ["internal layer 2"] * 4 + ["full"]
    assert found == [internal, internal, ["full"] * 5]


def _policy_after(counted: int, settings: dict[str, Any]) -> str:
    worker, computed = _worker(counted=counted, **settings)
    worker.begin_train_step(SimpleNamespace())
    assert worker.bupo_policy() == computed(worker.model)
    return worker.bupo_policy()


def test_a_resumed_run_is_in_the_phase_of_its_schedulers_count():
    resumed = {"weights_path": "step_1/policy/weights"}
    assert run_ranks(1, _policy_after, BATCH, resumed) == ["internal layer 2"]
    assert run_ranks(1, _policy_after, 2 * BATCH, resumed) == ["full"]


@pytest.mark.parametrize(
    ("counted", "settings", "named"),
    [
        (0, {"weights_path": "step_1/policy/weights"}, "save_optimizer=False"),
        (BATCH + 1, {}, "policy.train_global_batch_size=8: .* 9 samples"),
        (0, {"sampling_params": SimpleNamespace(top_k=5)}, "policy.generation.top_k and top_p"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(counted: int, settings: Any, named: str):
    with pytest.raises(RankError, match=named):
        run_ranks(1, _policy_after, counted, settings)


def _correct_for_the_sampler(counted: int) -> list[str]:
    worker, computed = _worker(counted=counted)
    return worker.train(computed, SimpleNamespace(use_importance_sampling_correction=True))


def test_only_the_full_policy_is_corrected_for_the_sampler():
    assert run_ranks(1, _correct_for_the_sampler, 2 * BATCH) == [["full"] * 2]
    with pytest.raises(RankError, match=r"loss_fn.use_importance_sampling_correction=True"):
        run_ranks(1, _correct_for_the_sampler, BATCH)
