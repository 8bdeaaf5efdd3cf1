"""Updates that were skipped because their loss or gradient was not finite: told, and stopped at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_bupo.config.schema import OptimizerConfig
from megatron_bupo.errors import InputError
from megatron_bupo.types import UpdateReport


class SkippedUpdates:
    """How many updates in a row this process has seen skipped; a resumed run counts anew."""

    def __init__(self, optimizer: OptimizerConfig, *, of_critic: bool = False) -> None:
        """`max_skipped_updates` of `optimizer`, which is the policy's or the critic's, in a row are
        too many.
        """
        self.most, self.in_a_row = optimizer.max_skipped_updates, 0
        self.updates, self.key = "updates", "optimizer"
        self.skipped, self.loss, self.norm = "update/skipped", "update/loss", "update/grad_norm"
        if of_critic:
            self.updates, self.key = "updates of the critic", "critic.optimizer"
            self.skipped, self.norm = "critic/skipped", "critic/grad_norm"
            self.loss = "critic/value_loss"

    def after(self, step: int, updates: Sequence[UpdateReport]) -> list[str]:
        """What there is to tell of the updates of `step` (from 0); an InputError at too many."""
        skipped = 0
        for update in updates:
            if not update.metrics[self.skipped]:
                self.in_a_row = 0
                continue
            skipped, self.in_a_row = skipped + 1, self.in_a_row + 1
            if self.in_a_row >= self.most:
                raise InputError(
                    f"step {step + 1}",
                    f"{self.in_a_row} skipped {self.updates} in a row: {self._cause(update)}",
                    f"start again with a lower {self.key}.lr, to go on from the last checkpoint, "
                    f"whose weights are finite, or raise {self.key}.max_skipped_updates",
                )
        if not skipped:
            return []
        last = next(u for u in reversed(updates) if u.metrics[self.skipped])
        made = f"{skipped} of {len(updates)} {self.updates} skipped"
        return [f"step {step + 1}: {made}: {self._cause(last)}"]

    def _cause(self, update: UpdateReport) -> str:
        loss, norm = (update.metrics[key] for key in (self.loss, self.norm))
        if math.isfinite(loss):
            return f"the gradient norm was {norm} (the loss {loss:.3g})"
        return f"the loss was {loss}, the gradient norm {norm}"
