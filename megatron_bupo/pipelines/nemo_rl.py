"""BuPO inside NeMo-RL: a policy worker whose model knows its phase. In the script that starts it:

    ACTOR_ENVIRONMENT_REGISTRY[WORKER] = MCORE_EXECUTABLE
    Policy(..., worker_extension_cls_fqn=WORKER)

where WORKER is "megatron_bupo.pipelines.nemo_rl.BupoPolicyWorker" (examples/nemo_rl_bupo.py), with
BUPO_TARGET_LAYER and BUPO_INTERNAL_STEPS in its environment, which NeMo-RL hands on. This
module is imported in the workers only: the driver's environment has no Megatron.

Workers are not told which step it is. But NeMo-RL moves the learning-rate scheduler by one global
batch for every step, however many updates that has, so its count gives the step, in checkpoints
too. The reference is the same model with other weights, so its log-probs are of the same policy.
"""

from __future__ import annotations

from typing import Any

import ray
from nemo_rl.algorithms.logits_sampling_utils import need_top_k_or_top_p_filtering
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

from megatron_bupo.errors import InputError
from megatron_bupo.pipelines.asked import WITHOUT_SAMPLER, enter, from_environment
from megatron_bupo.pipelines.controller import attach

_SAMPLER = "compares with log-probs that the sampler reports, which are the full policy's"
# Of the loss function; truncated importance sampling is a kind of the first.
REFUSED = {
    "use_importance_sampling_correction": _SAMPLER,
    "use_on_policy_kl_approximation": _SAMPLER,
}


class BupoPolicyWorkerImpl(MegatronPolicyWorkerImpl):
    """NeMo-RL's worker, for training and for log-probs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bupo = attach(self.model, from_environment())
        resumed = kwargs.get("weights_path") is not None
        if resumed and self.scheduler is not None and not self.scheduler.num_steps:
            reason = "the checkpoint has no scheduler, and a resumed run would begin anew"
            where = "checkpointing.save_optimizer=False"
            raise InputError(where, reason, "resume from one with the optimizer")

    def bupo_policy(self) -> str:
        """The policy that trains now: for `policy.run_all_workers_single_data("bupo_policy")`."""
        return str(self.bupo.policy)

    def get_logprobs(self, *args: Any, **kwargs: Any) -> Any:
        self._enter()
        return super().get_logprobs(*args, **kwargs)

    def train(self, data: Any, loss_fn: Any, *args: Any, **kwargs: Any) -> Any:
        self._enter(loss_fn)
        return super().train(data, loss_fn, *args, **kwargs)

    def begin_train_step(self, loss_fn: Any, *args: Any, **kwargs: Any) -> None:
        self._enter(loss_fn)
        super().begin_train_step(loss_fn, *args, **kwargs)

    def get_topk_logits(self, *args: Any, **kwargs: Any) -> Any:
        with self.bupo.full_policy():  # a teacher is meant in full
            return super().get_topk_logits(*args, **kwargs)

    def _enter(self, loss_fn: Any = None) -> None:
        """Into the phase of the step that comes next."""
        if self.scheduler is None:
            return  # made to be asked, not to learn: the full policy
        batch = self.cfg["train_global_batch_size"]
        step, rest = divmod(self.scheduler.num_steps, batch)
        if rest:
            where = f"policy.train_global_batch_size={batch}"
            reason = f"the scheduler has counted {self.scheduler.num_steps} samples in another size"
            raise InputError(where, reason, "resume with the size that the run began with")
        policy = enter(self.bupo, step)
        if not self.bupo.is_internal:
            return
        for name, reason in REFUSED.items():
            if getattr(loss_fn, name, False):
                because = f"{reason}, and the {policy} policy trains"
                raise InputError(f"loss_fn.{name}=True", because, WITHOUT_SAMPLER)
        if need_top_k_or_top_p_filtering(self.sampling_params):
            reason = f"keep other tokens under the {policy} policy than they kept in sampling"
            where = "policy.generation.top_k and top_p"
            raise InputError(where, reason, "set top_k=null and top_p=1.0")


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))
class BupoPolicyWorker(BupoPolicyWorkerImpl):
    """What `worker_extension_cls_fqn` names: a class that is remote has no heirs."""
