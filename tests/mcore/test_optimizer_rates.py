"""Layers with rates of their own, frozen ones, and updates that are not finite."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.mcore.weight_stream import trained_units
from tests.mcore.actors import (
    full_gradients,
    random_batch,
    replica_gap,
    run_config,
    snapshot,
    start_trainer,
    train_once,
)
from tests.ranks import run_ranks
from tests.tiers import WIDE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.config.schema import Config
    from megatron_bupo.mcore.trainer import MegatronTrainer

pytestmark = pytest.mark.slow

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
INTERNAL = InternalLayerPolicy(3)
FACTORS = {"1": 0.0, "2-3": 0.1, "4": 2.0, "final_norm": 0.5}
DIST_OPT: dict[str, Any] = {"tp": 2, "dp": 2, "distributed_optimizer": True}


def test_every_unit_has_the_factor_of_the_key_that_names_it(tiny_model_dir: Callable[..., Path]):
    from megatron_bupo.hf.architecture import read_architecture

    untied = read_architecture(tiny_model_dir(**MODEL, tied=False))
    factors = {**FACTORS, "unembedding": 0.0}
    full = {"embedding": 1.0, "layer 2": 0.1, "layer 3": 0.1, "layer 4": 2.0, "final_norm": 0.5}
    assert trained_units(FULL, untied, factors) == full
    internal = {unit: full[unit] for unit in ("embedding", "layer 2", "layer 3")}
    assert trained_units(INTERNAL, untied, factors) == internal
    assert list(trained_units(FULL, untied)) == [
        *("embedding", "layer 1", "layer 2", "layer 3", "layer 4", "final_norm", "unembedding")
    ]


def _factor_of(name: str, factors: dict[str, float]) -> float:
    """The factor of an HF tensor, read off its name."""
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2]) + 1
        return {1: factors["1"], 2: factors["2-3"], 3: factors["2-3"], 4: factors["4"]}[layer]
    unit = {"model.norm.weight": "final_norm", "model.embed_tokens.weight": "embedding"}
    return factors.get(unit.get(name, "unembedding"), 1.0)


def _masters(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """The weights as the optimizer keeps them, by HF name: fp32 copies of bfloat16 ones."""
    stream = copy.copy(trainer.weights)
    stream.dtype = torch.float32
    stream.held = {
        unit: [replace(h, parameter=nn.Parameter(_master(h.parameter))) for h in parts]
        for unit, parts in trainer.weights.held.items()
    }
    names = trained_units(FULL, trainer.arch)
    return {name: tensor.clone() for name, tensor in stream.tensors(names)}


def _master(parameter: Any) -> Tensor:
    return getattr(parameter, "main_param", parameter).detach().float()


def _against_dense_groups(
    model_dir: Path, config: Config, factors: dict[str, float]
) -> dict[str, float]:
    """Three internal and three full steps beside torch's AdamW, a dense one with a group per HF
    tensor, fed the same gradients: the largest distance, and that of the gradient norms.
    """
    trainer, batch = start_trainer(model_dir, config), random_batch()
    exact = config.parallel.distributed_optimizer is False
    weights = {n: nn.Parameter(w) for n, w in _masters(trainer).items()}
    rates = {name: _factor_of(name, factors) for name in weights}
    groups = [{"params": [w], "lr": rates[name]} for name, w in weights.items()]
    dense = torch.optim.AdamW(groups, weight_decay=0.1)
    norms = []
    for step in range(6):
        policy, lr = INTERNAL if step < 3 else FULL, 1e-3 * (1 + step)
        report = train_once(trainer, batch, policy, lr).metrics
        # Trained: what changed_weights sends; a frozen or skipped tensor has no gradient.
        trained = {name for name, _ in trainer.changed_weights(policy)}
        for name, grad in full_gradients(trainer).items():
            weights[name].grad = grad if name in trained else None
        for group, rate in zip(dense.param_groups, rates.values(), strict=True):
            group["lr"] = lr * rate
        norm = math.sqrt(
            sum(float(w.grad.square().sum()) for w in weights.values() if w.grad is not None)
        )
        norms.append(abs(report["update/grad_norm"] / norm - 1))
        dense.step()
    ours = _masters(trainer) if exact else snapshot(trainer)
    return {
        "weights": max(float((ours[n] - w).abs().max()) for n, w in weights.items()),
        "norm": max(norms),
        "replicas": replica_gap(trainer),
    }


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ranks", "layout", "tied", "dtype"),
    [
        pytest.param(1, {}, True, "float32", id="one rank, tied"),
        pytest.param(1, {}, False, "bfloat16", id="one rank, bfloat16"),
        pytest.param(2, {"dp": 2}, False, "float32", id="DP2", marks=WIDE),
        pytest.param(
            2, {"pp": 2}, True, "bfloat16", id="PP2, tied, bfloat16", marks=pytest.mark.slow
        ),
        pytest.param(
            4,
            DIST_OPT,
            False,
            "float32",
            id="TP2 DP2 distributed optimizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_rates_are_those_of_a_dense_adamw_with_parameter_groups(
    ranks: int, layout: dict[str, Any], tied: bool, dtype: str, tiny_model_dir: Callable[..., Path]
):
    """And the gradient norm is that of what is trained: a frozen layer's gradient, which is not
    reduced, would make replicas clip differently. Buckets are small enough to be left out.
    """
    factors = {**FACTORS, "embedding": 0.0} | ({} if tied else {"unembedding": 3.0})
    if tied:
        factors["embedding"] = 0.5
    config = run_config(
        model={"dtype": dtype},
        parallel=layout,
        optimizer={"weight_decay": 0.1, "lr_factors": factors},
        megatron={"bucket_size": 2000},
    )
    model_dir = tiny_model_dir(**MODEL, tied=tied)
    for gaps in run_ranks(ranks, _against_dense_groups, model_dir, config, factors):
        assert gaps["weights"] < 1e-6
        assert gaps["norm"] < 1e-5
        assert gaps["replicas"] == 0


def _frozen_state(trainer: MegatronTrainer) -> list[Tensor]:
    """All that this rank keeps of the frozen layer and the embedding."""
    frozen = {"layer 1", "embedding"}
    held = [h.parameter for u in frozen for h in trainer.weights.held.get(u, [])]
    for inner, parameters in trainer.optimizer._unit_of.items():
        for p in (p for p, unit in parameters.items() if unit in frozen):
            held += [p, inner.state[p]["exp_avg"], inner.state[p]["exp_avg_sq"]]
    return [tensor.detach().clone() for tensor in held]


def _everything(trainer: MegatronTrainer) -> list[Tensor]:
    """All that this rank keeps: parameters, what the optimizer steps, moments, ages."""
    kept = [torch.tensor(list(trainer.optimizer.steps.values()))]
    kept += [h.parameter for parts in trainer.weights.held.values() for h in parts]
    for inner, parameters in trainer.optimizer._unit_of.items():
        for p in parameters:
            kept += [p, inner.state[p]["exp_avg"], inner.state[p]["exp_avg_sq"]]
    return [tensor.detach().clone() for tensor in kept]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _freeze_later(model_dir: Path, config: Config) -> list[bool]:
    """Are layers that have trained, and then are frozen, left alone to the bit by each policy?"""
    trainer, batch = start_trainer(model_dir, config), random_batch()
    train_once(trainer, batch, FULL, 1e-2)
    before, every = _frozen_state(trainer), _everything(trainer)
    optimizer = replace(config.optimizer, lr_factors={"1": 0.0, "embedding": 0.0})
    trainer.config = replace(config, optimizer=optimizer)
    for policy in (INTERNAL, FULL, FULL):
        train_once(trainer, batch, policy, 1e-2)
    sent = {name for name, _ in trainer.changed_weights(FULL)}
    untouched = not {n for n in sent if "layers.0." in n or "embed_tokens" in n}
    return [
        _same(before, _frozen_state(trainer)),
        not _same(every, _everything(trainer)),
        untouched,
    ]


@pytest.mark.parametrize(
    ("ranks", "layout", "dtype"),
    [
        pytest.param(2, {"pp": 2}, "bfloat16", id="PP2, bfloat16"),
        pytest.param(4, DIST_OPT, "bfloat16", id="TP2 DP2 distributed optimizer, bfloat16"),
    ],
)
def test_what_is_frozen_is_neither_stepped_nor_sent(
    ranks: int, layout: dict[str, Any], dtype: str, tiny_model_dir: Callable[..., Path]
):
    config = run_config(model={"dtype": dtype}, parallel=layout, optimizer={"weight_decay": 0.1})
    model_dir = tiny_model_dir(**MODEL, tied=True)
    for answer in run_ranks(ranks, _freeze_later, model_dir, config):
        assert answer == [True] * 3


def _gradients(model_dir: Path, config: Config) -> dict[str, Tensor]:
    trainer = start_trainer(model_dir, config)
    train_once(trainer, random_batch(), FULL, 0.0)
    return full_gradients(trainer)


@pytest.mark.parametrize(
    ("ranks", "layout", "megatron"),
    [
        pytest.param(
            1,
            {},
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 2,
            },
            id="one rank, recomputed in pairs",
        ),
        pytest.param(4, {"pp": 4}, {}, id="PP4, two stages frozen"),
        pytest.param(2, {"pp": 2, "vpp": 2}, {}, id="PP2 VPP2", marks=pytest.mark.slow),
    ],
)
def test_backward_stops_below_the_lowest_layer_that_learns_which_changes_no_gradient_above(
    ranks: int,
    layout: dict[str, Any],
    megatron: dict[str, Any],
    tiny_model_dir: Callable[..., Path],
):
    def gradients(**factors: float) -> dict[str, Tensor]:
        optimizer = {"lr_factors": factors}
        config = run_config(parallel=layout, megatron=megatron, optimizer=optimizer)
        return run_ranks(ranks, _gradients, tiny_model_dir(**MODEL, tied=False), config)[0]

    whole, frozen = gradients(), gradients(**{"1-3": 0.0, "embedding": 0.0})
    below = {n for n in whole if "embed_tokens" in n or n.startswith(BELOW)}
    assert len(below) == 1 + 3 * 11
    for name, grad in frozen.items():
        assert torch.equal(grad, torch.zeros_like(grad) if name in below else whole[name]), name


BELOW = tuple(f"model.layers.{i}." for i in range(3))


def _skip(model_dir: Path, config: Config) -> list[Any]:
    """A good update, one whose loss is not finite on one rank alone, two that are not finite, and
    a good one: what the bad ones changed, what they reported, and where the run ends.
    """
    trainer, batch = start_trainer(model_dir, config), random_batch()
    train_once(trainer, batch, FULL, 1e-2)
    before, reports = _everything(trainer), []
    # The good update's gradients are still there.
    bad_here = math.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    norm = trainer.optimizer.step(trainer.trained(FULL), 1e-2, loss=bad_here)
    for row, advantage in ((2, math.nan), (4, 1e30)):  # each on one data-parallel rank alone
        advantages = batch.advantages.clone()
        advantages[row] = advantage
        reports.append(train_once(trainer, replace(batch, advantages=advantages), FULL, 1e-2))
    unchanged = _same(before, _everything(trainer))
    reports.append(train_once(trainer, batch, FULL, 1e-2))
    seen = [[report.metrics[k] for k in KEYS] for report in reports]
    return [unchanged, math.isfinite(norm), seen, snapshot(trainer)]


KEYS = ("update/loss", "update/grad_norm", "update/skipped")


def _twice(model_dir: Path, config: Config) -> dict[str, Tensor]:
    trainer = start_trainer(model_dir, config)
    for _ in range(2):
        train_once(trainer, random_batch(), FULL, 1e-2)
    return snapshot(trainer)


@pytest.mark.parametrize(
    ("ranks", "layout", "dtype"),
    [
        pytest.param(1, {}, "float32", id="one rank"),
        pytest.param(2, {"dp": 2}, "bfloat16", id="DP2, bfloat16"),
        pytest.param(4, {"tp": 2, "pp": 2}, "float32", id="TP2 PP2", marks=WIDE),
        pytest.param(
            4,
            DIST_OPT,
            "bfloat16",
            id="TP2 DP2 distributed optimizer, bfloat16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_update_that_is_not_finite_changes_nothing_on_any_rank(
    ranks: int, layout: dict[str, Any], dtype: str, tiny_model_dir: Callable[..., Path]
):
    config = run_config(
        model={"dtype": dtype}, parallel=layout, optimizer={"weight_decay": 0.1, "clip_grad": 1.0}
    )
    model_dir = tiny_model_dir(**MODEL)
    undisturbed = run_ranks(ranks, _twice, model_dir, config)
    answers = run_ranks(ranks, _skip, model_dir, config)
    for (unchanged, finite, seen, weights), expected in zip(answers, undisturbed, strict=True):
        assert unchanged
        assert not finite
        (nan_loss, nan_norm, skipped), (loss, norm, also_skipped), (*_, made) = seen
        assert (skipped, also_skipped, made) == (1, 1, 0)
        assert math.isnan(nan_loss)
        assert math.isnan(nan_norm)
        assert math.isfinite(loss)
        assert norm == math.inf
        assert all(torch.equal(w, expected[name]) for name, w in weights.items())
