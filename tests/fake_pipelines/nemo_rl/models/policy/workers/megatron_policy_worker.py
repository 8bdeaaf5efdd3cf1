"""NeMo-RL's policy worker, as far as it calls a model and counts steps.

`config` holds the model and the scheduler that the real one would build; what is a result of the
real one's forward pass is what `data` finds out about the model here.
"""
# ruff: noqa: ARG002 - parameters are the real one's

from __future__ import annotations

from typing import Any


class MegatronPolicyWorkerImpl:
    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        weights_path: str | None = None,
        optimizer_path: str | None = None,
        init_optimizer: bool = True,
        init_reference_model: bool = True,
        *,
        worker_sharding_annotations: Any,
        skip_weight_load: bool = False,
        **kwargs: Any,
    ) -> None:
        self.cfg, self.model = config, config["model"]
        self.scheduler = config["scheduler"] if init_optimizer else None
        self.sampling_params = config.get("sampling_params")

    def train(
        self,
        data: Any,
        loss_fn: Any,
        eval_mode: bool = False,
        gbs: int | None = None,
        mbs: int | None = None,
        check_dim_skip_keys: Any = None,
    ) -> Any:
        results = [data(self.model) for _ in range(2)]  # two global batches, one tick
        self.scheduler.num_steps += gbs or self.cfg["train_global_batch_size"]
        return results

    def get_logprobs(
        self,
        *,
        data: Any,
        micro_batch_size: int | None = None,
        require_router_replay: bool = True,
    ) -> Any:
        return data(self.model)

    def get_reference_policy_logprobs(
        self, *, data: Any, micro_batch_size: int | None = None
    ) -> Any:
        return self.get_logprobs(
            data=data, micro_batch_size=micro_batch_size, require_router_replay=False
        )

    def begin_train_step(
        self, loss_fn: Any, gbs: int | None = None, mbs: int | None = None
    ) -> None:
        return None

    def get_topk_logits(self, *, data: Any, k: int, micro_batch_size: int | None = None) -> Any:
        return data(self.model)
