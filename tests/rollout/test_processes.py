from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.processes import ServerProcess, arguments
from tests.moments import until
from tests.runs import fork

# A server's family: itself, a child of its own session, and that one's child. Each leaves a file.
SERVER = """
import json, os, pathlib, subprocess, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
def note():
    about = {"argv": sys.argv[1:], "env": dict(os.environ), "stdin": sys.stdin.read()}
    (folder / "new").write_text(json.dumps(about))
    (folder / "new").rename(folder / f"{os.getpid()}.process")
depth = int(os.environ.get("DEPTH", "0"))
if depth < 2:
    os.environ["DEPTH"] = str(depth + 1)
    subprocess.Popen([sys.executable, *sys.argv] if depth else [sys.executable, __file__],
                     start_new_session=depth == 0)
    while len(list(folder.glob("*.process"))) < 2 - depth:
        time.sleep(0.01)
note()
print("listening\\n\\nat last", flush=True)
if "END" in os.environ:
    sys.exit(int(os.environ["END"]))
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the stand-in lies and what it starts notes itself; none of that outlives the test."""
    package = tmp_path / "stand_in" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(SERVER)
    yield tmp_path
    for process in family(tmp_path):
        process.kill()
        pytest.fail(f"left behind: {process}")


def config_of(folder: Path, *settings: str) -> Config:
    own = f"{{PYTHONPATH: {folder / 'stand_in'}, FOLDER: {folder}}}"
    needed = ["model.path=model", "data.train=train.jsonl", "sglang.device=cpu"]
    return load_config(None, [*needed, f"servers.env={own}", *settings])


def server_of(folder: Path, *settings: str) -> ServerProcess:
    return ServerProcess(0, config_of(folder, *settings), folder)


def family(folder: Path) -> list[psutil.Process]:
    """The processes that are alive of those that noted themselves."""
    found: list[psutil.Process] = []
    for note in folder.glob("*.process"):
        try:
            process = psutil.Process(int(note.stem))
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def up(folder: Path) -> bool:
    return len(family(folder)) == 3


def note_of(folder: Path, pid: int | None) -> dict[str, Any]:
    return json.loads((folder / f"{pid}.process").read_text())


def test_a_stopped_server_leaves_none_of_its_descendants_and_ends_nobody_else(folder: Path):
    ours, another = server_of(folder), ServerProcess(1, config_of(folder), folder)
    ours.start()
    until(lambda: up(folder))
    mine = family(folder)
    assert ours.pid in {process.pid for process in mine}
    assert len({os.getsid(process.pid) for process in mine}) == 2
    another.start()
    until(lambda: len(family(folder)) == 6)
    ours.stop()
    assert {p.pid for p in family(folder)}.isdisjoint(p.pid for p in mine)
    assert len(family(folder)) == 3
    assert (ours.pid, ours.poll(), another.poll()) == (None, 128 + signal.SIGKILL, None)
    ours.stop()
    another.stop()


def test_a_server_that_is_killed_is_known_to_be_and_takes_its_descendants_along(folder: Path):
    server = server_of(folder)
    server.start()
    until(lambda: up(folder))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: server.poll() is not None)
    assert server.poll() == 128 + signal.SIGKILL
    assert family(folder) == []


@pytest.mark.parametrize("waits", ["until it is up", "not at all"])
def test_servers_end_with_a_trainer_that_is_killed(folder: Path, waits: str):
    def train() -> int:
        server_of(folder).start()
        (folder / "started").touch()
        time.sleep(600)
        return 0

    trainer = fork(train)
    until((folder / "started").exists if waits == "not at all" else lambda: up(folder))
    assert trainer.kill().code == -signal.SIGKILL  # returns when all processes of it are gone
    assert family(folder) == []


def test_a_server_ends_when_what_stands_between_it_and_us_is_killed(folder: Path):
    server = server_of(folder, "servers.env.DEPTH=2")  # no descendants: SGLang's end with it
    server.start()
    until(lambda: len(family(folder)) == 1)
    keeper = psutil.Process(server.pid).parent()
    assert keeper is not None
    keeper.kill()
    until(lambda: server.poll() == -signal.SIGKILL and family(folder) == [])


def test_each_start_has_a_port_and_a_line_of_its_own_in_the_log(folder: Path):
    server = server_of(folder, "servers.env.END=3")
    ports, pids = [], []
    for _ in range(2):
        server.start()
        ports.append(int(server.address.rsplit(":", 1)[1]))
        until(lambda: server.poll() is not None)
        assert server.poll() == 3
        pids = pids_in(server.log)
        assert note_of(folder, int(pids[-1]))["argv"] == argv_in(server.log)[-1]
    assert ports[0] != ports[1]
    assert len(set(pids)) == 2
    starts = re.findall(
        r"^=== start (\d): .*--port (\d+) .*, pid \d+$", server.log.read_text(), re.MULTILINE
    )
    assert starts == [("0", str(ports[0])), ("1", str(ports[1]))]
    assert server.log == folder / "servers" / "server-0.log"
    assert server.last_words(2) == "listening\nat last"


