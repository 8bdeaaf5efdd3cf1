from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_bupo.rollout.processes import ServerProcess
from tests.runs import fork
from tests.sglang.real import answers, config_of, until

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_of_a_real_server_nothing_is_left(tmp_path: Path, tiny_model_dir: Callable[..., Path]):
    server = ServerProcess(0, config_of(tiny_model_dir()), tmp_path)
    server.start()
    until(lambda: answers(server))
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(family) >= 3  # itself, a scheduler, a detokenizer
    server.stop()
    assert not any(process.is_running() for process in family)


@pytest.mark.parametrize("children", [1, 3])
def test_a_real_server_ends_with_a_killed_trainer_while_it_starts(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], children: int
):
    """A scheduler that is still importing its modules has not asked to die with its parent yet."""
    config, started = config_of(tiny_model_dir()), tmp_path / "started"

    def train() -> int:
        server = ServerProcess(0, config, tmp_path)
        server.start()
        until(lambda: len(psutil.Process(server.pid).children()) >= children)
        family = [server.pid, *(p.pid for p in psutil.Process(server.pid).children())]
        (tmp_path / "new").write_text(" ".join(map(str, family)))
        (tmp_path / "new").rename(started)
        time.sleep(60)
        return 0

    trainer = fork(train)
    until(started.exists)
    family = [psutil.Process(int(pid)) for pid in started.read_text().split()]
    trainer.kill()
    until(lambda: not any(process.is_running() for process in family))
