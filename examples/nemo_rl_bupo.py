"""BuPO in NeMo-RL: its own script for GRPO, with workers that know their phase.

    export BUPO_TARGET_LAYER=6 BUPO_INTERNAL_STEPS=30
    python nemo_rl_bupo.py examples/run_grpo.py --config CONFIG [overrides ...]

from NeMo-RL's folder, with megatron_bupo on the PYTHONPATH; NeMo-RL hands the environment on to its
workers. Who owns the script writes the two lines below the imports into it, or gives `setup` a
`policy_factory` that names the worker.
"""

from __future__ import annotations

import runpy
import sys
from functools import partialmethod

from nemo_rl.distributed.ray_actor_environment_registry import (
    ACTOR_ENVIRONMENT_REGISTRY,
    MCORE_EXECUTABLE,
)
from nemo_rl.models.policy.lm_policy import Policy

WORKER = "megatron_bupo.pipelines.nemo_rl.BupoPolicyWorker"

ACTOR_ENVIRONMENT_REGISTRY[WORKER] = MCORE_EXECUTABLE
Policy.__init__ = partialmethod(Policy.__init__, worker_extension_cls_fqn=WORKER)

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
