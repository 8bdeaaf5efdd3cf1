"""A trainer and servers as they are started on the nodes of a cluster, both on this machine."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from megatron_bupo.config.schema import ServersConfig
from megatron_bupo.errors import InputError
from megatron_bupo.launch.addresses import NODE_RANK, node_rank, publish, wait_for
from megatron_bupo.launch.folder import START, address_dir
from megatron_bupo.rollout.processes import free_port, own_address
from tests.rollout.fake import FAKE
from tests.runs import ROOT, Bed, metrics

LIMIT_S = 300


def start(module: str, *words: object, log: Path, node: int = 0) -> subprocess.Popen[bytes]:
    """A role of a node, as NeMo-Run would start it."""
    command = [sys.executable, "-m", f"megatron_bupo.launch.{module}", *map(str, words)]
    own = {"BUPO_FIRST_NODE": "127.0.0.1", START: "job-7", "GLOO_SOCKET_IFNAME": "lo"}
    own["SLURM_NODEID"] = str(node)
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env={**os.environ, **own}, cwd=ROOT, stdout=file, stderr=file
        )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("{}")
    return path


@pytest.mark.wide
@pytest.mark.slow
def test_a_trainer_finds_the_servers_of_another_node(bed: Bed, recipe: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = bed.settings(
        run_dir,
        "steps=2",
        "evaluation.every=0",
        "rollout.engine=sglang",
        "sync.mode=http",
        f"servers.env={{PYTHONPATH: {FAKE}}}",
        "servers.api_key=secret",
    )
    serve = start("serve", "--servers", 1, "--", "--config", recipe, *settings, log=tmp_path / "s")
    try:
        words = ["--nodes", 1, "--processes", 2, "--servers", 1, "--port", free_port()]
        node = start("node", *words, "--", "--config", recipe, *settings, log=tmp_path / "n")
        assert node.wait(LIMIT_S) == 0, (tmp_path / "n").read_text()
        (server,) = psutil.Process(serve.pid).children(recursive=True)[-1:]
    finally:
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(LIMIT_S) == 0
    assert not server.is_running()
    assert len(metrics(run_dir)) == 2
    (announced,) = (run_dir / "launch" / "servers" / "job-7").iterdir()
    assert announced.read_text().startswith("http://127.0.0.1:")
    assert (run_dir / "servers" / "server-0-0.log").exists()
    logs = sorted((run_dir / "logs" / "job-7" / "node-00000").glob("*/attempt_0/*/stdout.log"))
    assert [log.parent.name for log in logs] == ["0", "1"]
    assert json.loads((run_dir / "launch" / "node.json").read_text())["code"] == 0


@pytest.mark.slow
def test_every_node_serves_beside_its_ranks(bed: Bed, recipe: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = bed.settings(
        run_dir,
        "steps=2",
        "evaluation.every=0",
        "rollout.engine=sglang",
        "servers.count=2",
        f"servers.env={{PYTHONPATH: {FAKE}}}",
    )
    publish_stale(run_dir)
    words = ["--nodes", 2, "--processes", 1, "--beside", 2, "--port", free_port()]
    words += ["--", "--config", recipe, *settings]
    nodes = [start("node", *words, log=tmp_path / f"n{i}", node=i) for i in (0, 1)]
    codes = [node.wait(LIMIT_S) for node in nodes]
    assert codes == [0, 0], (tmp_path / "n0").read_text()
    steps = metrics(run_dir)
    assert len(steps) == 2
    announced = sorted((run_dir / "launch" / "servers" / "job-7").iterdir())
    assert [path.name for path in announced] == ["server-00000-00", "server-00001-00"]
    for i in (0, 1):
        served = (run_dir / "servers" / f"server-{i}-0.log").read_text()
        assert served.count("=== start") == 1
        (pid,) = re.findall(r"(?m)^=== start .*, pid (\d+)$", served)
        assert not psutil.pid_exists(int(pid))


def publish_stale(run_dir: Path) -> None:
    """What a start that was killed has left, whose name was that of this one."""
    os.environ[START] = "job-7"
    try:
        for name in ("server-00000-00", "server-00001-00"):
            publish(run_dir, name, f"http://127.0.0.1:{free_port()}")
    finally:
        del os.environ[START]


@pytest.mark.slow
def test_a_server_that_cannot_start_ends_its_node_at_once(bed: Bed, recipe: Path, tmp_path: Path):
    settings = bed.settings(
        tmp_path / "run",
        "rollout.engine=sglang",
        f"servers.env={{PYTHONPATH: {FAKE}}}",
        "sglang.model_impl=none",
        f"model.path={tmp_path / 'none'}",
    )
    words = ["--nodes", 2, "--processes", 1, "--beside", 1, "--", "--config", recipe, *settings]
    node = start("node", *words, log=tmp_path / "n")
    assert node.wait(LIMIT_S) == 2
    said = (tmp_path / "n").read_text().splitlines()[-1]
    assert said.startswith("error: sglang.*, servers.*: server 00000-00 ended with code ")


@pytest.mark.slow
def test_a_node_tells_a_mistake_by_its_exit_code(bed: Bed, recipe: Path, tmp_path: Path):
    settings = bed.settings(tmp_path / "run", "bupo.target_layer=99")
    words = ["--nodes", 1, "--processes", 2, "--port", free_port(), "--", "--config", recipe]
    node = start("node", *words, *settings, log=tmp_path / "n")
    assert node.wait(LIMIT_S) == 2
    assert "bupo.target_layer=99" in (tmp_path / "n").read_text()


class Healthy(http.server.BaseHTTPRequestHandler):
    """Says so of whatever it is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_addresses_are_those_of_this_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(START, "job-1")
    publish(tmp_path, "server-0", "http://old:1")
    monkeypatch.setenv(START, "job-2")
    (address_dir(tmp_path) / ".server-2.new").parent.mkdir(parents=True)
    (address_dir(tmp_path) / ".server-2.new").write_text("http")
    looks: list[int] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alive = f"http://127.0.0.1:{server.server_port}"
        publish(tmp_path, "server-1", f"{alive}/b")
        publish(tmp_path, "server-0", f"{alive}/a")
        settings = ServersConfig(start_timeout_s=0.1)
        found = wait_for(tmp_path, 2, settings, look=lambda: looks.append(1))
        assert (found, looks) == ([f"{alive}/a", f"{alive}/b"], [])
        publish(tmp_path, "server-2", "http://127.0.0.1:9")  # of a start that is no more
        with pytest.raises(InputError, match=r"start_timeout_s=0\.1: 2 of 3 servers are ready"):
            wait_for(tmp_path, 3, settings, look=lambda: looks.append(1))
        server.shutdown()
    assert looks


def test_a_node_that_nobody_has_numbered_is_the_only_one(monkeypatch: pytest.MonkeyPatch):
    for name in NODE_RANK:
        monkeypatch.delenv(name, raising=False)
    assert node_rank() == 0
    with pytest.raises(InputError, match=r"^NODE_RANK: is not set, nor is .*, on one of 2 nodes"):
        node_rank(2)
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    assert node_rank(2) == 1


def test_an_address_is_one_that_the_other_node_reaches():
    assert own_address("127.0.0.1") == "127.0.0.1"
