"""What the adapters count on in pipelines that cannot be installed beside them, read from sources.

    python tools/record_signatures.py slime=PATH verl=PATH nemo_rl=PATH megatron_lm=PATH

Each PATH is a git checkout; megatron_bridge is another such name. Written are the commit and, by
file, the parameters of the functions that adapters override or that call them, the arguments of the
calls themselves, and the options and attributes that they read. Nothing is imported and no code is
copied.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[1] / "tests" / "pipelines" / "signatures.json"

_SLIME = "slime/backends/megatron_utils"
_VERL = "verl/workers/engine"
_NEMO_WORKER = "nemo_rl/models/policy/workers/megatron_policy_worker.py"
_WORKER = "MegatronPolicyWorkerImpl"
# Pipeline -> file -> kind -> names. Recorded are functions' parameters and calls' arguments.
QUESTIONS: dict[str, dict[str, dict[str, list[str]]]] = {
    "slime": {
        f"{_SLIME}/initialize.py": {"calls": ["custom_init"]},
        f"{_SLIME}/model.py": {
            "calls": ["custom_before_log_prob_hook", "custom_before_train_step_hook"]
        },
        f"{_SLIME}/actor.py": {
            "calls": ["self.compute_log_prob"],
            "functions": ["MegatronTrainRayActor.train_actor"],
        },
        "slime/utils/arguments.py": {
            "strings": [
                "--custom-megatron-init-path",
                "--custom-megatron-before-log-prob-hook-path",
                "--custom-megatron-before-train-step-hook-path",
                "--custom-config-path",
                "--start-rollout-id",
                "--use-tis",
                "--get-mismatch-metrics",
                "--use-rollout-logprobs",
                "--ci-test",
                "--rollout-top-p",
                "--use-opd",
                "--enable-mtp-training",
                "--num-critic-only-steps",
            ]
        },
    },
    "verl": {
        f"{_VERL}/base.py": {
            "functions": ["EngineRegistry.register", "EngineRegistry.get_engine_cls"]
        },
        f"{_VERL}/megatron/transformer_impl.py": {
            "functions": [
                "MegatronEngine.__init__",
                "MegatronEngine.initialize",
                "MegatronEngine.forward_backward_batch",
            ],
            "calls": ["self.lr_scheduler.step"],
        },
        "verl/workers/engine_workers.py": {"calls": ["self.engine.lr_scheduler_step"]},
        "verl/utils/tensordict_utils.py": {"functions": ["get_non_tensor_data"]},
        "verl/workers/config/optimizer.py": {"attributes": ["use_checkpoint_opt_param_scheduler"]},
        "verl/__init__.py": {"strings": ["VERL_USE_EXTERNAL_MODULES"]},
    },
    "nemo_rl": {
        _NEMO_WORKER: {
            "functions": [
                f"{_WORKER}.{name}"
                for name in (
                    "__init__ train get_logprobs get_reference_policy_logprobs "
                    "begin_train_step get_topk_logits"
                ).split()
            ],
            "calls": ["self.scheduler.step"],
        },
        "nemo_rl/models/policy/lm_policy.py": {
            "functions": ["Policy.__init__", "Policy.run_all_workers_single_data"]
        },
        "nemo_rl/models/policy/utils.py": {"functions": ["get_runtime_env_for_policy_worker"]},
        "nemo_rl/algorithms/logits_sampling_utils.py": {
            "functions": ["need_top_k_or_top_p_filtering"]
        },
        "nemo_rl/algorithms/grpo.py": {
            "functions": ["setup"],
            "attributes": ["seq_logprob_error_threshold", "on_policy_distillation", "loss_fn"],
        },
        "nemo_rl/algorithms/single_controller_utils/setup.py": {
            "functions": ["setup_single_controller"]
        },
        "nemo_rl/algorithms/loss/loss_functions.py": {
            "attributes": ["use_importance_sampling_correction", "use_on_policy_kl_approximation"]
        },
        "nemo_rl/distributed/ray_actor_environment_registry.py": {
            "attributes": ["ACTOR_ENVIRONMENT_REGISTRY", "MCORE_EXECUTABLE"]
        },
    },
    "megatron_lm": {
        "gpt_builders.py": {"functions": ["gpt_builder"]},
        "model_provider.py": {"calls": ["model_builder"]},
        "megatron/training/training.py": {"attributes": ["curr_iteration", "perform_rl_step"]},
        "megatron/training/arguments.py": {
            "attributes": [
                "rl_training_cuda_graphs",
                "optimizer_cpu_offload",
                "use_torch_fsdp2",
                "use_megatron_fsdp",
            ],
            "strings": ["--grpo-iterations", "--grpo-prompts-per-step", "--grpo-group-size"],
        },
        "megatron/training/models/base.py": {"attributes": ["pre_wrap_hooks"]},
        "megatron/core/optimizer/optimizer_config.py": {"attributes": ["optimizer_cuda_graph"]},
        "megatron/core/inference/utils.py": {"functions": ["InferenceMode.is_active"]},
        "megatron/rl/rl_utils.py": {
            "functions": ["get_grpo_data_iterator"],
            "attributes": [
                "last_collection_iteration",
                "rl_inference_logprobs_is_correction",
                "grpo_prompts_per_step",
                "grpo_group_size",
                "global_batch_size",
            ],
        },
    },
    "megatron_bridge": {
        "src/megatron/bridge/models/model_provider.py": {
            "functions": ["ModelProviderMixin.register_pre_wrap_hook"]
        },
        "src/megatron/bridge/training/setup.py": {"attributes": ["pre_wrap_hooks"]},
    },
}


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, str]]:
    """Each function of a module with the names of its parameters; a `=` follows keywords."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            rest = [f"*{node.args.vararg.arg}"] if node.args.vararg else []
            keywords = [f"{a.arg}=" for a in node.args.kwonlyargs]
            last = [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
            yield outer + node.name, ", ".join([*names, *rest, *keywords, *last])
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{outer}{node.name}.")


def _calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
            arguments = [*map(ast.unparse, node.args), *keywords]
            yield ast.unparse(node.func), ", ".join(arguments)


def answers(source: str, questions: dict[str, list[str]]) -> dict[str, Any]:
    """What `source` says to `questions`; a name that it does not have is left out."""
    tree = ast.parse(source)
    parameters = dict(functions(tree))
    found: dict[str, Any] = {}
    for kind, names in questions.items():
        if kind == "functions":
            found[kind] = {n: parameters[n] for n in names if n in parameters}
        elif kind == "calls":
            made = [(name, arguments) for name, arguments in _calls(tree) if name in names]
            found[kind] = {name: sorted(a for n, a in made if n == name) for name in dict(made)}
        else:
            words = {str(getattr(node, "value", "")) for node in ast.walk(tree)}
            words |= {
                str(getattr(node, "attr", getattr(node, "id", ""))) for node in ast.walk(tree)
            }
            found[kind] = [name for name in names if name in words]
    return found


def record(pipeline: str, checkout: Path) -> dict[str, Any]:
    """The commit of `checkout`, and what its files say to the questions about `pipeline`."""
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    files = {
        name: answers((checkout / name).read_text(encoding="utf-8"), questions)
        for name, questions in QUESTIONS[pipeline].items()
    }
    return {"commit": commit, "files": files}


def main(argv: Sequence[str]) -> None:
    """Replace what is recorded of the pipelines whose checkouts are named."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for argument in argv:
        pipeline, _, checkout = argument.partition("=")
        recorded[pipeline] = record(pipeline, Path(checkout))
    RECORD.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
