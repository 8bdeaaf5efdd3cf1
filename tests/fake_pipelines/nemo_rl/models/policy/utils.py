from __future__ import annotations

from typing import Any


def get_runtime_env_for_policy_worker(policy_worker_name: str) -> dict[str, Any]:
    return {}
