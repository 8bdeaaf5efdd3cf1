from __future__ import annotations

from typing import Any


def setup_single_controller(
    master_config: Any, tokenizer: Any, *, processor: Any = None, partition_id: str = "rollout_data"
) -> Any:
    return master_config
