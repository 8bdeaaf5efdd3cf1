"""What is frozen stays as it is under each of Megatron's optimizers and each way to exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from examples import policy_gradient
from megatron_bupo.mcore import cpu
from megatron_bupo.pipelines import PhaseController, PhaseSchedule, attach
from tests.ranks import run_ranks
from tests.tiers import WIDE

if TYPE_CHECKING:
    from torch import Tensor

VOCAB, LAYERS = 64, 6


def _model(*, pp: int = 1, bf16: bool = False, wrap: bool = True, **sharing: Any) -> Any:
    """Chunks and optimizer as a pipeline builds them; `wrap=False`: the bare GPTModel."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1 + mpu.get_pipeline_model_parallel_rank())
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        VOCAB,
        64,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    return (gpt, *_wrap(gpt, bf16=bf16, **sharing)) if wrap else gpt


def _wrap(gpt: GPTModel, *, bf16: bool = False, **sharing: Any) -> tuple[list[Any], Any]:
    config = gpt.config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **sharing)
    chunk = DistributedDataParallel(config, ddp, Float16Module(config, gpt) if bf16 else gpt)
    if ddp.overlap_grad_reduce:
        config.no_sync_func, config.grad_sync_func = chunk.no_sync, chunk.start_grad_sync
    if ddp.overlap_param_gather and ddp.align_param_gather:
        config.param_sync_func = chunk.start_param_sync
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        clip_grad=0.0,  # the norm is a sum over shards, in whose order bits may change
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
    )
    return [chunk], get_megatron_optimizer(settings, [chunk])


def _batch(step: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(10 * step + mpu.get_data_parallel_rank())
    ids = torch.randint(0, VOCAB, (4, 12), generator=made)
    advantages = torch.randn(4, 1, generator=made).expand(4, 12)
    return {"input_ids": ids, "advantages": advantages, "mask": torch.ones(4, 12)}


def _start(pp: int = 1) -> None:
    cpu.install()
    mpu.initialize_model_parallel(pipeline_model_parallel_size=pp)


def _step(controller: PhaseController, step: int, chunks: Any, optimizer: Any) -> None:
    controller.set_step(step)
    policy_gradient.train(chunks, optimizer, [_batch(step)])


def _weights(gpt: GPTModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in gpt.named_parameters()}


def _above(gpt: Any, layer: int) -> set[str]:
    """The parameters that the internal policy of `layer` does not reach."""
    found = {n for n, _ in gpt.named_parameters() if n.startswith("decoder.final_layernorm.")}
    for at, module in enumerate(gpt.decoder.layers):
        if module.layer_number > layer:
            found |= {f"decoder.layers.{at}.{name}" for name, _ in module.named_parameters()}
    return found


def _inner(optimizer: Any) -> list[Any]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if part.optimizer is not None]


KINDS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "distributed fp32": {"use_distributed_optimizer": True},
    "distributed bf16": {"bf16": True, "use_distributed_optimizer": True},
}


def _freeze(kind: str, order: str) -> None:
    _start()
    schedule = PhaseSchedule.of([(2, 2), (4, 1)])
    if order == "attached first":
        gpt = _model(wrap=False, bf16=KINDS[kind].get("bf16", False))
        controller = attach([gpt], schedule)
        chunks, optimizer = _wrap(gpt, **KINDS[kind])
    else:
        gpt, chunks, optimizer = _model(**KINDS[kind])
        controller = attach(chunks, schedule)
    for step, layer in enumerate((2, 2, 4, LAYERS)):
        before = _weights(gpt)
        _step(controller, step, chunks, optimizer)
        frozen = _above(gpt, layer) if layer < LAYERS else set()
        still = {name for name, p in gpt.named_parameters() if torch.equal(p, before[name])}
        assert frozen <= still, step
        if "bf16" not in kind:  # where a step may be too small for a weight
            assert still == frozen
        for inner in _inner(optimizer):
            stepped = {p for group in inner.param_groups for p in group["params"]}
            assert set(inner.state) == stepped  # as Megatron's checkpoints demand
            trained = {p for p in stepped if inner.state[p]["exp_avg"].any()}
            if layer != 4:  # of which a rank may hold what lies below alone
                assert (trained < stepped) == (layer == 2)
            assert not any(inner.state[p]["exp_avg_sq"].any() for p in stepped - trained)


@pytest.mark.parametrize(
    ("kind", "order"),
    [*((kind, "attached last") for kind in KINDS), ("distributed bf16", "attached first")],
)
def test_what_the_phase_does_not_train_keeps_its_bits(kind: str, order: str):
    run_ranks(2, _freeze, kind, order)


def _after_a_switch(pp: int, sharing: dict[str, Any]) -> dict[str, Tensor]:
    _start(pp)
    gpt, chunks, optimizer = _model(pp=pp, use_distributed_optimizer=True, **sharing)
    controller = attach(chunks, PhaseSchedule.of([(2, 3)]))
    for step in range(6):
        _step(controller, step, chunks, optimizer)
    if sharing.get("overlap_param_gather"):
        chunks[0].start_param_sync(force_sync=True)
    return _weights(gpt)


OVERLAPS: dict[str, dict[str, Any]] = {
    "gradients": {"overlap_grad_reduce": True},
    "parameters": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "parameters, aligned": {
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "align_param_gather": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlap", "pp"),
    [
        ("gradients", 2),
        ("parameters", 1),
        pytest.param("parameters, aligned", 2, marks=WIDE),
    ],
)
def test_exchanges_that_overlap_with_the_passes_change_no_bit(overlap: str, pp: int):
    plain = run_ranks(2 * pp, _after_a_switch, pp, {})
    small = {"bucket_size": 9000}  # less than a layer: there are buckets without a trained layer
    found = run_ranks(2 * pp, _after_a_switch, pp, OVERLAPS[overlap] | small)
    for ours, theirs in zip(found, plain, strict=True):
        assert {n for n, p in ours.items() if not torch.equal(p, theirs[n])} == set()


def _resumed() -> None:
    _start()
    schedule, runs = PhaseSchedule.of([(2, 2)]), []
    for stop in (None, 1, 3):  # in either phase
        gpt, chunks, optimizer = _model()
        controller = attach(chunks, schedule)
        for step in range(5):
            if step == stop:
                kept = gpt.state_dict(), optimizer.state_dict()
                controller.detach()
                gpt, chunks, optimizer = _model()
                gpt.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
                controller = attach(chunks, schedule)
            _step(controller, step, chunks, optimizer)
        controller.detach()
        runs.append(_weights(gpt))
    for other in runs[1:]:
        assert {n for n, p in runs[0].items() if not torch.equal(p, other[n])} == set()


def test_an_optimizers_checkpoint_holds_what_its_layers_have_missed():
    run_ranks(1, _resumed)


def _read_without_a_call() -> bool:
    _start()
    small = {"use_distributed_optimizer": True, "bucket_size": 1000}  # the unembedding has its own
    gpt, chunks, optimizer = _model(**small, **OVERLAPS["parameters"])
    controller = attach(chunks, PhaseSchedule.of([(2, 3)]))
    _step(controller, 0, chunks, optimizer)
    gpt.post_process = False  # what reads the unembedding is some fused loss
    policy_gradient.run(chunks, _batch(0), lambda *_, **__: torch.zeros(()), forward_only=True)
    read = gpt.output_layer.weight.clone()
    chunks[0].start_param_sync(force_sync=True)
    return torch.equal(read, gpt.output_layer.weight)


def test_an_unembedding_that_is_read_without_a_call_of_its_module_has_been_gathered():
    assert run_ranks(2, _read_without_a_call) == [True, True]
