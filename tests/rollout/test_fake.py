"""The fake server is a second opinion only if it is right itself: here it is held against
transformers, and against answers that SGLang 0.5.23 gave to the same requests.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import dense_model
from tests.moments import LIMIT_S, until
from tests.rollout.fake import Fake, fake_server

pytestmark = pytest.mark.slow

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "qwen2": {"family": "qwen2"},
    "llama": {"family": "llama", "tied": True},
}
PROMPT = [4, 10, 9, 11]


@pytest.fixture(scope="module")
def server(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fake]:
    log = tmp_path_factory.mktemp("fake") / "log"
    with fake_server(tiny_model_dir(), log) as running:
        yield running


def generate(server: Fake, prompt: list[int] = PROMPT, **fields: Any) -> tuple[int, Any]:
    """One response, with `fields` of the request and, if they are no such, of its sampling."""
    outer = ("rid", "logprob_start_len")
    request = {"input_ids": prompt, "return_logprob": True}
    request |= {key: value for key, value in fields.items() if key in outer}
    sampling = {key: value for key, value in fields.items() if key not in outer}
    return server.ask("/generate", request | {"sampling_params": sampling})


def in_background(server: Fake, **fields: Any) -> Callable[[], Any]:
    """Start a response of which some tokens are there on return; the result waits for its end."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(generate(server, **fields)[1]))
    thread.start()
    until(lambda: server.ask("/v1/loads")[1]["loads"][0]["num_running_reqs"])
    time.sleep(0.05)

    def result() -> Any:
        thread.join()
        return found[0]

    return result


