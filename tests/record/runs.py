"""Records as a run writes them, for what reads them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def records(*phases: tuple[str, int], evaluate_every: int = 0) -> list[dict[str, Any]]:
    """Steps of the named policies in turn; rewards rise by 0.01 a step and entropies fall."""
    policies = [policy for policy, steps in phases for _ in range(steps)]
    made = []
    for step, policy in enumerate(policies):
        record: dict[str, Any] = {
            "step": step,
            "policy": policy,
            "rollout/reward_mean": 0.2 + 0.01 * step,
            "rollout/response_tokens_mean": 1830.0,
            "rollout/truncated_fraction": 0.0,
            "rollout/reward_warnings": 0.0,
            "update/grad_norm": 0.31,
            "update/ratio_clipped_fraction": 0.007,
            "update/learning_rate": 5e-5,
            "entropy/full_nats": 0.5 - 0.001 * step,
            "time/generate_s": 41.0,
            "time/grade_s": 0.1,
            "time/old_logprobs_s": 6.0,
            "time/update_s": 12.0,
            "time/sync_s": 0.4,
            "time/step_s": 60.0,
        }
        if policy != "full":
            record["entropy/internal_nats"] = 2.0 - 0.01 * step
        if evaluate_every and step == 0:
            record["eval/initial_accuracy_mean"] = 0.25
        if evaluate_every and (step + 1) % evaluate_every == 0:
            record["eval/accuracy_mean"] = 0.25 + 0.01 * (step + 1)
        made.append(record)
    return made


def write(run_dir: Path, of: Sequence[dict[str, Any]]) -> Path:
    """`of` as the metrics.jsonl of `run_dir`; returns `run_dir`."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in of))
    return run_dir


def probed(of: Sequence[dict[str, Any]], *, every: int, layer: int, layers: int) -> None:
    """Add to `of` what probes of internal layer `layer` of `layers` would find: cosines with later
    layers that fall with distance and rise with the steps, and a policy that drifts.
    """
    for record in of[::every]:
        trained = record["step"] / len(of)
        record |= {
            "probe/layer": float(layer),
            "probe/perplexity": 2.0 + trained,
            "probe/full_entropy_nats": 0.5 - 0.2 * trained,
            "probe/internal_entropy_nats": 1.5 - 0.5 * trained,
            "probe/kl_internal_to_full_nats": 3.0 - trained,
            "probe/kl_full_to_internal_nats": 4.0 - trained,
            "probe/layer_entropy_change_nats": 0.1 - 0.2 * trained,
            "probe/response_tokens_mean": 900.0,
            "probe/truncated_fraction": 0.1,
            "probe/repetition_fraction": 0.05 + 0.1 * trained,
        }
        for later in range(layer + 1, layers + 1):
            away = (later - layer) / layers
            record[f"probe/cosine_to_layer_{later:02d}"] = 1 - away * (1 - 0.5 * trained)
            record[f"probe/kl_to_layer_{later:02d}_nats"] = 5 * away * (1 + trained)
