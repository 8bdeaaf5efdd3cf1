"""The engine inside the real verl, on a CPU: skipped where verl is not installed.

    pip install --no-deps --requirement constraints/verl.txt
    python -m pytest tests/pipelines/test_verl_contract.py

What stands in: Ray, which is only imported; the model, built and filled by us, as building verl's
own needs Transformer Engine; and the Triton kernel of the fused path. The engine, its batches, its
forward passes, its optimizer, scheduler and checkpoints are verl's.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import cpu, hf_weights
from megatron_bupo.mcore import model as models
from tests.mcore.actors import run_config
from tests.pipelines import scores
from tests.pipelines.tiny_gpt import CausalAttention
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
READ = "old", "new", "then", "again"  # with which policy the engine's log-probs are compared
ROWS = scores.responses()[0], scores.responses()[1, :5]  # of unequal lengths, so they are packed
LAYOUTS = {"one rank": {}, "TP2": {"tp": 2}, "PP2": {"pp": 2}, "TP2 PP2": scores.TP2_PP2}


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


def _chunks(model_dir: Path, layout: dict[str, int]) -> list[Any]:
    """This rank's part of the model at `model_dir`; nothing is attached to it."""
    arch: Any = read_architecture(model_dir)
    config = run_config(parallel=layout)
    native = models.transformer_config(arch, config)
    native.perform_initialization = True  # in vain, but it marks which parameters are shards
    native.variable_seq_lengths = True
    chunks: list[Any] = list(models.build_chunks(arch, config, native))
    with ExitStack() as files:
        hf_weights.load(chunks, arch, slice_opener(read_index(model_dir), files))
    for layer in chunks[0].decoder.layers:
        layer.self_attention.core_attention = CausalAttention()
    return chunks


def _engine(model_dir: Path, layout: dict[str, int], *, fused: bool) -> Any:
    """verl's engine with a tiny model in the place of the one that its bridge would build."""
    from megatron.core.distributed import DistributedDataParallel as DDP
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    for strategy, name in {"megatron": "BupoEngine", "fsdp2": "NoPhases"}.items():
        registered: Any = EngineRegistry.get_engine_cls("language_model", strategy)
        assert (registered.__module__, registered.__name__) == (ADAPTER, name)
    registered = EngineRegistry.get_engine_cls("language_model", "megatron")

    class Engine(registered):
        def _build_tf_config(self) -> None:
            self.param_dtype = self.dtype = torch.float32
            self.is_value_model = self.share_embeddings_and_output_weights = False
            self.provider = self.bridge = self.peft_cls = None
            self.vanilla_bridge, self.tf_config = False, None

        def _build_megatron_module(self) -> list[Any]:
            model_parallel_cuda_manual_seed(0)
            chunks = _chunks(model_dir, layout)
            self.tf_config: Any = chunks[0].config
            settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
            return [DDP(self.tf_config, settings, chunk) for chunk in chunks]

    cpu.install()
    torch.cuda.mem_get_info = lambda *_: (1, 1)  # type: ignore[assignment]
    model = HFModelConfig(path=str(model_dir), load_tokenizer=False)
    model.tokenizer = SimpleNamespace(pad_token_id=0)
    engine = Engine(
        model,
        McoreEngineConfig(
            use_dist_checkpointing=True,
            use_remove_padding=True,
            use_fused_kernels=fused,
            sequence_parallel=False,
            tensor_model_parallel_size=layout.get("tp", 1),
            pipeline_model_parallel_size=layout.get("pp", 1),
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

    tensors = {
        "input_ids": torch.nested.as_nested_tensor(list(ROWS), layout=torch.jagged),
        "loss_mask": torch.nested.as_nested_tensor(
            [torch.ones_like(row) for row in ROWS], layout=torch.jagged
        ),
        "temperature": torch.ones(len(ROWS)),
    }
    return tu.get_tensordict(tensors, {"use_dynamic_bsz": True, "max_token_len_per_gpu": 16})


def _dense_kernel(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *_: Any
) -> Any:
    log_p = (hidden.flatten(0, 1) @ weight.t() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels.flatten()[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _scored(engine: Any) -> list[Tensor]:
    """Each response's log-probs but for the first token's; none but on the last stage."""
    found = engine.infer_batch(_batch()).get("model_output")
    return [row[:-1].detach() for row in found["log_probs"].unbind()] if found else []


def _phases(model_dir: Path, layout: dict[str, int], fused: bool, saved: Path) -> dict[str, Any]:
    from verl.models.mcore import model_forward_fused

    model_forward_fused.linear_cross_entropy = _dense_kernel
    engine, new = _engine(model_dir, layout, fused=fused), []

    def loss(model_output: Any, data: Any, dp_group: Any = None) -> Any:
        new.extend(row[:-1].detach() for row in model_output["log_probs"].unbind())
        return -model_output["log_probs"].values().sum(), {}

    gpt = engine.module[0].module
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    found: dict[str, Any] = {"old": _scored(engine)}
    engine.train_batch(_batch(), loss)
    found["new"] = list(new)
    numbers = [layer.layer_number for layer in gpt.decoder.layers]
    found["trained"] = {
        re.sub(r"layers\.(\d+)", lambda at: f"layers.{numbers[int(at[1])]}", name)
        for name, p in gpt.named_parameters()
        if not torch.equal(p, before[name])
    }
    engine.lr_scheduler_step()
    engine.save_checkpoint(str(saved), global_step=1)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.copy_(before[name])
    found["then"] = _scored(engine)

    resumed = _engine(model_dir, layout, fused=fused)
    found["again"] = _scored(resumed)
    resumed.train_batch(_batch(), loss)  # Megatron loads into torch's optimizers once they stepped
    with torch.no_grad():  # as fp32 parameters are their own main parameters
        resumed.load_checkpoint(str(saved))
    _scored(resumed)
    found["resumed"] = str(resumed.controller.policy)
    return found


def _known(model_dir: Path, folder: Path, policy: str) -> list[Tensor]:
    """What `megatron-bupo score` says of each response."""
    [found] = scores.by_command(model_dir, folder, (policy,))
    return [row[: len(ids) - 1] for row, ids in zip(found, ROWS, strict=False)]


@pytest.mark.parametrize(
    ("layout", "fused", "layer"),
    [
        ("one rank", False, 2),
        ("one rank", True, 2),
        ("TP2", False, 3),
        ("PP2", False, 2),
        ("TP2 PP2", False, 1),
        ("TP2 PP2", False, 3),
    ],
)
def test_the_internal_phase_in_verls_own_engine(
    layout: str,
    fused: bool,
    layer: int,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("BUPO_TARGET_LAYER", str(layer))
    model_dir = tiny_model_dir(**scores.MODEL, family="llama")
    known = _known(model_dir, tmp_path, f"layer={layer}")
    full = _known(model_dir, tmp_path, "full")
    sizes = LAYOUTS[layout]
    world = sizes.get("tp", 1) * sizes.get("pp", 1)
    ranks = run_ranks(world, _phases, model_dir, sizes, fused, tmp_path / "checkpoint")
    for found in ranks:
        assert found["resumed"] == "full"
    last = ranks[-1]
    for of_engine, expected in ((last[at], full if at == "then" else known) for at in READ):
        for row, by_score in zip(of_engine, expected, strict=True):
            torch.testing.assert_close(row, by_score, atol=1e-6, rtol=0)
    trained = set().union(*(found["trained"] for found in ranks))
    ends = {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert {int(name.split(".")[2]) for name in trained - ends} == set(range(1, layer + 1))
    assert trained >= ends