def sent(*tensors: tuple[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "serialized_named_tensors": [base64.b64encode(pickle.dumps(list(tensors))).decode()],
        "flush_cache": True,
    }


def is_gone(server: Fake) -> bool:
    assert server.process
    server.process.join(LIMIT_S)
    return server.process.exitcode not in (None, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers_at_the_sampling_temperature(
    family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    directory = tiny_model_dir(**FAMILIES[family])
    with fake_server(directory, tmp_path / "log") as server:
        _, reply = generate(
            server, max_new_tokens=24, temperature=0.7, top_p=0.8, logprob_start_len=0
        )
    meta = reply["meta_info"]
    ids = PROMPT + reply["output_ids"]
    with torch.no_grad():
        logits = dense_model(directory)(torch.tensor([ids])).logits[0, :-1]
    logits[len(PROMPT) - 1 :] /= 0.7  # the prompt's are at temperature 1
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
    told = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]
    assert [token for _, token, _ in told] == ids[1:]
    assert torch.tensor([lp for lp, _, _ in told]) == pytest.approx(expected[:, 0], abs=1e-5)


def test_checks_answer_in_the_words_of_sglang(server: Fake):
    too_long = "The input (256 tokens) is longer than the model's context length (256 tokens)."
    almost = "Input length (250 tokens) exceeds the maximum allowed length (250 tokens). Use a"
    for status_and_words, prompt, fields in [
        ((400, too_long), [1] * 256, {}),
        ((400, almost), [1] * 250, {}),
        ((400, "You requested a total of 260 tokens"), [1] * 200, {"max_new_tokens": 60}),
        ((400, "temperature must be a non-negative finite number"), PROMPT, {"temperature": -1}),
        ((400, "unknown field `bogus`, expected one of"), PROMPT, {"bogus": 1}),
        ((400, "input_ids cannot be empty."), [], {}),
    ]:
        status, reply = generate(server, prompt, **fields)
        assert status == status_and_words[0]
        assert status_and_words[1] in str(reply)
    session = "must run between begin_weight_update() and end_weight_update()"
    status, reply = server.ask("/update_weights_from_tensor", sent())
    assert (status, reply["success"]) == (400, False)
    assert session in reply["message"]


def test_a_response_that_fills_the_context_is_cut_two_tokens_before(server: Fake):
    _, reply = generate(server, [1] * 240, max_new_tokens=16)
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 14}


def test_what_kills_sglang_kills_the_fake(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    def outside_the_vocabulary(server: Fake) -> None:
        generate(server, [64])

    def another_shape(server: Fake) -> None:
        server.ask("/begin_weight_update", {})
        server.ask("/update_weights_from_tensor", sent(("model.norm.weight", torch.ones(31))))

    def resumed_without_a_release(server: Fake) -> None:
        server.ask("/resume_memory_occupation", {})

    for deadly in (outside_the_vocabulary, another_shape, resumed_without_a_release):
        with fake_server(tiny_model_dir(), tmp_path / "log") as server:
            with pytest.raises(OSError):  # noqa: PT011 - whichever way the connection ends
                deadly(server)
            assert is_gone(server)


def test_a_retracted_response_goes_on_with_the_new_weights_and_says_so(server: Fake):
    server.have(seconds_per_token=0.05)
    result = in_background(server, max_new_tokens=40, ignore_eos=True)
    server.ask("/pause_generation", {"mode": "retract"})
    server.ask("/begin_weight_update", {})
    assert server.ask("/update_weights_from_tensor", sent() | {"weight_version": "1"})[0] == 200
    server.ask("/end_weight_update", {})
    server.ask("/continue_generation", {})
    server.have(seconds_per_token=0)
    meta = result()["meta_info"]
    first, second = meta["weight_versions"]
    assert (first["version"], first["start"], second["version"]) == ("default", 0, "1")
    assert (first["end"], second["end"]) == (second["start"], 40)
    server.ask("/update_weight_version", {"new_version": "default"})


def test_a_response_aborted_while_it_is_retracted_comes_back_empty(server: Fake):
    server.have(seconds_per_token=0.05)
    result = in_background(server, max_new_tokens=40, ignore_eos=True)
    server.ask("/pause_generation", {"mode": "retract"})
    server.ask("/abort_request", {"abort_all": True})
    assert result()["output_ids"] == []
    server.ask("/continue_generation", {})
    server.have(seconds_per_token=0)


def test_an_abort_also_hits_the_requests_whose_id_begins_like_that(server: Fake):
    server.have(seconds_per_token=0.05)
    results = [
        in_background(server, rid=rid, max_new_tokens=200, ignore_eos=True)
        for rid in ("7", "71", "8")
    ]
    server.ask("/abort_request", {"rid": "7"})
    ends = [result()["meta_info"]["finish_reason"]["type"] for result in results[:2]]
    server.ask("/abort_request", {"abort_all": True})
    assert ends == ["abort", "abort"]
    assert results[2]()["meta_info"]["completion_tokens"] > 0
    server.have(seconds_per_token=0)


def test_weights_of_an_unpaused_server_wait_until_all_responses_are_done(server: Fake):
    server.have(seconds_per_token=0.05)
    result = in_background(server, max_new_tokens=40, ignore_eos=True)
    server.ask("/begin_weight_update", {})
    assert not server.ask("/v1/loads")[1]["loads"][0]["num_running_reqs"]
    server.ask("/end_weight_update", {})
    assert result()["meta_info"]["completion_tokens"] == 40
    server.have(seconds_per_token=0)


def test_a_client_that_leaves_is_not_generated_for(server: Fake):
    server.have(seconds_per_token=0.2)
    request = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
    with pytest.raises(TimeoutError):
        server.ask("/generate", request, timeout_s=0.2)
    deadline = time.monotonic() + 30  # 200 tokens would take forty seconds
    while server.ask("/v1/loads")[1]["loads"][0]["num_running_reqs"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.have(seconds_per_token=0)


def test_only_probes_are_answered_without_the_api_key(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    with fake_server(tiny_model_dir(), tmp_path / "log", "--api-key", "secret") as server:
        stranger = Fake(server.url, server.process, server.log)
        assert [stranger.ask(path)[0] for path in ("/ready", "/health", "/model_info")] == [
            200,
            200,
            401,
        ]
        assert generate(stranger) == (401, {"error": "Unauthorized"})
        assert generate(server, max_new_tokens=1)[0] == 200


def test_an_older_release_knows_no_sessions_and_no_spans(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    with fake_server(tiny_model_dir(), tmp_path / "log", version="0.5.10") as server:
        assert server.ask("/begin_weight_update", {})[0] == 404
        assert server.ask("/update_weights_from_tensor", sent())[0] == 200
        assert "weight_versions" not in generate(server, max_new_tokens=1)[1]["meta_info"]
        assert server.ask("/server_info")[1]["version"] == "0.5.10"


def test_a_server_that_is_paused_is_unhealthy(server: Fake):
    server.have(health_timeout_s=0.3)
    server.ask("/pause_generation", {"mode": "in_place"})
    assert server.ask("/health")[0] == 503
    server.ask("/continue_generation", {})
    server.have(health_timeout_s=20.0)  # a busy machine is no pause
    assert server.ask("/ready")[0] == 503  # until it has been healthy again
    assert server.ask("/health")[0] == 200
    assert server.ask("/ready")[0] == 200
