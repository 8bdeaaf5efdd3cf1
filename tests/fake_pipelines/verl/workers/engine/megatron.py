"""verl's Megatron engine, as far as it calls a model and counts steps."""
# ruff: noqa: ARG002 - parameters are the real one's

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from verl.workers.engine import EngineRegistry


@EngineRegistry.register(model_type="language_model", backend="megatron")
class MegatronEngineWithLMHead:
    def __init__(
        self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any
    ) -> None:
        self.model_config, self.engine_config = model_config, engine_config
        self.optimizer_config, self.checkpoint_config = optimizer_config, checkpoint_config

    def initialize(self) -> None:
        self.module = [self.model_config.build()]
        self.lr_scheduler = None
        if not self.engine_config.forward_only:
            self.lr_scheduler = SimpleNamespace(num_steps=0)

    def forward_backward_batch(
        self, data: Any, loss_function: Any, forward_only: bool = False
    ) -> Any:
        return data["ask"](self.module[0])
