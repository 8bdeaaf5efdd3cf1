"""BuPO in NeMo-RL: its own script for GRPO, with workers that know their phase.

    export BUPO_TARGET_LAYER=6 BUPO_INTERNAL_STEPS=30
    python nemo_rl_bupo.py examples/run_grpo.py --config CONFIG [overrides ...]

from NeMo-RL's folder, with megatron_bupo on the PYTHONPATH; NeMo-RL hands the environment on to its
workers. It works with `run_grpo.py`, synchronous or not, and `run_grpo_single_controller.py`. Who
owns the script writes `install()` and `check(config)` into it.

Switched off in the internal phase, by refusing them: `grpo.seq_logprob_error_threshold`,
`loss_fn.use_importance_sampling_correction` (with all its kinds of truncation),
`loss_fn.use_on_policy_kl_approximation`, top-k and top-p sampling, distillation. What NeMo-RL logs
of the difference between training and sampling is then the difference between two policies.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

from nemo_rl.algorithms import grpo, single_controller_utils

from megatron_bupo.pipelines.nemo_rl_driver import check, install


def checked(setup: Callable[..., Any]) -> Callable[..., Any]:
    """`setup`, after a look at what it is to set up."""

    def checked_setup(master_config: Any, *args: Any, **kwargs: Any) -> Any:
        check(master_config)
        return setup(master_config, *args, **kwargs)

    return checked_setup


install()
grpo.setup = checked(grpo.setup)
single_controller_utils.setup_single_controller = checked(
    single_controller_utils.setup_single_controller
)

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