def test_a_program_that_cannot_be_executed_ends_at_once_and_the_log_says_why(folder: Path):
    server = server_of(folder, "servers.python=/no/such/python")
    server.start()
    until(lambda: server.poll() is not None)
    assert (server.poll(), server.pid) == (1, None)
    assert server.last_words(1).endswith("No such file or directory: '/no/such/python'")


def test_the_command_line_is_our_settings_and_then_sglangs_own(folder: Path):
    server = server_of(
        folder,
        "seed=7",
        "model.dtype=bfloat16",
        "servers.api_key=secret",
        "sglang.mem_fraction_static=0.5",
        "sglang.disable_radix_cache=true",
        "sglang.skip_server_warmup=false",
        "sglang.cuda_graph_bs=[1,2]",
        "sglang.json_model_override_args={num_hidden_layers: 3}",
    )
    words = server.command(30123)
    seed = words[words.index("--random-seed") + 1]
    expected = (
        f"{sys.executable} -m sglang.launch_server --model-path model --host 127.0.0.1 "
        f"--port 30123 --api-key secret --dtype bfloat16 --weight-version 0 --random-seed {seed} "
        "--device cpu --mem-fraction-static 0.5 --disable-radix-cache --cuda-graph-bs 1 2 "
        "--json-model-override-args"
    )
    assert words == [*expected.split(), '{"num_hidden_layers": 3}']
    other = server_of(folder, "model.tokenizer=there", "sglang.dtype=float32").command(1)
    assert other[other.index("--tokenizer-path") + 1] == "there"
    assert other[other.index("--dtype") + 1] == "float32"
    assert other[other.index("--random-seed") + 1] != seed


def test_lists_hold_mappings_too():
    assert arguments({"lora_paths": [{"a": 1}, "b"], "x": None}) == [
        "--lora-paths",
        '{"a": 1}',
        "b",
    ]


def test_servers_use_the_gpus_after_the_ranks_of_the_trainer_or_share_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    needed = ["model.path=model", "data.train=train.jsonl", "sglang.tp_size=2"]

    def first_gpu(index: int, *settings: str) -> int:
        config = load_config(None, [*needed, *settings])
        words = ServerProcess(index, config, tmp_path).command(1)
        return int(words[words.index("--base-gpu-id") + 1])

    assert [first_gpu(i) for i in (0, 1)] == [4, 6]
    assert [first_gpu(i, "rollout.colocated=true") for i in (0, 1, 3)] == [0, 2, 6]
    assert [first_gpu(i, "sglang.base_gpu_id=1") for i in (0, 1)] == [1, 3]
    with pytest.raises(InputError) as error:
        first_gpu(2, "servers.count=3")
    assert str(error.value) == (
        "servers.count=3: server 2 would use GPUs 8 to 9 of 8; start fewer servers or trainer "
        "ranks, or set rollout.colocated=true to share GPUs"
    )


def test_a_server_is_told_its_environment_and_not_that_we_are_a_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    ours = """RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE
    ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
    TORCHELASTIC_USE_AGENT_STORE""".split()
    for name in [*ours, "KEPT", "REMOVED"]:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    server = server_of(
        folder,
        "servers.env.REMOVED=null",
        "servers.env.FLAG=true",
        "servers.env.NUMBER=3",
        "servers.env.END=0",
    )
    server.start()
    until(lambda: server.poll() is not None)
    note = note_of(folder, int(pids_in(server.log)[0]))
    assert {name: note["env"].get(name) for name in ("KEPT", "FLAG", "NUMBER")} == {
        "KEPT": "1",
        "FLAG": "true",
        "NUMBER": "3",
    }
    assert not {*ours, "REMOVED", "OMP_NUM_THREADS"} & set(note["env"])
    assert note["stdin"] == ""


def pids_in(log: Path) -> list[str]:
    return re.findall(r"^=== .*, pid (\d+)$", log.read_text(), re.MULTILINE)


def argv_in(log: Path) -> list[list[str]]:
    """The arguments of each start, as the log tells them."""
    lines = re.findall(
        r"^=== start .* sglang\.launch_server (.*), pid", log.read_text(), re.MULTILINE
    )
    return [line.split() for line in lines]
