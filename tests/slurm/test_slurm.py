"""A real Slurm of two nodes on this machine: a run that is preempted there is requeued, and goes on
to the numbers of one that nothing disturbed, whether it samples by itself or from servers on a node
of their own; and so it is by ssh. `make test-slurm`; needs root and Debian's Slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_bupo.rollout.processes import free_port
from tests.launch.launching import launch, launch_python
from tests.rollout.fake import FAKE
from tests.runs import ROOT, Bed, metrics
from tests.test_resume import assert_same_run, assert_same_weights, steps_recorded

LIMIT_S = 280
CLUSTER = """
kind: slurm
gpus_per_node: 0
processes_per_node: 2
time: "00:30:00"
grace_s: 60
python: {python}
env: {{GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: "1"}}
executor: {{partition: debug}}
"""

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that describes a running Slurm."""
    launch_python()
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs root and Debian's slurm-wlm: tools/slurm_here.sh install")
    folder, script = tmp_path_factory.mktemp("slurm"), str(ROOT / "tools" / "slurm_here.sh")
    started = subprocess.run(
        [script, "start", str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    os.environ["SLURM_CONF"] = started.stdout.strip()
    try:
        file = folder / "here.yaml"
        file.write_text(CLUSTER.format(python=sys.executable))
        yield file
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False)
        subprocess.run([script, "stop", str(folder)], check=False)
        del os.environ["SLURM_CONF"]


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def job_of(run_dir: Path) -> str:
    return json.loads((run_dir / "launch" / "launch.json").read_text())["job"]


def state_of(run_dir: Path) -> str:
    asked = ["squeue", "-h", "-j", job_of(run_dir), "-o", "%T"]
    return subprocess.run(asked, check=False, capture_output=True, text=True).stdout.strip()


def test_a_preempted_job_is_requeued_and_goes_on_to_the_same_numbers(
    cluster: Path, bed: Bed, tmp_path: Path
):
    python = launch_python()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    changes = ["parallel.dp=2", "checkpoint.every=1000", "evaluation.every=0", "steps=12"]

    def launched(run_dir: Path, *options: str) -> list[str]:
        settings = bed.settings(run_dir, *changes)
        done = launch(python, "launch", recipe, "--on", cluster, *options, *settings)
        assert done.code == 0, done.err
        return done.out.splitlines()

    run_dir = tmp_path / "preempted"
    told = launched(run_dir, "--detach")
    assert "# train: 2 nodes x 2 ranks" in told
    wait_until(lambda: steps_recorded(run_dir) >= 2)
    job = job_of(run_dir)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(lambda: not state_of(run_dir))
    starts = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert starts == [f"slurm-{job}-0", f"slurm-{job}-1"]
    status = launch(python, "status", run_dir)
    assert "steps       12 done" in status.out
    said = launch(python, "logs", run_dir, "--rank", "0").out
    assert "resuming at step" in said
    nothing_there = launch(python, "logs", run_dir, "--rank", "4")
    assert (nothing_there.code, nothing_there.err.count("\n")) == (2, 1)

    undisturbed = tmp_path / "undisturbed"
    launched(undisturbed)
    assert len(metrics(run_dir)) == 12
    assert_same_run(run_dir, undisturbed)


def test_a_cancelled_job_saves_what_it_learned_and_is_not_requeued(
    cluster: Path, bed: Bed, tmp_path: Path
):
    python, run_dir = launch_python(), tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    settings = bed.settings(run_dir, "steps=1000", "checkpoint.every=1000", "evaluation.every=0")
    done = launch(python, "launch", recipe, "--on", cluster, "--detach", *settings)
    assert done.code == 0, done.err
    wait_until(lambda: steps_recorded(run_dir) >= 1)
    second = launch(python, "launch", recipe, "--on", cluster, *settings)
    assert second.code == 2
    assert "is at work there (RUNNING" in second.err
    assert launch(python, "cancel", run_dir).out == "asked to save and end\n"
    wait_until(lambda: not state_of(run_dir))
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1
    assert len(list((run_dir / "logs").iterdir())) == 1


def servers_of(run_dir: Path, start: int) -> list[psutil.Process]:
    """The servers that start number `start` of a job has announced, as long as they live."""
    announced = (run_dir / "launch" / "servers" / f"slurm-{job_of(run_dir)}-{start}").glob("[!.]*")
    ports = {path.read_text().strip().rpartition(":")[2] for path in announced}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:3] == ["-m", "sglang.launch_server"] and ports.intersection(words):
                found.append(process)
    return found


@pytest.fixture
def with_servers(cluster: Path) -> Path:
    """The same cluster, with one of its nodes for servers."""
    file = cluster.with_name("servers.yaml")
    file.write_text(f"{cluster.read_text()}server_nodes: 1\n")
    return file


SGLANG = [
    "rollout.engine=sglang",
    "sync.mode=http",
    "sglang.enable_deterministic_inference=true",
    f"servers.env={{PYTHONPATH: {FAKE}}}",
    "servers.api_key=${oc.env:BUPO_TEST_KEY}",
]


