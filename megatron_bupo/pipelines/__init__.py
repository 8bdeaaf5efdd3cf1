"""BuPO inside training loops that somebody else wrote, on any Megatron-Core GPTModel.

    controller = attach(model, PhaseSchedule.of([(6, 30)]))      # wherever the model was built
    controller.set_step(step)                                    # at the head of the loop

`controller.py` says what that does, and what the loop around it must not do.
"""

from megatron_bupo.algorithm.bupo import PhaseSchedule
from megatron_bupo.pipelines.controller import PhaseController, attach

__all__ = ["PhaseController", "PhaseSchedule", "attach"]
