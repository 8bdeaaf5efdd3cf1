"""Launches on clouds, whose APIs are imitated: what they are sent, and what is made of answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.fake_clouds import Cloud, cloud, lepton_status
from tests.launch.launching import kubeconfig, launch, launch_python
from tests.runs import ROOT, Done

# NeMo-Run takes seconds to import, on a busy machine half a minute, for each command
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KUBECTL = """#!/bin/bash
case $1 in
cp) mkdir -p "CLAIM${5#*:}" && cp -r "$4" "CLAIM${5#*:}" ;;
logs) echo "$*" ;;
esac
"""


@pytest.fixture
def there() -> Iterator[Cloud]:
    with cloud() as made:
        yield made


def bupo(there: Cloud, folder: Path, *words: str) -> Done:
    """`megatron-bupo WORDS` in `folder`, whose `claim` is the volume that kubectl copies to."""
    home = folder / "home"
    if not home.exists():
        home.mkdir()
        (home / "kubectl").write_text(KUBECTL.replace("CLAIM", str(folder / "claim")))
        (home / "kubectl").chmod(0o755)
        kubeconfig(home / "kube", there.address)
    env = {
        "PATH": f"{home}:{os.environ['PATH']}",
        "KUBECONFIG": str(home / "kube" / "kubeconfig"),
        "LOGNAME": "me",
        "LEPTON_WORKSPACE_ID": "workspace",
        "LEPTON_WORKSPACE_TOKEN": "secret",
        "LEPTON_WORKSPACE_URL": f"{there.address}/api",
        "LEPTON_WORKSPACE_ORIGIN_URL": there.address,
    }
    python = launch_python(needs="nemo_run, kubernetes")
    return launch(python, *words, cwd=folder, env=env)


def started(kind: str, run_dir: str) -> list[str]:
    recipe = str(ROOT / "conf" / "demo.yaml")
    return ["launch", recipe, "--on", kind, "--nodes", "2", "--detach", f"run_dir={run_dir}"]


def test_kubernetes_gets_the_working_tree_and_a_job_that_runs_it(there: Cloud, tmp_path: Path):
    done = bupo(there, tmp_path, *started("kubernetes", "/bupo/demo"), "data.train=a $x b")
    assert done.code == 0, done.err
    (job,) = there.posted("/trainjobs")
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["resourcesPerNode"]["limits"]) == (
        2,
        {"nvidia.com/gpu": "8"},
    )
    assert {"name": "PYTHONPATH", "value": "/nemo_run/code"} in trainer["env"]
    shipped = tmp_path / "claim" / Path(trainer["command"][1]).parent.relative_to("/")
    here = (ROOT / "megatron_bupo" / "launch" / "node.py").read_text()
    assert (shipped / "code" / "megatron_bupo" / "launch" / "node.py").read_text() == here
    script = (shipped / "launch.sh").read_text()
    assert f"ln -sfn {Path(trainer['command'][1]).parent} /nemo_run\n" in script
    assert "\nexec python -m megatron_bupo.launch.node --nodes 2 " in script
    assert "conf/demo.yaml run_dir=/bupo/demo 'data.train=a $x b'\n" in script
    (pod,) = there.posted("/pods")  # which copies, and is gone
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "bupo-workdir"
    assert [path.rpartition("/")[2] for path in there.objects] == [job["metadata"]["name"]]


def test_a_job_on_kubernetes_is_asked_after_and_ended(there: Cloud, tmp_path: Path):
    done = bupo(there, tmp_path, *started("kubernetes", "/bupo/demo"))
    assert done.code == 0, done.err
    (path,) = there.objects
    there.objects[path]["status"] = {"jobsStatus": [{"name": "node", "active": 2}]}
    again = bupo(there, tmp_path, *started("kubernetes", "/bupo/demo"))
    assert again.code == 2
    assert f"job {path.rpartition('/')[2]} is at work there (RUNNING)" in again.err
    said = bupo(there, tmp_path, "logs", "launched/demo").out
    assert "job-completion-index=0 --container node --tail" in said
    assert bupo(there, tmp_path, "cancel", "launched/demo").out == "cancelled\n"
    assert there.objects == {}
    assert "\nstate       over\n" in bupo(there, tmp_path, "status", "launched/demo").out


def test_lepton_gets_the_recipe_and_a_job_that_runs_it(there: Cloud, tmp_path: Path):
    done = bupo(there, tmp_path, *started("lepton", "/nemo-workspace/demo"), "data.train=a $x b")
    assert done.code == 0, done.err
    copying, job = there.posted("/jobs")
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == 2
    assert {"name": "PYTHONPATH", "value": "/nemo-workspace/megatron_bupo"} in job["spec"]["envs"]
    assert job["spec"]["mounts"] == copying["spec"]["mounts"]
    word = copying["spec"]["container"]["command"][2]  # run by a shell, with the mount elsewhere
    assert len(word) < 128 * 1024
    word = word.replace("/nemo-workspace", str(tmp_path / "mount"))
    subprocess.run(["sh", "-c", word], check=True)
    script = job["spec"]["container"]["command"][2].removeprefix("bash /nemo-workspace/")
    shipped = (tmp_path / "mount" / script).parent
    assert (shipped / "code" / "conf" / "demo.yaml").exists()
    text = (tmp_path / "mount" / script).read_text()
    assert text.startswith("\nexport NODE_RANK=$LEPTON_JOB_WORKER_INDEX BUPO_FIRST_NODE=")
    settings = "--config conf/demo.yaml run_dir=/nemo-workspace/demo 'data.train=a $x b'"
    assert text.endswith(f" {settings}\n")
    (path,) = (path for path in there.objects if "data-mover" not in path)
    there.objects[path]["status"] = lepton_status("Running")
    assert "\nstate       RUNNING\n" in bupo(there, tmp_path, "status", "launched/demo").out
    assert bupo(there, tmp_path, "logs", "launched/demo").out == "step 1/2\nstep 2/2\n"
    assert bupo(there, tmp_path, "cancel", "launched/demo").out == "cancelled\n"
    assert path not in there.objects


@pytest.mark.parametrize("kind", ["kubernetes", "lepton"])
def test_a_cloud_that_refuses_is_quoted_on_one_line_and_nothing_is_left(
    there: Cloud, tmp_path: Path, kind: str
):
    there.refusal = 401, {"message": "who are you"}
    done = bupo(there, tmp_path, *started(kind, "/bupo/demo"))
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith(f"error: --on (kind={kind}): does not take the job: ")
    assert "401" in last
    assert not (tmp_path / "launched").exists()


def test_a_working_tree_is_more_than_lepton_takes(there: Cloud, tmp_path: Path):
    text = (ROOT / "conf" / "clusters" / "lepton.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("code: installed", "code: tree"))
    done = bupo(there, tmp_path, *started("mine.yaml", "/nemo-workspace/demo"), "--dry-run")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: code=tree: ")
    assert "put the code on a mount" in done.err


SHIPPED = """
import pathlib, sys
from megatron_bupo.launch.shipping import WorkingTree
WorkingTree(tree=sys.argv[1], folder=sys.argv[2]).copy(pathlib.Path(sys.argv[3]))
"""


def test_what_is_shipped_is_the_working_tree_and_not_its_last_commit(tmp_path: Path):
    python, tree = launch_python(), tmp_path / "tree"
    (tree / "conf").mkdir(parents=True)
    (tree / "kept").write_text("old")
    (tree / ".gitignore").write_text("ignored\n")
    me = ["-c", "user.name=me", "-c", "user.email=me@here"]
    for words in (["init", "-q"], ["add", "-A"], [*me, "commit", "-q", "-m", "old"]):
        subprocess.run(["git", "-C", tree, *words], check=True)
    (tree / "kept").write_text("new")
    (tree / "conf" / "added").touch()
    (tree / "ignored").touch()
    for folder, files in [(".", {".gitignore", "kept", "conf/added"}), ("conf", {"conf/added"})]:
        to = tmp_path / f"to-{len(files)}"
        words = [python, "-c", SHIPPED, tree, folder, to]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        found = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
        assert found == files
    assert (tmp_path / "to-3" / "kept").read_text() == "new"


VALIDATED = """
import json, sys, sky, yaml
from sky.utils import common_utils, schemas
config = yaml.safe_load(sys.stdin)
common_utils.validate_schema(config, schemas.get_task_schema(), "")
task = sky.Task.from_yaml_config(config)
resources, = task.resources
print(json.dumps([task.num_nodes, resources.accelerators, task.envs]))
"""


def test_what_skypilot_would_get_is_valid_by_its_own_schema(there: Cloud, tmp_path: Path):
    python = launch_python(needs="sky")
    done = bupo(there, tmp_path, *started("skypilot", "/bucket/demo"), "--dry-run")
    assert done.code == 0, done.err
    config = done.out.replace(str(tmp_path / "launched"), str(tmp_path))
    checked = subprocess.run(
        [python, "-c", VALIDATED], input=config, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    found: list[Any] = json.loads(checked.stdout.splitlines()[-1])
    assert found == [2, {"H100": 8}, {"PYTHONUNBUFFERED": "1", "PYTHONPATH": "/nemo_run/code"}]
