from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.config.schema import Config
from megatron_bupo.rollout.client import Unreachable
from megatron_bupo.rollout.processes import ServerProcess
from megatron_bupo.rollout.router import Router
from tests.sglang.real import answers, config_of, until

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = [3, 17, 5, 40]
TIMES = {"e2e_latency", "response_sent_to_client_ts", "cached_tokens", "cached_tokens_details"}


@pytest.fixture(scope="module")
def config(tiny_model_dir: Callable[..., Path]) -> Config:
    return config_of(tiny_model_dir(), "servers.api_key=secret", "servers.router=true")


@pytest.fixture(scope="module")
def server(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process = ServerProcess(0, config, tmp_path_factory.mktemp("server"))
    process.start()
    until(lambda: answers(process))
    yield process.address
    process.stop()


@pytest.fixture
def router(config: Config, tmp_path: Path) -> Iterator[Router]:
    router = Router(config, tmp_path)
    yield router
    router.stop()


def post(address: str, path: str, body: dict[str, Any], key: str = "secret") -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read() or "null")
    except urllib.error.HTTPError as error:
        return error.code, None


def generate(address: str, **sampling: Any) -> tuple[int, Any]:
    body = {"rid": "one", "input_ids": PROMPT, "return_logprob": True, "logprob_start_len": 0}
    return post(address, "/generate", {**body, "sampling_params": sampling})


def test_a_request_through_the_router_is_answered_as_the_server_answers_it(
    router: Router, server: str
):
    router.start([server])
    (code, direct), (code_through, through) = (
        generate(address, max_new_tokens=8, temperature=0) for address in (server, router.address)
    )
    assert code == code_through == 200
    assert through["meta_info"]["id"] == "one"
    assert len(through["meta_info"]["output_token_logprobs"]) == 8
    for reply in direct, through:
        for key in TIMES:
            reply["meta_info"].pop(key)
    assert direct.keys() == through.keys()
    assert direct["output_ids"] == through["output_ids"]
    assert direct["meta_info"].keys() == through["meta_info"].keys()
    # What the server refuses, it refuses in the same way; and a key is asked for
    assert generate(router.address, max_new_tokens=10**6)[0] == 400
    assert post(router.address, "/generate", {}, key="wrong")[0] == 401
    # All else is for the server itself
    assert post(router.address, "/abort_request", {"rid": "one"})[0] == 404
    assert post(server, "/abort_request", {"rid": "one"})[0] == 200


def test_a_server_that_is_left_out_is_asked_no_more_but_still_answers(
    router: Router, server: str, monkeypatch: pytest.MonkeyPatch
):
    router.start([server])
    with ThreadPoolExecutor() as pool:
        long = pool.submit(generate, router.address, max_new_tokens=200, ignore_eos=True)
        time.sleep(0.2)
        router.set_workers([])
        assert not long.done()
        assert generate(router.address, max_new_tokens=1)[0] == 503
        assert long.result()[0] == 200
    router.set_workers([server])
    assert generate(router.address, max_new_tokens=1)[0] == 200
    monkeypatch.setattr("megatron_bupo.rollout.router._CHANGE_S", 2)
    with pytest.raises(Unreachable, match="took more than 2 s to have its servers"):
        router.set_workers([server, "http://127.0.0.1:9"])
