# ruff: noqa: ARG002 - parameters are the real one's
from __future__ import annotations

from typing import Any


class Policy:
    def __init__(
        self,
        cluster: Any,
        config: Any,
        tokenizer: Any,
        name_prefix: str = "lm_policy",
        workers_per_node: int | list[int] | None = None,
        init_optimizer: bool = True,
        weights_path: Any = None,
        optimizer_path: Any = None,
        init_reference_model: bool = True,
        processor: Any = None,
        worker_extension_cls_fqn: str | None = None,
        skip_weight_load: bool = False,
    ) -> None:
        self.worker = worker_extension_cls_fqn
