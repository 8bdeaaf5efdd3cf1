from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_bupo.errors import InputError
from megatron_bupo.record.figure import INTERNAL, SHADES, draw_run
from tests.record.runs import records, write

if TYPE_CHECKING:
    from pathlib import Path


def painted(path: Path, color: str) -> np.ndarray:
    """The columns of the picture that have a pixel of `color`, in the picture's own order."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    return (np.abs(pixels - rgb).max(-1) <= 2).any(0).nonzero()[0]


def test_the_internal_phase_is_shaded_from_its_first_to_its_last_step(tmp_path: Path):
    run_dir = write(
        tmp_path / "run", records(("internal layer 5", 10), ("full", 50), evaluate_every=10)
    )
    path = draw_run(run_dir)
    assert path == run_dir / "training.png"
    shaded = painted(path, SHADES[0])
    width = imread(path).shape[1]
    axes_begin, axes_end = shaded.min(), 0.98 * width  # the axes end just before the picture does
    assert (shaded.max() - axes_begin) / (axes_end - axes_begin) == pytest.approx(1 / 6, abs=0.02)


def test_a_grpo_run_has_no_internal_colour(tmp_path: Path):
    path = draw_run(write(tmp_path / "run", records(("full", 20))))
    assert not len(painted(path, SHADES[0]))
    assert not len(painted(path, INTERNAL))


@pytest.mark.parametrize(
    "run",
    [
        records(("internal layer 5", 1), evaluate_every=1),
        records(("internal layer 2", 3), ("internal layer 4", 2), ("full", 9)),
        [
            r | {"rollout/reward_mean": None, "entropy/full_nats": None}
            for r in records(("full", 2))
        ],
        [{"step": 0, "policy": "full", "rollout/reward_mean": -1.0}],
    ],
    ids=["one step", "stages", "nothing finite", "no entropy"],
)
def test_unusual_runs_are_drawn_without_a_warning(
    tmp_path: Path, run: list[dict[str, Any]], recwarn: pytest.WarningsRecorder
):
    assert imread(draw_run(write(tmp_path / "run", run))).std() > 0
    assert not [str(warning.message) for warning in recwarn]


def test_a_run_without_steps_says_so(tmp_path: Path):
    with pytest.raises(InputError, match=r"metrics\.jsonl.*no finished step"):
        draw_run(tmp_path)
