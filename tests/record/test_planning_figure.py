from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_bupo.record.planning_figure import PANELS, draw_planning
from tests.record.runs import records, write
from tests.record.test_figure import SHADES, painted


def with_planning(of: list[dict[str, Any]], *left_out: str) -> list[dict[str, Any]]:
    keys = [key for *_, lines in PANELS for key, *_ in lines if key not in left_out]
    return [r | dict.fromkeys(keys, 0.5 + 0.01 * r["step"]) for r in of]


def test_every_line_of_a_run_with_grams_is_painted_and_its_phases_are_shaded(tmp_path: Path):
    run = with_planning(records(("internal layer 5", 10), ("full", 30)))
    path = draw_planning(write(tmp_path / "run", run))
    assert path == tmp_path / "run" / "planning.png"
    for color in {SHADES[0], *(color for *_, lines in PANELS for _, _, color in lines)}:
        assert len(painted(path, color))


@pytest.mark.parametrize("steps", [1, 20])
def test_a_run_whose_engine_tells_no_entropies_is_drawn_without_a_warning(
    tmp_path: Path, steps: int, recwarn: pytest.WarningsRecorder
):
    unknown = [key for *_, lines in PANELS for key, *_ in lines if "token" not in key]
    path = draw_planning(write(tmp_path / "run", with_planning(records(("full", steps)), *unknown)))
    assert path is not None
    assert imread(path).std() > 0
    assert not [str(warning.message) for warning in recwarn]


def test_a_run_without_grams_has_no_such_picture(tmp_path: Path):
    assert draw_planning(write(tmp_path / "run", records(("full", 3)))) is None
    assert not list(tmp_path.glob("run/*.png"))
