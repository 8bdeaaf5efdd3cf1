from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.errors import InputError
from megatron_bupo.launch.cluster import Cluster, load_cluster
from megatron_bupo.launch.placement import Launch, roles
from tests.runs import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "clusters").glob("*.yaml"))


def placed(
    cluster: Cluster, *overrides: str, nodes: int | None = None
) -> list[tuple[str, int, int]]:
    """`(role, nodes, processes on each)` of the demo."""
    recipe = str(ROOT / "conf" / "demo.yaml")
    config = load_config(recipe, overrides)
    launch = Launch(recipe, overrides, config, cluster, Path("/here"), nodes)
    return [(role.name, role.nodes, role.processes) for role in roles(launch)]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_clusters_are_read(name: str):
    assert load_cluster(name).kind in name or name.startswith(load_cluster(name).kind)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("kind: slurn", "kind=slurn (FILE): is no kind of cluster; choose from local, slurm, "),
        ("kinds: slurm", "kinds (FILE): unknown key; the nearest key is kind"),
        ("gpus_per_node: 8", "kind (FILE): has no value; choose from local"),
        ("kind: slurm\ngpus_per_node: many", "gpus_per_node=many (FILE): "),
        ("kind: slurm\ntime: 1 hour", "time=1 hour (FILE): is not a time as Slurm writes it; "),
        ("kind: slurm\ngrace_s: -1", "grace_s=-1 (FILE): is less than 0; "),
        ("kind: slurm\nenv: {http_proxy: x}", "env.http_proxy (FILE): NeMo-Run writes names"),
        ("kind: slurm\nssh: {host: h}", "ssh.user (FILE): has no value; set it"),
        ("kind: slurm\nssh: {host: h, user: u, port: x}", "ssh.port=x (FILE): is not a number; "),
        ("kind: slurm\nssh: {hots: h}", "ssh.hots (FILE): unknown key; the nearest key is host"),
        ("kind: local\nserver_nodes: 1", "server_nodes=1 (FILE): servers on nodes of their own"),
        (
            "kind: slurm\nenv: {HF_TOKEN: '${oc.env:HOME}'}",
            "env.HF_TOKEN (FILE): would be written to files of the launch; remove it, and export",
        ),
        (
            "kind: skypilot\nenv: {HF_TOKEN: hf_1}",
            "env.HF_TOKEN (FILE): would be written to files of the launch; export it where you ",
        ),
        ("kind: slurm\nenv: {A: '${oc.env:NO_NAME}'}", "env.A (FILE): KeyError raised while "),
        ("- kind: local", "FILE: is not a mapping of settings; "),
        ("kind: [", "FILE: is not valid YAML: "),
        ("kind: {a: b}", "kind={'a': 'b'} (FILE): "),
        ("kind: slurm\nport: 65536", "port=65536 (FILE): is no port; "),
        ("kind: slurm\nprocesses_per_node: 0", "processes_per_node=0 (FILE): is less than 1; "),
    ],
)
def test_mistakes_in_a_cluster_are_named(tmp_path: Path, text: str, error: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_cluster(str(path))
    assert str(caught.value).startswith(error.replace("FILE", str(path)))


def test_numbers_in_the_environment_are_text(tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text("kind: slurm\nenv: {A: 1, B: true, C: 1.5}\ntime: 60")
    cluster = load_cluster(str(path))
    assert (cluster.env, cluster.time) == ({"A": "1", "B": "true", "C": "1.5"}, "60")


def test_an_unknown_cluster_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="the nearest is slurm"):
        load_cluster("slrum")


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        ([], None, [("train", 1, 2)]),  # pp 2
        (["parallel.dp=4"], None, [("train", 2, 4)]),
        ([], 3, [("train", 3, 4)]),  # and dp 6
        (["parallel.tp=2"], 1, [("train", 1, 4)]),
    ],
)
def test_nodes_and_ranks_come_from_the_layout(
    overrides: list[str], nodes: int | None, expected: list[tuple[str, int, int]]
):
    assert placed(Cluster(kind="slurm", gpus_per_node=4), *overrides, nodes=nodes) == expected


def test_servers_fill_the_nodes_that_are_theirs():
    cluster = Cluster(kind="slurm", gpus_per_node=8, server_nodes=3)
    found = placed(cluster, "rollout.engine=sglang", "sglang.tp_size=2")
    assert found == [("train", 1, 2), ("serve", 3, 4)]


@pytest.mark.parametrize(
    ("cluster", "overrides", "error"),
    [
        ({}, ["parallel.dp=3"], "parallel.*: 6 ranks: do not fill nodes of 4; "),
        ({"server_nodes": 1}, [], "server_nodes=1: rollout.engine=embedded has no servers; "),
        (
            {"server_nodes": 1},
            ["rollout.engine=sglang", "sglang.tp_size=8"],
            "sglang.tp_size=8: a server of 8 GPUs does not fit a node of 4; ",
        ),
        (
            {"server_nodes": 1},
            ["rollout.engine=sglang", "servers.addresses=[http://a:1]"],
            "server_nodes=1: servers.addresses names servers that run already; ",
        ),
    ],
)
def test_what_does_not_fit_is_refused(cluster: dict[str, int], overrides: list[str], error: str):
    with pytest.raises(InputError) as caught:
        placed(Cluster(kind="slurm", gpus_per_node=4, **cluster), *overrides)
    assert str(caught.value).startswith(error)
