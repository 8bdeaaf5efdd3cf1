"""What each step moves, and by how much: bit for bit above the target, against a hand-written Adam
below it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, PhaseSchedule
from megatron_bupo.config.schema import BupoConfig, Config, OptimizerConfig
from megatron_bupo.mcore.learning_rate import learning_rate
from tests.dense import dense_logprobs, dense_model
from tests.mcore.actors import (
    another_trainer,
    full_gradients,
    random_batch,
    replica_gap,
    run_config,
    snapshot,
    start_trainer,
    train_once,
)
from tests.mcore.group_adam import use_group_counting_adam
from tests.ranks import run_ranks
from tests.tiers import WIDE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.mcore.trainer import MegatronTrainer
    from megatron_bupo.types import TokenBatch

INTERNAL = InternalLayerPolicy(2)
LR = 1e-2
MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
MOE = MODEL | {"family": "qwen3_moe"}
TP2_DP2: tuple[int, dict[str, Any]] = (4, {"tp": 2, "dp": 2, "distributed_optimizer": True})
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "PP2": (2, {"pp": 2}),
    "DP2 distributed optimizer": (2, {"dp": 2, "distributed_optimizer": True}),
    "TP2 DP2 distributed optimizer": TP2_DP2,
}
# By themselves these meet every optimizer of Megatron's and both copies of a tied unembedding.
FAST = [
    ("one rank", False, "float32"),
    ("one rank", False, "bfloat16"),
    ("PP2", True, "float32"),
]
SLOW = [
    ("PP2", False, "bfloat16"),
    ("DP2 distributed optimizer", False, "float32"),
    ("TP2 DP2 distributed optimizer", True, "bfloat16"),
]


def _marks(case: tuple[str, bool, str]) -> list[pytest.MarkDecorator]:
    if case in FAST:
        return []
    return [pytest.mark.slow] if case in SLOW else WIDE


FREEZING = [
    pytest.param(
        *LAYOUTS[name],
        tied,
        dtype,
        id=f"{name}{', tied' if tied else ''}, {dtype}",
        marks=_marks((name, tied, dtype)),
    )
    for name in LAYOUTS
    for tied in (False, True)
    for dtype in ("float32", "bfloat16")
]
BIGGEST = pytest.param(
    8,
    {"tp": 2, "pp": 2, "dp": 2, "distributed_optimizer": True},
    True,
    "bfloat16",
    id="TP2 PP2 DP2 distributed optimizer, tied, bfloat16",
    marks=WIDE,
)
EXPERTS = pytest.param(
    4,
    {"tp": 2, "dp": 2, "ep": 2, "sp": True, "distributed_optimizer": True},
    False,
    "bfloat16",
    id="TP2 EP2 SP distributed optimizer, experts, bfloat16",
    marks=pytest.mark.slow,
)


def _optimizer_state(trainer: MegatronTrainer) -> dict[str, list[Tensor]]:
    """By unit, all that this rank keeps of it: parameters, the tensors that the optimizer steps
    (master weights or shards of them), both moments, and the step counters.
    """
    kept: dict[str, list[Tensor]] = {
        unit: [held.parameter.detach().clone() for held in parts]
        for unit, parts in trainer.weights.held.items()
    }
    for inner, parameters in trainer.optimizer._unit_of.items():
        for p, unit in parameters.items():
            state = inner.state[p]
            age = torch.tensor(trainer.optimizer.steps[unit])
            moments = [state["exp_avg"], state["exp_avg_sq"], age]
            kept.setdefault(unit, []).extend(t.detach().clone() for t in (p, *moments))
    return kept


def _moved(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> dict[str, bool]:
    """Has anything of the unit changed? Asked bit for bit."""
    return {
        unit: any(not torch.equal(a, b) for a, b in zip(before[unit], after[unit], strict=True))
        for unit in before
    }


def _phases(model_dir: Path, config: Config, batch: TokenBatch) -> list[dict[str, bool]]:
    """Which units three internal steps move, after a full step; then which a full step moves."""
    trainer = start_trainer(model_dir, config)
    train_once(trainer, batch, FULL, LR)
    before = _optimizer_state(trainer)
    for _ in range(3):
        train_once(trainer, batch, INTERNAL, LR)
    between = _optimizer_state(trainer)
    trainer.begin_phase()
    train_once(trainer, batch, FULL, LR)
    assert replica_gap(trainer) == 0
    return [_moved(before, between), _moved(between, _optimizer_state(trainer))]


@pytest.mark.parity
@pytest.mark.parametrize(("ranks", "layout", "tied", "dtype"), [*FREEZING, BIGGEST, EXPERTS])
def test_internal_steps_leave_all_above_the_target_bit_identical(
    ranks: int, layout: dict[str, Any], tied: bool, dtype: str, tiny_model_dir: Callable[..., Path]
):
    """Momentum and weight decay would move it: a full step came before, and decay is on."""
    config = run_config(
        model={"dtype": dtype}, parallel=layout, optimizer={"weight_decay": 0.1, "lr": LR}
    )
    model_dir = tiny_model_dir(**(MOE if "ep" in layout else MODEL), tied=tied)
    answers = run_ranks(ranks, _phases, model_dir, config, random_batch())
    seen = set()
    for internal, full in answers:
        assert all(full.values())
        for unit, moved in internal.items():
            assert moved == (unit not in {"layer 3", "layer 4", "final_norm"}), unit
            seen.add(unit)
    assert {"embedding", "layer 1", "layer 2", "layer 3", "layer 4", "final_norm"} <= seen


class Adam:
    """AdamW by the book (Loshchilov and Hutter, algorithm 2), in fp64, one tensor at a time.

    Norms and biases decay like all the rest, as under the authors' FSDP.
    """

    def __init__(self, weights: dict[str, Tensor], *, at_switch: str, decay: float) -> None:
        self.weights = {name: w.double().clone() for name, w in weights.items()}
        self.at_switch, self.decay = at_switch, decay
        self.reset()

    def reset(self) -> None:
        self.first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.steps = dict.fromkeys(self.weights, 0)

    def step(self, grads: dict[str, Tensor], trained: set[str], lr: float) -> None:
        for name, weight in self.weights.items():
            if name in trained or self.at_switch == "common_step":
                self.steps[name] += 1
            if name not in trained:
                continue
            grad, t = grads[name].double(), self.steps[name]
            self.first[name] = 0.9 * self.first[name] + 0.1 * grad
            self.second[name] = 0.999 * self.second[name] + 0.001 * grad**2
            mean = self.first[name] / (1 - 0.9**t)
            rms = (self.second[name] / (1 - 0.999**t)).sqrt()
            self.weights[name] = weight - lr * (mean / (rms + 1e-8) + self.decay * weight)


def _distance_to_adam(
    model_dir: Path, layout: dict[str, Any], batch: TokenBatch, at_switch: list[str]
) -> dict[str, float]:
    """How far three internal and three full steps end from the hand-written Adam's."""
    gaps = {}
    for policy_at_switch in at_switch:
        config = run_config(
            parallel=layout,
            optimizer={"weight_decay": 0.1},
            bupo={"optimizer_at_switch": policy_at_switch},
        )
        start = start_trainer if not gaps else another_trainer
        trainer = start(model_dir, config)
        reference = Adam(snapshot(trainer), at_switch=policy_at_switch, decay=0.1)
        internal = {name for name, _ in trainer.changed_weights(INTERNAL)}
        for step in range(6):
            policy = INTERNAL if step < 3 else FULL
            if step == 3:
                trainer.begin_phase()
                if policy_at_switch == "reset":
                    reference.reset()
            train_once(trainer, batch, policy, lr=1e-3 * (1 + step))
            trained = internal if step < 3 else set(reference.weights)
            reference.step(full_gradients(trainer), trained, lr=1e-3 * (1 + step))
        ours = snapshot(trainer)
        gaps[policy_at_switch] = max(
            float((ours[name] - weight).abs().max()) for name, weight in reference.weights.items()
        )
    return gaps


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(4, {"pp": 4}, id="PP4", marks=WIDE),
        pytest.param(*TP2_DP2, id="TP2 DP2 distributed optimizer", marks=pytest.mark.slow),
    ],
)
def test_each_treatment_of_adam_at_a_switch_is_what_it_says(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    """Under PP4 a stage holds nothing but layers that the internal phase leaves alone."""
    treatments = ["per_layer_step", "common_step", "reset"]
    answers = run_ranks(
        ranks, _distance_to_adam, tiny_model_dir(**MODEL), layout, random_batch(), treatments
    )
    for gaps in answers:
        assert gaps.keys() == set(treatments)
        assert max(gaps.values()) < 1e-6, gaps


def _distance_with_group_counters(*args: Any) -> dict[str, float]:
    use_group_counting_adam()
    return _distance_to_adam(*args)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(*TP2_DP2, id="TP2 DP2 distributed optimizer", marks=pytest.mark.slow),
    ],
)
def test_an_adam_that_counts_steps_by_group_does_the_same(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    """Such as Transformer Engine's and apex's, which have no counter for each parameter."""
    model_dir, treatments = tiny_model_dir(**MODEL), ["per_layer_step", "common_step", "reset"]
    answers = run_ranks(
        ranks, _distance_with_group_counters, model_dir, layout, random_batch(), treatments
    )
    for gaps in answers:
        assert max(gaps.values()) < 1e-6, gaps


def _clipped(model_dir: Path, layout: dict[str, Any], batch: TokenBatch) -> list[float]:
    trainer = start_trainer(model_dir, run_config(parallel=layout, optimizer={"clip_grad": 0.05}))
    reported = train_once(trainer, batch, FULL, LR).metrics["update/grad_norm"]
    grads = full_gradients(trainer)
    return [reported, math.sqrt(sum(float(g.square().sum()) for g in grads.values()))]


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), (4, {"tp": 2, "pp": 2})], ids=["one rank", "TP2 PP2"]
)
def test_gradients_are_clipped_by_their_global_norm_which_is_reported_unclipped(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    for reported, used in run_ranks(
        ranks, _clipped, tiny_model_dir(**MODEL), layout, random_batch()
    ):
        assert reported > 0.1
        assert used == pytest.approx(0.05, rel=1e-4)


def test_the_learning_rate_follows_its_closed_form():
    def rates(steps: int, **optimizer: Any) -> list[float]:
        config = Config(steps=steps, optimizer=OptimizerConfig(**optimizer))
        return [learning_rate(step, config) for step in range(steps)]

    assert rates(4, lr=0.5) == [0.5] * 4
    assert rates(5, lr=0.6, warmup_steps=3) == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6])
    linear = rates(6, lr=1.0, min_lr=0.2, warmup_steps=2, decay="linear")
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])
    assert rates(8, lr=1.0, min_lr=0.1, decay="cosine") == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    )