def test_a_job_of_two_roles_is_preempted_and_loses_a_server_and_goes_on_to_the_same_numbers(
    with_servers: Path, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python, run_dir = launch_python(), tmp_path / "preempted"
    monkeypatch.setenv("BUPO_TEST_KEY", "open-sesame")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    changes = ["checkpoint.every=1000", "evaluation.every=0", "steps=16", *SGLANG]

    settings = bed.settings(run_dir, *changes)
    done = launch(python, "launch", recipe, "--on", with_servers, "--detach", *settings)
    assert done.code == 0, done.err
    assert done.out.startswith("# train: 1 node x 2 ranks\n# serve: 1 node x 1 servers\n")
    wait_until(lambda: steps_recorded(run_dir) >= 2)
    subprocess.run(["scancel", "--signal=USR2", job_of(run_dir)], check=True)
    undisturbed = tmp_path / "undisturbed"
    bed.train(undisturbed, *changes)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    wait_until(lambda: steps_recorded(run_dir) > int(checkpoint.name.removeprefix("step_")))
    (server,) = servers_of(run_dir, 1)
    server.kill()
    wait_until(lambda: not state_of(run_dir))

    assert "over, with exit code 0" in launch(python, "status", run_dir).out
    said = launch(python, "logs", run_dir).out
    assert {"==> rank 0:", "==> server 0 0:", "==> job:"} <= set(re.findall("==> .*?:", said))
    assert "resuming at step" in said
    assert "changed since" not in said  # that servers have other addresses now
    assert "says nothing to" not in said
    assert "start 1: " in (run_dir / "servers" / "server-0-0.log").read_text()
    wait_until(lambda: not servers_of(run_dir, 1))
    gaps = "rollout/logprob_gap"  # servers round by what else they were asked just then
    one, other = (
        [{k: v for k, v in step.items() if not k.startswith(gaps)} for step in metrics(path)]
        for path in (run_dir, undisturbed)
    )
    assert len(one) == 16
    assert one == other
    assert_same_weights(run_dir, undisturbed)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert [path for path in files if b"open-sesame" in path.read_bytes()] == []


def test_a_server_that_does_not_start_ends_the_job_and_is_told(
    with_servers: Path, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python, run_dir = launch_python(), tmp_path / "run"
    monkeypatch.setenv("BUPO_TEST_KEY", "open-sesame")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    settings = bed.settings(run_dir, *SGLANG, "sglang.context_length=many")
    done = launch(python, "launch", recipe, "--on", with_servers, *settings)
    assert done.code == 1
    assert "the run ended with code 2: sglang.*, servers.*: server" in done.err
    assert "ValueError: invalid literal for int() with base 10: 'many'" in done.err
    assert "over, with exit code 2" in launch(python, "status", run_dir).out


@pytest.fixture
def by_ssh(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Path]]:
    """The same cluster reached by ssh, and a directory to do that from."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if sshd is None or shutil.which("rsync") is None:
        pytest.skip("needs sshd and rsync: tools/slurm_here.sh install")
    folder, port = tmp_path / "ssh", free_port()
    (folder / "bin").mkdir(parents=True)
    for name in ("host", "key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nStrictModes no\n"
        f"AuthorizedKeysFile {folder / 'key.pub'}\nPermitRootLogin yes\nUsePAM no\n"
        f"PidFile none\nSetEnv SLURM_CONF={os.environ['SLURM_CONF']}\n"
    )
    # Whoever runs this test has hosts that are known, which are none of its business
    ssh = folder / "bin" / "ssh"
    known = f"-o StrictHostKeyChecking=no -o UserKnownHostsFile={folder / 'known'}"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F none {known} "$@"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    Path("/run/sshd").mkdir(exist_ok=True)
    file, outside = folder / "there.yaml", folder / "outside"
    reached = f"{{host: 127.0.0.1, user: root, port: {port}, identity: {folder / 'key'}}}"
    file.write_text(f"{cluster.read_text()}ssh: {reached}\n")
    outside.mkdir()
    server = subprocess.Popen([sshd, "-D", "-f", str(folder / "config"), "-E", str(folder / "log")])
    try:
        yield file, outside
    finally:
        server.kill()
        server.wait()


def test_a_cluster_reached_by_ssh_gets_the_working_tree_and_its_logs_are_brought_here(
    by_ssh: tuple[Path, Path], bed: Bed, tmp_path: Path
):
    python, run_dir, (file, outside) = launch_python(), tmp_path / "run", by_ssh
    changes = ["parallel.dp=2", "steps=1000", "checkpoint.every=1000", "evaluation.every=0"]
    settings = bed.settings(run_dir, *changes)

    def asked(*words: object) -> str:
        done = launch(python, *words, cwd=outside)
        assert done.code == 0, done.err
        return done.out

    demo = ROOT / "conf" / "demo.yaml"
    told = asked("launch", demo, "--on", file, "--detach", *settings)
    assert told.endswith("ask by: megatron-bupo status|logs|cancel launched/run\n")
    (code,) = (run_dir / "launch" / "experiments").glob("*/*/*/code")
    assert (code / "Makefile").read_bytes() == (ROOT / "Makefile").read_bytes()
    wait_until(lambda: steps_recorded(run_dir) >= 1)
    assert "state       RUNNING on n[1-2], " in asked("status", "launched/run")
    assert "step 1/1000 " in asked("logs", "launched/run", "--rank", "0", "--lines", "100000")
    assert asked("cancel", "launched/run") == "asked to save and end\n"
    asked("logs", "launched/run", "--follow", "--rank", "0")
    assert state_of(outside / "launched" / "run") == ""
    status = asked("status", "launched/run")
    assert "over, with exit code 75" in status
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1
    assert not (outside / "launched" / "run" / "checkpoints").exists()
