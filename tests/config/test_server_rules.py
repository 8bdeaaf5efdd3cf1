from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.schema import Config
from megatron_bupo.config.server_rules import doubts, gpus_per_server
from megatron_bupo.errors import InputError


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with packages of the names that are looked for, and nothing in them."""
    for name in ("sglang", "sglang_router"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
    return tmp_path


def config_of(*settings: str) -> Config:
    needed = ["model.path=model", "data.train=train.jsonl", "rollout.engine=sglang"]
    return load_config(None, [*needed, *settings])


def refusal(*settings: str, world: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        check(config_of(*settings), world)
    return str(error.value)


RUNNING = "servers.addresses=[http://10.0.0.5:30000,'https://[::1]:80',http://node-1.cluster:8000/]"


def test_servers_that_run_already_need_no_sglang_here():
    check(config_of(RUNNING), None)


def test_a_run_without_servers_asks_nothing_of_them():
    check(config_of("rollout.engine=embedded", "servers.python=/no/such"), None)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("10.0.0.5:30000", "is not the address of a server; write it as http://10.0.0.5:30000"),
        ("http://10.0.0.5", "is not the address of a server; write it as http://10.0.0.5:30000"),
        ("http://a:1/v1", "is not the address of a server; write it as http://10.0.0.5:30000"),
        ("http://b:1/", "is named twice; name each server once"),
    ],
)
def test_addresses_are_addresses_of_different_servers(address: str, reason: str):
    said = refusal(f"servers.addresses=['http://b:1','{address}']")
    assert said == f"servers.addresses[1]={address}: {reason}"


def test_sglang_is_looked_for_in_the_interpreter_that_starts_it(packages: Path):
    way_out = (
        'pip install "megatron-bupo[sglang]" there, or name in servers.python an interpreter '
        "that has it"
    )
    env = f"servers.env.PYTHONPATH={packages}"
    check(config_of(env, "servers.router=true"), None)
    (packages / "sglang_router").rename(packages / "other")
    check(config_of(env), None)
    said = refusal(env, f"servers.python={sys.executable}", "servers.router=true")
    assert said == (
        f"servers.python={sys.executable}: {sys.executable} has no sglang_router; {way_out}"
    )
    said = refusal(RUNNING, env, "servers.router=true")
    assert said.startswith(f"rollout.engine=sglang: {sys.executable} has no sglang_router; ")
    (packages / "sglang").rename(packages / "another")
    assert refusal(env) == f"rollout.engine=sglang: {sys.executable} has no sglang; {way_out}"


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    where = f"servers.python={program}"
    assert refusal(where).startswith(f"{where}: is no Python that runs ([Errno 13] Permission")
    program.chmod(0o755)
    way_out = "name an interpreter that has SGLang"
    assert refusal(where) == f"{where}: is no Python that runs (broken); {way_out}"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model_path=x", "model.path says the same; set model.path instead"),
        ("random_seed=1", "seed says the same; set seed instead"),
        ("tensor_parallel_size=2", "sglang.tp_size says the same; set sglang.tp_size instead"),
        ("weight_version=x", "it counts the steps that the weights have learned from; remove it"),
        ("config=x", "options in a file would pass by our checks; write them as sglang.*"),
        ("tp-size=2", "is not how options are written; write sglang.tp_size"),
        (
            "load_format=dummy",
            "the first responses must come from the weights of model.path; remove it",
        ),
    ],
)
def test_options_that_are_ours_to_set_are_refused_with_the_way_out(option: str, said: str):
    assert refusal(f"sglang.{option}") == f"sglang.{option}: {said}"
    if option != "tp-size=2":
        check(config_of(RUNNING, f"sglang.{option}"), None)


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (("sglang.device=cpu",), "rollout.colocated=true with sglang.device=cpu: only the memory"),
        (
            ("rollout.max_staleness=1",),
            "rollout.colocated=true, rollout.max_staleness=1: servers without their memory cannot",
        ),
        (
            ("sync.mode=broadcast",),
            "rollout.colocated=true with sync.mode=broadcast: NCCL connects no two processes",
        ),
    ],
)
def test_gpus_are_shared_with_servers_of_ours_that_wait_while_we_train(
    settings: tuple[str, ...], start: str, packages: Path
):
    env = f"servers.env.PYTHONPATH={packages}"
    shared = ("rollout.colocated=true", "sync.mode=http")
    check(config_of(env, *shared), None)
    assert refusal(*shared, *settings).startswith(start)


def test_a_trainer_of_several_nodes_shares_gpus_with_servers_that_it_is_told_of(
    packages: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = ("rollout.colocated=true", "sync.mode=ipc", f"servers.env.PYTHONPATH={packages}")
    two = 'servers.addresses=["http://a:30000","http://b:30000"]'
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert refusal(*shared, world=4).startswith(
        "rollout.colocated=true: a trainer of several nodes starts servers beside its first rank "
    )
    check(config_of(*shared, two), 4)
    assert refusal(*shared, two, world=3).startswith(
        "sync.mode=ipc with 2 servers.addresses: every rank of the trainer feeds one rank of a "
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check(config_of(*shared, "servers.count=4"), 4)


def test_ranks_that_share_memory_are_as_many_as_those_of_the_servers(packages: Path):
    ipc = ("sync.mode=ipc", f"servers.env.PYTHONPATH={packages}", "sglang.tp_size=2")
    check(config_of(*ipc, "servers.count=2"), 4)
    assert refusal(*ipc, world=4) == (
        "sync.mode=ipc with servers.count=1, sglang.tp_size=2: every rank of the trainer feeds one "
        "rank of a server, and it has 4; choose servers.count x sglang.tp_size = 4, or set "
        "sync.mode=broadcast"
    )
    said = refusal(*ipc, "servers.count=2", "sglang.pp_size=2", world=4)
    assert said.startswith("sync.mode=ipc with 4 GPUs per server: the tensor-parallel ranks of a ")
    assert refusal(*ipc, RUNNING).startswith("sync.mode=ipc with servers.addresses: memory is ")


def test_a_directory_of_weights_can_be_made(packages: Path):
    disk = ("sync.mode=disk", f"servers.env.PYTHONPATH={packages}")
    check(config_of(*disk), None)
    check(config_of(*disk, f"sync.directory={packages / 'deep' / 'down'}"), None)
    file = packages / "sglang" / "__init__.py"
    said = refusal(*disk, f"sync.directory={file / 'weights'}")
    assert said == (
        f"sync.directory={file / 'weights'}: cannot be made or written to: {file} stands in the "
        "way; name a directory that the trainer can write and all servers can read"
    )


def test_data_parallel_attention_occupies_no_further_gpus():
    sizes = ("sglang.tp_size=4", "sglang.dp_size=2")
    assert gpus_per_server(config_of(*sizes)) == 8
    assert gpus_per_server(config_of(*sizes, "sglang.enable_dp_attention=true")) == 4


def test_settings_that_say_nothing_to_the_run_are_told():
    assert doubts(config_of("sglang.tp_size=2")) == []
    assert doubts(config_of(RUNNING, "sglang.tp_size=2")) == [
        "warning: sglang.* says nothing to servers that run already, at servers.addresses"
    ]
    assert doubts(config_of(RUNNING, "sglang.tp_size=2", "rollout.engine=embedded")) == [
        "warning: sglang.* says nothing to rollout.engine=embedded",
        "warning: servers.addresses says nothing to rollout.engine=embedded",
    ]
