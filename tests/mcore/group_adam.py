"""A real AdamW that counts steps by parameter group, as Transformer Engine's and apex's fused ones
do, and walks a list beside its groups, as apex's does; put where Megatron looks for those.
"""

from __future__ import annotations

from typing import Any

import torch


class GroupCountingAdam(torch.optim.Optimizer):
    """AdamW with `step` in the group, and none in the states."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode
        assert not capturable
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        )
        self.param_groups_master = [{"params": []} for _ in self.param_groups]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update; moments that are not there are zero."""
        for group, _ in zip(self.param_groups, self.param_groups_master, strict=False):
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                for name, beta, value in (
                    ("exp_avg", beta1, p.grad),
                    ("exp_avg_sq", beta2, p.grad.square()),
                ):
                    moment = state.setdefault(name, torch.zeros_like(p))
                    moment.mul_(beta).add_(value, alpha=1 - beta)
                mean = state["exp_avg"] / (1 - beta1**t)
                rms = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mean / (rms + group["eps"]))


def use_group_counting_adam() -> None:
    """Make Megatron-Core believe, in this process, that a fused Adam is installed."""
    import megatron.core.optimizer as upstream
    from megatron.core.optimizer import distrib_optimizer

    upstream.Adam = distrib_optimizer.Adam = GroupCountingAdam
    upstream.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
