"""What the doctor finds where something is amiss, and where nothing is."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.doctor.disk import disk
from megatron_bupo.doctor.findings import OK, PROBLEM, WARNING
from megatron_bupo.doctor.ranks import _reach, ranks
from megatron_bupo.doctor.servers import servers
from megatron_bupo.doctor.versions import apex
from tests.runs import run


@pytest.mark.parametrize(
    ("folder", "extensions", "level"),
    [
        ("multi_tensor_apply", True, OK),
        ("multi_tensor_apply", False, WARNING),
        ("lib", False, PROBLEM),
    ],
)
def test_pypis_apex_is_not_taken_for_nvidias(
    folder: str, extensions: bool, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('is not imported')")
    if extensions:
        (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = apex()
    assert found.level == level
    assert ("pip uninstall apex" in found.way_out) == (level != OK)


def test_a_peer_that_cannot_be_reached_is_named():
    with socket.create_server(("127.0.0.1", 0)) as open_, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        places = {
            rank: {"host": f"node{rank}", "address": "127.0.0.1", "port": peer.getsockname()[1]}
            for rank, peer in enumerate((open_, closed))
        }
        [(level, what, way_out)] = _reach(0, places, timeout_s=2)
    assert level == PROBLEM
    assert "cannot reach rank 1 (node1) at 127.0.0.1" in what
    assert "/etc/hosts" in way_out  # another machine that takes its own name for the loopback


@pytest.mark.parametrize(("rank", "what"), [(0, "rank 1 of 2 did not come"), (1, "no store at")])
def test_a_rank_that_meets_nobody_says_so_in_time(
    rank: int, what: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    [found] = ranks(0.5)
    assert found.level == PROBLEM
    assert what in found.what


ANSWERS = {
    "/server_info": {"version": "0.5.23", "tp_size": 2, "context_length": 4096},
    "/model_info": {"model_path": "/models/Qwen3-8B"},
    "/health": {},
}


class _Server(BaseHTTPRequestHandler):
    """An SGLang server as far as the doctor asks."""

    status = 200

    def do_GET(self) -> None:
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def settings(*addresses: str, model: str = "models/Qwen3-8B", tokens: int = 1024) -> list[str]:
    listed = ", ".join(addresses)
    return [
        f"model.path={model}",
        "data.train=none",
        "data.max_prompt_tokens=1024",
        f"rollout.max_response_tokens={tokens}",
        "rollout.engine=sglang",
        f"servers.addresses=[{listed}]",
    ]


def test_a_server_is_asked_what_it_is(address: str):
    found = list(servers(load_config(None, settings(address)), 5))
    assert [f.level for f in found] == [OK]
    assert "SGLang 0.5.23, tp 2" in found[0].what
    other = load_config(None, settings(address, model="models/Qwen3-4B", tokens=4000))
    levels = [f.level for f in servers(other, 5)]
    assert levels == [OK, WARNING, PROBLEM]  # another model, and too short a context


def test_a_server_that_is_not_there_is_a_problem():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        [found] = servers(load_config(None, settings(address)), 5)
    assert found.level == PROBLEM
    assert address in found.what


def test_a_key_that_is_wrong_and_a_page_that_is_no_server_are_told_apart(
    address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(ANSWERS, "/server_info", ["not", "facts"])
    config = load_config(None, settings(address))
    [found] = servers(config, 5)
    assert found.level == PROBLEM
    assert "does not answer as SGLang does" in found.what
    monkeypatch.setattr(_Server, "status", 401)
    [found] = servers(config, 5)
    assert "servers.api_key" in found.way_out


def test_disk_is_measured_against_what_a_checkpoint_takes(tmp_path: Path):
    def room(model: str) -> str:
        config = load_config(
            None, [f"model.path={model}", "data.train=none", f"run_dir={tmp_path}"]
        )
        [found] = disk(config)
        return found.level

    small = tmp_path / "model"
    small.mkdir()
    tiny = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    (small / "config.json").write_text(json.dumps(tiny))
    assert room(str(small)) == OK
    assert room("models/Qwen3-235B-A22B") == PROBLEM


@pytest.mark.slow
def test_all_findings_are_told_and_a_problem_is_exit_code_1(tmp_path: Path):
    out = tmp_path / "found.json"
    done = run("doctor", "--json", out, f"model.path={tmp_path / 'none'}", "data.train=no.jsonl")
    assert done.code == 1
    assert "Traceback" not in done.err
    found = json.loads(out.read_text())
    assert {f["area"] for f in found} == {
        "versions",
        "devices",
        "machine",
        "ranks",
        "recipe",
        "disk",
    }
    assert {f["area"] for f in found if f["level"] == PROBLEM} == {"recipe"}
    told = " ".join(f["what"] for f in found)
    for expected in (
        "2 ranks",
        "gloo: an all-reduce",
        "no such directory",
        "there is no such file",
    ):
        assert expected in told
