"""An internal phase on an actor of its own learns what it would learn in the whole model."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from megatron_bupo.algorithm.bupo import FULL, PhaseSchedule
from megatron_bupo.checkpoints import checkpoint_dir
from megatron_bupo.config.schema import ParallelConfig
from megatron_bupo.hf.architecture import read_architecture
from megatron_bupo.mcore import checkpoint, parallel
from megatron_bupo.mcore.phase_actor import ActorPlan, plan_actor
from tests.mcore.actors import random_batch, run_config, snapshot, train_once, with_stale_logprobs
from tests.ranks import run_ranks
from tests.tiers import WIDE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.config.schema import Config

pytestmark = [pytest.mark.parity, pytest.mark.slow]

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
STEPS = 5
RESUMED = (2, 3, 4)  # in an internal phase, at the switch to the full policy, after it
SLOW = [pytest.mark.slow]


@dataclass
class Course:
    """What a run did from some step on."""

    reports: list[dict[str, float]]
    layers: list[int]  # that the actor had, step by step
    weights: dict[str, Tensor]
    updates: dict[str, int]  # of each unit


@dataclass(frozen=True)
class Case:
    """Two layouts of `ranks` ranks, and what is trained under them."""

    ranks: int
    whole: dict[str, Any]
    internal: dict[str, Any]
    stages: tuple[tuple[int, int], ...] = ((2, 3),)
    tied: bool = True
    family: str = "qwen3"
    dtype: str = "float32"
    at_switch: str = "per_layer_step"
    read_out_norm: bool = False

    def config(self, model_dir: Path) -> Config:
        """In the whole model, in place."""
        return run_config(
            model={"path": str(model_dir), "dtype": self.dtype},
            parallel=self.whole,
            bupo={"optimizer_at_switch": self.at_switch},
            # An eps above rounding errors: Adam's first steps are the sign of what is above it.
            optimizer={"weight_decay": 0.1, "clip_grad": 1.0, "eps": 1e-6},
        )

    def config_with_layout(self, model_dir: Path) -> Config:
        """On an actor of its own."""
        config = self.config(model_dir)
        layout = ParallelConfig(**self.internal)
        return replace(config, bupo=replace(config.bupo, internal_layout=layout))

    @property
    def schedule(self) -> PhaseSchedule:
        """The internal phases, then the full policy."""
        return PhaseSchedule.of(self.stages, read_out_norm=self.read_out_norm)


def _run(
    config: Config, schedule: PhaseSchedule, run_dir: Path, first: int = 0, *, saves: bool = False
) -> Course:
    """The steps from `first` on; if it `saves`, with a checkpoint before each."""
    arch, world = read_architecture(config.model.path), dist.get_world_size()

    def plan_at(step: int) -> ActorPlan:
        return plan_actor(schedule.policy_at(step), arch, config, world)

    parallel.initialize(plan_at(first).layout, seed=0)
    trainer = plan_at(first).build()
    if first:
        checkpoint.load(trainer, checkpoint_dir(run_dir, first))
    batch, reports, layers = random_batch(), [], []
    for step in range(first, STEPS):
        if plan_at(step).arch.layers != trainer.arch.layers:
            trainer = plan_at(step).take_over(trainer, checkpoint_dir(run_dir, step))
        if schedule.begins_at(step):
            trainer.begin_phase()
        policy = schedule.policy_at(step)
        stale = with_stale_logprobs(batch, trainer.logprobs(batch, policy)[0])
        updates = [trainer.update(stale, policy, lr=1e-4 * (1 + step)) for _ in range(2)]
        reports += [dict(update.metrics) for update in updates]
        layers.append(trainer.arch.layers)
        if saves:
            checkpoint.save(trainer, run_dir, step + 1, {}, keep=STEPS)
    course = Course(reports, layers, snapshot(trainer), trainer.optimizer.steps)
    parallel.leave()
    return course


def _both_ways(case: Case, model_dir: Path, run_dir: Path) -> list[Course]:
    """In place; on an actor of its own; and the latter resumed from each checkpoint."""
    in_place = _run(case.config(model_dir), case.schedule, run_dir)
    config = case.config_with_layout(model_dir)
    own = _run(config, case.schedule, run_dir, saves=True)
    resumed = [_run(config, case.schedule, run_dir, first) for first in RESUMED]
    return [in_place, own, *resumed]


def _case(name: str, *args: Any, marks: Any = SLOW, **kwargs: Any) -> Any:
    return pytest.param(Case(*args, **kwargs), id=name, marks=marks)


DIST: dict[str, Any] = {"distributed_optimizer": True}


@pytest.mark.parametrize(
    "case",
    [
        _case("PP2 to DP2, tied", 2, {"pp": 2}, {"dp": 2}, marks=[]),
        _case(
            "TP2 to DP2, untied",
            2,
            {"tp": 2},
            {},
            tied=False,
            at_switch="common_step",
            marks=WIDE,
        ),
        _case(
            "TP2 PP2 SP to DP4, untied, distributed optimizer",
            4,
            {"tp": 2, "pp": 2, "sp": True, **DIST},
            DIST,
            tied=False,
            marks=WIDE,
        ),
        _case("PP2 to DP2, tied, distributed optimizer", 2, {"pp": 2, **DIST}, DIST),
        _case("VPP2 PP2 to TP2, tied", 2, {"pp": 2, "vpp": 2}, {"tp": 2}, at_switch="reset"),
        _case(
            "PP4 to DP4, layer 1, bfloat16",
            4,
            {"pp": 4},
            {},
            ((1, 3),),
            dtype="bfloat16",
            marks=WIDE,
        ),
        _case(
            "layer 1, then layer 3, read out through the norm",
            2,
            {"pp": 2},
            {},
            ((1, 2), (3, 1)),
            read_out_norm=True,
        ),
        _case("PP2 to EP2, experts", 2, {"pp": 2}, {"ep": 2}, family="qwen3_moe"),
        _case("the same layout, fewer layers", 1, {}, {}, tied=False, at_switch="warmup"),
    ],
)
def test_an_actor_of_its_own_learns_what_the_whole_model_would(
    case: Case, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir = tiny_model_dir(**MODEL | {"family": case.family}, tied=case.tied)
    depths = [layer for layer, steps in case.stages for _ in range(steps)]
    tolerance = 1e-3 if case.dtype == "bfloat16" else 1e-5
    for in_place, own, *resumed in run_ranks(case.ranks, _both_ways, case, model_dir, tmp_path):
        assert in_place.layers == [4] * STEPS
        assert own.layers == [*depths, *[4] * (STEPS - len(depths))]
        assert len({round(report["update/loss"], 6) for report in own.reports}) == STEPS + 1
        for ours, theirs in zip(own.reports, in_place.reports, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
        assert own.updates == in_place.updates
        for name, weight in in_place.weights.items():
            torch.testing.assert_close(own.weights[name], weight, atol=tolerance, rtol=0)
        for first, course in zip(RESUMED, resumed, strict=True):
            assert course.reports == own.reports[2 * first :]
            assert course.updates == own.updates
            assert all(torch.equal(w, course.weights[n]) for n, w in own.weights.items())


def _bytes_after_each(config: Config, run_dir: Path) -> list[int]:
    """Of all tensors of this rank, with one actor and with those that took over from it in turn."""
    plan = plan_actor(FULL, read_architecture(config.model.path), config, dist.get_world_size())
    parallel.initialize(plan.layout, seed=0)
    trainer, found = plan.build(), []
    for _ in range(3):
        train_once(trainer, random_batch(), FULL, lr=1e-3)
        found.append(_tensor_bytes())
        checkpoint.save(trainer, run_dir, 1, {}, keep=1)
        trainer = plan.take_over(trainer, checkpoint_dir(run_dir, 1))
    return found


def _tensor_bytes() -> int:
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (Tensor, Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "distributed", [False, True], ids=["plain optimizer", "distributed optimizer"]
)
def test_an_actor_that_another_one_follows_leaves_no_memory_behind(
    distributed: bool, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model_dir = tiny_model_dir(**MODEL)
    parameters = sum(t.numel() for t in load_file(model_dir / "model.safetensors").values())
    config = run_config(
        model={"path": str(model_dir)}, parallel={"distributed_optimizer": distributed}
    )
    [found] = run_ranks(1, _bytes_after_each, config, tmp_path)
    assert found[0] > 4 * 4 * parameters  # weights, gradients, two moments
    assert max(found) < 1.01 * found[0]
