"""BuPO inside training loops that somebody else wrote, on any Megatron-Core GPTModel.

    controller = attach(model, PhaseSchedule.of([(6, 30)]))      # wherever the model was built
    controller.set_step(step)                                    # at the head of the loop

`controller.py` says what that does, and what the loop around it must not do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_bupo.algorithm.bupo import PhaseSchedule

if TYPE_CHECKING:
    from megatron_bupo.pipelines.controller import PhaseController, attach

__all__ = ["PhaseController", "PhaseSchedule", "attach"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: a script that only starts workers may have no Megatron."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_bupo.pipelines import controller

    return getattr(controller, name)
