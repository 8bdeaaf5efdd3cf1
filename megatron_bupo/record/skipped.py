"""Updates that were skipped because their loss or gradient was not finite: told, and stopped at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_bupo.errors import InputError
from megatron_bupo.types import UpdateReport


class SkippedUpdates:
    """How many updates in a row this process has seen skipped; a resumed run counts anew."""

    def __init__(self, most: int) -> None:
        """`most` in a row are too many: `optimizer.max_skipped_updates`."""
        self.most, self.in_a_row = most, 0

    def after(self, step: int, updates: Sequence[UpdateReport]) -> list[str]:
        """What there is to tell of the updates of `step` (from 0); an InputError at too many."""
        skipped = 0
        for update in updates:
            if not update.metrics["update/skipped"]:
                self.in_a_row = 0
                continue
            skipped, self.in_a_row = skipped + 1, self.in_a_row + 1
            if self.in_a_row >= self.most:
                raise InputError(
                    f"step {step + 1}",
                    f"{self.in_a_row} skipped updates in a row: {_cause(update)}",
                    "start again with a lower optimizer.lr, to go on from the last checkpoint, "
                    "whose weights are finite, or raise optimizer.max_skipped_updates",
                )
        if not skipped:
            return []
        last = next(update for update in reversed(updates) if update.metrics["update/skipped"])
        return [f"step {step + 1}: {skipped} of {len(updates)} updates skipped: {_cause(last)}"]


def _cause(update: UpdateReport) -> str:
    loss, norm = (update.metrics[key] for key in ("update/loss", "update/grad_norm"))
    if math.isfinite(loss):
        return f"the gradient norm was {norm} (the loss {loss:.3g})"
    return f"the loss was {loss}, the gradient norm {norm}"
