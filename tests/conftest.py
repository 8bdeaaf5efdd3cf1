"""Every test starts alike: one thread, no network, the same seed."""

from __future__ import annotations

import gc
import os

# Before anything imports them: Hugging Face libraries read these once.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import Bed, make_bed
from tests.tiny_models import make_tiny_model

torch.set_num_threads(1)


def pytest_configure() -> None:
    gc.disable()  # a million objects are imported, and none of them is garbage


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_dir(**knobs)`: the directory of that tiny HF checkpoint, made once."""
    root = tmp_path_factory.mktemp("tiny-models")
    made: dict[str, Path] = {}

    def model_dir(**knobs: Any) -> Path:
        key = repr(sorted(knobs.items(), key=lambda knob: knob[0]))
        if key not in made:
            made[key] = make_tiny_model(root / str(len(made)), **knobs)
        return made[key]

    return model_dir


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """What the tests of whole runs train on, made once."""
    return make_bed(tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="session")
def finished(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `bed.settings` that nothing has disturbed. To be read only."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    bed.train(run_dir)
    return run_dir
