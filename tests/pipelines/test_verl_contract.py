"""The engine inside the real verl, on a CPU: skipped where verl is not installed.

    pip install --no-deps --requirement constraints/verl.txt
    python -m pytest tests/pipelines/test_verl_contract.py

What stands in: Ray, which is only imported; the model, as building verl's own needs Transformer
Engine; and the Triton kernel of the fused path. The engine, its batches, its forward passes, its
optimizer, scheduler and checkpoints are verl's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from megatron_bupo.mcore import cpu
from tests.pipelines.tiny_gpt import TOKENS, read_by_hand, tiny_gpt
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed"),
]
ADAPTER = "megatron_bupo.pipelines.verl"
RAY = (
    "ray ray.actor ray.exceptions ray.experimental ray.experimental.state "
    "ray.experimental.state.api ray.util ray.util.collective ray.util.placement_group "
    "ray.util.scheduling_strategies"
)
OTHER = torch.tensor([2, 7, 1, 8, 2])  # a second response, so that rows are packed


class _Ray(ModuleType):
    """Names that verl imports, and decorators that do nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **_: args[0] if args and callable(args[0]) else lambda made: made


@pytest.fixture(autouse=True)
def _verl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", ADAPTER)
    monkeypatch.setenv("BUPO_TARGET_LAYER", "2")
    monkeypatch.setenv("BUPO_INTERNAL_STEPS", "1")
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        sys.modules.update({name: _Ray(name) for name in RAY.split()})
    importlib.import_module("verl")


def _engine(model_dir: Path, *, fused: bool) -> Any:
    """verl's engine with a tiny model in the place of the one that its bridge would build."""
    from megatron.core.distributed import DistributedDataParallel as DDP
    from megatron.core.distributed import DistributedDataParallelConfig
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    registered: Any = EngineRegistry.get_engine_cls("language_model", "megatron")
    assert registered.__module__ == ADAPTER

    class Engine(registered):
        def _build_tf_config(self) -> None:
            self.param_dtype = self.dtype = torch.float32
            self.is_value_model = self.share_embeddings_and_output_weights = False
            self.provider = self.bridge = self.peft_cls = None
            self.vanilla_bridge, self.tf_config = False, None

        def _build_megatron_module(self) -> list[Any]:
            gpt = tiny_gpt()
            self.by_hand = {len(r): read_by_hand(gpt, r[None]) for r in (TOKENS[0], OTHER)}
            self.tf_config: Any = gpt.config
            settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
            return [DDP(gpt.config, settings, gpt)]

    cpu.install()
    torch.cuda.mem_get_info = lambda *_: (1, 1)  # type: ignore[assignment]
    model = HFModelConfig(path=str(model_dir), load_tokenizer=False)
    model.tokenizer = SimpleNamespace(pad_token_id=0)
    engine = Engine(
        model,
        McoreEngineConfig(
            use_dist_checkpointing=True, use_remove_padding=True, use_fused_kernels=fused
        ),
        McoreOptimizerConfig(
            lr=0.1, total_training_steps=9, use_checkpoint_opt_param_scheduler=True
        ),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


def _batch() -> Any:
    from verl.utils import tensordict_utils as tu

    rows = [TOKENS[0], OTHER]
    tensors = {
        "input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
        "loss_mask": torch.nested.as_nested_tensor(
            [torch.ones_like(row) for row in rows], layout=torch.jagged
        ),
        "temperature": torch.ones(2),
    }
    return tu.get_tensordict(tensors, {"use_dynamic_bsz": True, "max_token_len_per_gpu": 64})


def _known(engine: Any, policy: str) -> list[Tensor]:
    """Each response's log-probs but for the first token's, by hand."""
    known = []
    for row in (TOKENS[0], OTHER):
        logits = engine.by_hand[len(row)][policy][0, :-1]
        known.append(logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0])
    return known


def _dense_kernel(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *_: Any
) -> Any:
    log_p = (hidden.flatten(0, 1) @ weight.t() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels.flatten()[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _phases(model_dir: Path, fused: bool, saved: Path) -> dict[str, Any]:
    from verl.models.mcore import model_forward_fused

    model_forward_fused.linear_cross_entropy = _dense_kernel
    engine, seen = _engine(model_dir, fused=fused), []

    def loss(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        seen.append([row[:-1].detach() for row in model_output["log_probs"].unbind()])
        return -model_output["log_probs"].values().sum(), {}

    found: dict[str, Any] = {"internal": _known(engine, "internal layer 2")}
    before = {n: p.detach().clone() for n, p in engine.module[0].module.named_parameters()}
    old = engine.infer_batch(_batch())["model_output"]["log_probs"]
    engine.train_batch(_batch(), loss)
    found |= {"old": [row[:-1] for row in old.unbind()], "new": seen[0]}
    after = engine.module[0].module.named_parameters()
    found["trained"] = {name for name, p in after if not torch.equal(p, before[name])}
    engine.lr_scheduler_step()
    engine.save_checkpoint(str(saved), global_step=1)
    engine.infer_batch(_batch())
    found["then"] = str(engine.controller.policy)

    resumed = _engine(model_dir, fused=fused)
    resumed.infer_batch(_batch())
    resumed.train_batch(_batch(), loss)  # Megatron loads into torch's optimizers once they stepped
    found["before"] = str(resumed.controller.policy)
    with torch.no_grad():  # as fp32 parameters are their own main parameters
        resumed.load_checkpoint(str(saved))
    resumed.infer_batch(_batch())
    found["resumed"] = str(resumed.controller.policy)
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_the_internal_phase_in_verls_own_engine(
    fused: bool, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    [found] = run_ranks(1, _phases, tiny_model_dir(), fused, tmp_path / "checkpoint")
    for of_engine in (found["old"], found["new"]):
        for row, known in zip(of_engine, found["internal"], strict=True):
            torch.testing.assert_close(row, known, atol=1e-6, rtol=0)
    ends = {"embedding.word_embeddings.weight", "output_layer.weight"}
    layers = {name.split(".")[2] for name in found["trained"] - ends}
    assert layers == {"0", "1"}
    assert found["trained"] >= ends
    assert found["then"] == "full"
    assert (found["before"], found["resumed"]) == ("internal layer 2", "full")
