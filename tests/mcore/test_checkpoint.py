"""A run that stops and resumes is the run that did not: to the bit on one layout, and closely on
another.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_bupo.algorithm.bupo import FULL, PhaseSchedule
from megatron_bupo.checkpoints import checkpoint_dir, read_run, whole_checkpoints
from megatron_bupo.mcore import checkpoint
from tests.mcore.actors import (
    another_trainer,
    random_batch,
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

    from torch import Tensor

    from megatron_bupo.config.schema import Config
    from megatron_bupo.mcore.trainer import MegatronTrainer

pytestmark = [pytest.mark.parity, pytest.mark.slow]

MODEL = {"family": "qwen3", "vocab": 67, "scale": 0.12}
MOE = MODEL | {"family": "qwen3_moe"}
SCHEDULE = PhaseSchedule.of([(2, 3)])
STEPS, SAVED = 6, (2, 4)  # one checkpoint in the internal phase, one after it
DIST_OPT: dict[str, Any] = {"tp": 2, "dp": 2, "distributed_optimizer": True}


@dataclass
class Course:
    """What a run did from some step on."""

    reports: list[dict[str, float]]
    draws: list[list[float]]  # of every random number generator, before each step
    weights: dict[str, Tensor]
    updates: dict[str, float]  # that Adam has seen, by unit


def _run(trainer: MegatronTrainer, first: int, save_in: Path | None = None) -> Course:
    """The steps from `first` on, each a little different, with checkpoints on the way."""
    batch, reports, draws = random_batch(), [], []
    for step in range(first, STEPS):
        if step in SAVED and save_in is not None:
            checkpoint.save(trainer, save_in, step, {"step": step}, keep=2)
        draws.append(_draws())
        if SCHEDULE.begins_at(step):
            trainer.begin_phase()
        lr = 1e-4 * (1 + step)
        reports.append(dict(train_once(trainer, batch, SCHEDULE.policy_at(step), lr).metrics))
    return Course(reports, draws, snapshot(trainer), trainer.optimizer.steps)


def _draws() -> list[float]:
    with get_cuda_rng_tracker().fork():
        megatron = float(torch.rand(1))
    return [megatron, random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002


def _resumed(model_dir: Path, config: Config, run_dir: Path, step: int) -> Course:
    """A fresh trainer that takes over at `step`; it has trained elsewhere before."""
    trainer = another_trainer(model_dir, config)
    train_once(trainer, random_batch(), FULL, lr=0.1)
    checkpoint.load(trainer, checkpoint_dir(run_dir, step))
    return _run(trainer, step)


def _there_and_back(model_dir: Path, config: Config, run_dir: Path) -> list[Course]:
    """The uninterrupted run, and what is left of it from each checkpoint."""
    whole = _run(start_trainer(model_dir, config), 0, save_in=run_dir)
    return [whole, *(_resumed(model_dir, config, run_dir, step) for step in SAVED)]


@pytest.mark.parametrize(
    ("ranks", "layout", "dtype"),
    [
        pytest.param(1, {}, "float32", id="one rank, float32"),
        pytest.param(1, {}, "bfloat16", id="one rank, bfloat16", marks=WIDE),
        pytest.param(2, {"pp": 2}, "float32", id="PP2, float32", marks=WIDE),
        pytest.param(2, {"pp": 2}, "bfloat16", id="PP2, bfloat16"),
        pytest.param(
            4,
            DIST_OPT,
            "float32",
            id="TP2 DP2 distributed optimizer, float32",
        ),
        pytest.param(
            4,
            DIST_OPT,
            "bfloat16",
            id="TP2 DP2 distributed optimizer, bfloat16",
            marks=WIDE,
        ),
        pytest.param(2, {"pp": 2, "vpp": 2}, "float32", id="VPP2 PP2, float32"),
        pytest.param(2, {"pp": 2, "vpp": 2}, "bfloat16", id="VPP2 PP2, bfloat16", marks=WIDE),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    ranks: int,
    layout: dict[str, Any],
    dtype: str,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
):
    optimizer = {"weight_decay": 0.1, "lr_factors": {"1": 0.0, "3": 2.0}}
    config = run_config(model={"dtype": dtype}, parallel=layout, optimizer=optimizer)
    answers = run_ranks(
        ranks, _there_and_back, tiny_model_dir(**MODEL, tied=True), config, tmp_path
    )
    updates: dict[str, float] = {}
    for whole, *resumed in answers:
        assert len({report["update/grad_norm"] for report in whole.reports}) == STEPS
        for step, course in zip(SAVED, resumed, strict=True):
            assert course.reports == whole.reports[step:]
            assert course.draws == whole.draws[step:]
            assert course.updates == whole.updates
            assert all(torch.equal(w, course.weights[n]) for n, w in whole.weights.items())
        updates |= whole.updates
    late = dict.fromkeys(["layer 3", "layer 4", "final_norm"], 3.0)
    assert updates == {"embedding": 6.0, "layer 1": 0.0, "layer 2": 6.0, **late}


def _with_group_counters(*args: Any) -> list[Course]:
    use_group_counting_adam()
    return _there_and_back(*args)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(4, DIST_OPT, id="TP2 DP2 distributed optimizer", marks=WIDE),
    ],
)
def test_so_does_one_whose_adam_counts_steps_by_group(
    ranks: int, layout: dict[str, Any], tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    config = run_config(parallel=layout, optimizer={"weight_decay": 0.1})
    model_dir = tiny_model_dir(**MODEL)
    for whole, *resumed in run_ranks(ranks, _with_group_counters, model_dir, config, tmp_path):
        for step, course in zip(SAVED, resumed, strict=True):
            assert course.reports == whole.reports[step:]
            assert course.updates == whole.updates
            assert all(torch.equal(w, course.weights[n]) for n, w in whole.weights.items())


def _first_part(model_dir: Path, config: Config, run_dir: Path) -> Course:
    return _run(start_trainer(model_dir, config), 0, save_in=run_dir)


def _last_part(model_dir: Path, config: Config, run_dir: Path) -> list[Course]:
    start_trainer(model_dir, config)
    return [_resumed(model_dir, config, run_dir, step) for step in SAVED]


_ONE = (1, {})
_TP2_PP2 = (4, {"tp": 2, "pp": 2, "sp": True})
_TP2_DP2_DIST = (4, DIST_OPT)


def _change(name: str, before: Any, after: Any, *, tied: bool = True, marks: Any = ()) -> Any:
    return pytest.param(before, after, tied, id=name, marks=marks)


@pytest.mark.parametrize(
    ("before", "after", "tied"),
    [
        _change("one rank to TP2 PP2 SP", _ONE, _TP2_PP2),
        _change("one rank to TP2 PP2 SP, untied", _ONE, _TP2_PP2, tied=False, marks=WIDE),
        _change("PP4 to DP2, untied", (4, {"pp": 4}), (2, {"dp": 2}), tied=False),
        _change("VPP2 PP2 to one rank", (2, {"pp": 2, "vpp": 2}), _ONE),
        _change("TP2 PP2 SP to one rank", _TP2_PP2, _ONE, marks=WIDE),
        _change("PP4 to DP2", (4, {"pp": 4}), (2, {"dp": 2}), marks=WIDE),
        _change(
            "TP2 DP2 to PP2 DP2, distributed optimizer",
            _TP2_DP2_DIST,
            (4, {"pp": 2, "dp": 2, "distributed_optimizer": True}),
        ),
        _change(
            "TP2 DP2 to one rank, untied, distributed optimizer",
            _TP2_DP2_DIST,
            (1, {"distributed_optimizer": True}),
            tied=False,
        ),
        _change(
            "TP2 EP2 SP to PP2 EP2, distributed optimizer",
            (4, DIST_OPT | {"ep": 2, "sp": True}),
            (4, {"pp": 2, "dp": 2, "ep": 2, "distributed_optimizer": True}),
            marks=WIDE,
        ),
        _change("EP2 to one rank, experts", (2, {"dp": 2, "ep": 2}), _ONE),
    ],
)
def test_another_layout_takes_over_where_the_first_one_stopped(
    before: tuple[int, dict[str, Any]],
    after: tuple[int, dict[str, Any]],
    tied: bool,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
):
    (ranks, layout), (other_ranks, other_layout) = before, after
    model_dir = tiny_model_dir(**(MOE if "ep" in layout else MODEL), tied=tied)
    config, other_config = (
        run_config(parallel=parallel, optimizer={"lr_factors": {"2": 0.0, "3-4": 0.1}})
        for parallel in (layout, other_layout)
    )
    whole = run_ranks(ranks, _first_part, model_dir, config, tmp_path)[0]
    for answer in run_ranks(other_ranks, _last_part, model_dir, other_config, tmp_path):
        for step, course in zip(SAVED, answer, strict=True):
            for ours, theirs in zip(course.reports, whole.reports[step:], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
            gap = max(float((course.weights[n] - w).abs().max()) for n, w in whole.weights.items())
            assert gap < 1e-5


def _save_five(model_dir: Path, run_dir: Path) -> list[dict[str, Any]]:
    trainer = start_trainer(model_dir, run_config())
    work = run_dir / "checkpoints" / ".step_000003.partial"
    work.mkdir(parents=True)
    (work / "run.json").write_text("left by a kill")
    for step in range(1, 6):
        checkpoint.save(trainer, run_dir, step, {"step": step, "note": "ours"}, keep=3)
    assert dist.get_rank() == 0
    return [read_run(path) for _, path in whole_checkpoints(run_dir)]


def test_the_newest_are_kept_and_a_half_written_one_is_in_nobodys_way(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    [runs] = run_ranks(1, _save_five, tiny_model_dir(**MODEL), tmp_path)
    assert [(run["step"], run["note"]) for run in runs] == [(n, "ours") for n in (3, 4, 5)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
        "step_000005",
    ]
    (tmp_path / "checkpoints" / ".step_000006.partial").mkdir()
    largest = max(checkpoint_dir(tmp_path, 5).iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert [step for step, _ in whole_checkpoints(tmp_path)] == [3, 4]
