"""A trainer and servers as they are started on the nodes of a cluster, both on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.launch.addresses import own_address, publish, wait_for
from megatron_bupo.launch.folder import START, address_dir
from megatron_bupo.rollout.processes import free_port
from tests.rollout.fake import FAKE
from tests.runs import ROOT, Bed, metrics

LIMIT_S = 120


def start(module: str, *words: object, log: Path) -> subprocess.Popen[bytes]:
    """A role of a node, as NeMo-Run would start it."""
    command = [sys.executable, "-m", f"megatron_bupo.launch.{module}", *map(str, words)]
    own = {"BUPO_FIRST_NODE": "127.0.0.1", START: "job-7", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env={**os.environ, **own}, cwd=ROOT, stdout=file, stderr=file
        )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("{}")
    return path


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
        assert serve.wait(20) == 0
    assert not server.is_running()
    assert len(metrics(run_dir)) == 2
    (announced,) = (run_dir / "launch" / "servers" / "job-7").iterdir()
    assert announced.read_text().startswith("http://127.0.0.1:")
    assert (run_dir / "servers" / "server-0-0.log").exists()
    logs = sorted((run_dir / "logs" / "job-7" / "node-00000").glob("*/attempt_0/*/stdout.log"))
    assert [log.parent.name for log in logs] == ["0", "1"]
    assert json.loads((run_dir / "launch" / "node.json").read_text())["code"] == 0


@pytest.mark.slow
def test_a_node_tells_a_mistake_by_its_exit_code(bed: Bed, recipe: Path, tmp_path: Path):
    settings = bed.settings(tmp_path / "run", "bupo.target_layer=99")
    words = ["--nodes", 1, "--processes", 2, "--port", free_port(), "--", "--config", recipe]
    node = start("node", *words, *settings, log=tmp_path / "n")
    assert node.wait(LIMIT_S) == 2
    assert "bupo.target_layer=99" in (tmp_path / "n").read_text()


def test_addresses_are_those_of_this_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(START, "job-1")
    publish(tmp_path, "server-0", "http://old:1")
    monkeypatch.setenv(START, "job-2")
    publish(tmp_path, "server-1", "http://b:1")
    publish(tmp_path, "server-0", "http://a:1")
    (address_dir(tmp_path) / ".server-2.new").write_text("http")
    assert wait_for(tmp_path, 2, timeout_s=0) == ["http://a:1", "http://b:1"]
    began = time.monotonic()
    with pytest.raises(InputError, match=r"start_timeout_s=0\.1: 2 of 3 servers are ready"):
        wait_for(tmp_path, 3, timeout_s=0.1)
    assert time.monotonic() - began < 10


def test_an_address_is_one_that_the_other_node_reaches():
    assert own_address("127.0.0.1") == "127.0.0.1"