def test_the_learning_rate_warms_up_again_after_each_switch_where_that_is_asked_for():
    schedule = PhaseSchedule.of([(1, 2), (3, 2)])
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.0, decay="linear")

    def rates(at_switch: str) -> list[float]:
        bupo = BupoConfig(optimizer_at_switch=at_switch, switch_warmup_steps=4)
        config = Config(steps=10, optimizer=optimizer, bupo=bupo)
        return [
            learning_rate(step, config, phase_start=schedule.phase_start(step))
            for step in range(10)
        ]

    without = [1 - step / 10 for step in range(10)]
    ramps = [1, 1, 1 / 4, 2 / 4, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert rates("per_layer_step") == pytest.approx(without)
    assert rates("warmup") == pytest.approx([a * b for a, b in zip(without, ramps, strict=True)])


def _bfloat16_logprobs(model_dir: Path, layout: dict[str, Any], batch: TokenBatch) -> list[Tensor]:
    trainer = start_trainer(model_dir, run_config(model={"dtype": "bfloat16"}, parallel=layout))
    return [trainer.logprobs(batch, policy)[0] for policy in (FULL, INTERNAL)]


@pytest.mark.parametrize(
    ("ranks", "layout"), [(1, {}), (4, {"tp": 2, "pp": 2})], ids=["one rank", "TP2 PP2"]
)
def test_bfloat16_logprobs_are_as_near_to_fp32_as_transformers_own(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path]
):
    batch, model_dir = random_batch(responses=12), tiny_model_dir(**MODEL)
    exact, rounded = dense_model(model_dir), dense_model(model_dir, torch.bfloat16)
    answers = run_ranks(ranks, _bfloat16_logprobs, model_dir, layout, batch)
    for i, policy in enumerate((FULL, INTERNAL)):
        with torch.no_grad():
            reference, _ = dense_logprobs(exact, batch, policy)
            theirs, _ = dense_logprobs(rounded, batch, policy)
        for answer in answers:
            error = (answer[i] - reference).square().mean().sqrt()
            assert 0 < error < 1.5 * (theirs - reference).square().mean().sqrt()
