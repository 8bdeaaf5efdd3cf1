"""What every rollout engine owes its caller, asked of all of them: the embedded one, SGLang's
client on the strict fake (one server and two), and on real servers where there is a SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bupo.errors import InputError
from megatron_bupo.rollout.weights import WholeWeights
from megatron_bupo.types import Prompt
from tests.rollout.contract import (
    LONG,
    PROMPTS,
    SAMPLING,
    SLOWLY_S,
    Bench,
    bench_of,
    make_model,
    on,
)
from tests.rollout.fake import fake_server
from tests.sglang.real import sglang_settings
from tests.tiers import WIDE

pytestmark = pytest.mark.slow
REAL = pytest.param("two real servers", marks=[pytest.mark.real, pytest.mark.timeout(900)])


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("a server", marks=WIDE), "two servers", REAL]
)
def bench(
    request: pytest.FixtureRequest,
    tiny_model_dir: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("contract")
    model = make_model(folder / "model", tiny_model_dir(vocab=16, scale=0.15))
    with ExitStack() as stack:
        fakes = []
        if request.param == "embedded":
            settings = []
        elif request.param == "two real servers":
            settings = [*sglang_settings(), "servers.count=2", "servers.start_timeout_s=300"]
        else:
            count = 1 if request.param == "a server" else 2
            fakes = [
                stack.enter_context(fake_server(model, folder / f"log-{i}")) for i in range(count)
            ]
            settings = on(*fakes)
        yield stack.enter_context(bench_of(model, folder / "run", settings, fakes))


@pytest.fixture
def slowly(bench: Bench) -> Iterator[None]:
    """Responses take a while, where it is in our hand."""
    for fake in bench.fakes:
        fake.have(seconds_per_token=SLOWLY_S)
    yield
    bench.hurry()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_responses_are_what_was_asked_for_with_the_logprobs_of_the_sampling_temperature(
    bench: Bench, temperature: float, top_p: float
):
    sampling = replace(SAMPLING, temperature=temperature, top_p=top_p, responses_per_prompt=16)
    groups = bench.engine.generate(PROMPTS, sampling)
    bench.check(groups, sampling, oldest=bench.version)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert len({rollout.response_ids for rollout in rollouts}) > len(PROMPTS)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_responses_that_were_begun_are_there_to_be_collected(bench: Bench):
    pending = [bench.engine.begin(PROMPTS, replace(SAMPLING, seed=seed)) for seed in (1, 2)]
    for batch in pending:
        bench.check(batch.collect(), SAMPLING, oldest=bench.version)


@pytest.mark.parametrize(
    ("input_ids", "words"),
    [((), "prompt of 0 tokens"), ((1, 16), "token id 16"), ((1, -1), "token id -1")],
)
def test_a_prompt_that_the_model_cannot_read_is_refused_before_it_is_sent(
    bench: Bench, input_ids: tuple[int, ...], words: str
):
    with pytest.raises(InputError, match=f"data row 9.*{words}"):
        bench.engine.generate([*PROMPTS, Prompt(9, input_ids, "", "")], SAMPLING)
    bench.check(bench.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=bench.version)


def test_a_response_gets_all_the_tokens_it_was_promised_or_its_prompt_is_refused(bench: Bench):
    """A server cuts what would fill its context, and says nothing."""
    longest = 0
    for prompt_tokens in range(250, 256 - SAMPLING.max_response_tokens - 4, -1):
        prompt = Prompt(9, (1,) * prompt_tokens, "", "")
        try:
            (group,) = bench.engine.generate([prompt], replace(SAMPLING, responses_per_prompt=16))
        except InputError:
            continue
        longest = max(longest, prompt_tokens)
        for rollout in group.rollouts:
            bench.check_rollout(rollout, SAMPLING, oldest=bench.version)
    assert longest >= 256 - SAMPLING.max_response_tokens - 6


def test_an_update_changes_the_tensors_that_it_brings_and_no_others(bench: Bench):
    for only in ("", "model.layers.1.", "model.embed_tokens"):
        report = bench.learn(only)
        changed = [tensor for name, tensor in bench.versions[0].items() if name.startswith(only)]
        assert report.sent_bytes == sum(tensor.nbytes for tensor in changed)
        assert report.behind == 0
        bench.check(bench.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=bench.version)


def test_weights_that_change_under_way_show_in_every_response(bench: Bench, slowly: None):
    for attempt in range(6):  # at a real server's own pace they may have ended, or not begun
        before, sampling = bench.version, replace(LONG, seed=attempt)
        pending = bench.engine.begin(PROMPTS, sampling)
        bench.until_running(0.05 * 2**attempt)
        bench.learn()
        bench.hurry()
        groups = pending.collect()
        bench.check(groups, sampling, oldest=before)
        spans = [rollout.versions for group in groups for rollout in group.rollouts]
        if any(len(of_one) == 2 for of_one in spans) or not bench.engine.capabilities().ahead:
            return
    pytest.fail("all responses were of one version")


def test_nothing_is_sampled_in_a_pause_and_nothing_lost(bench: Bench, slowly: None):
    pending = bench.engine.begin(PROMPTS, LONG)
    bench.until_running()
    with bench.engine.pause():
        for fake in bench.fakes:
            assert not fake.ask("/v1/loads")[1]["loads"][0]["num_running_reqs"]
    bench.hurry()
    bench.check(pending.collect(), LONG, oldest=bench.version)


def test_all_are_healthy_and_say_which_weights_they_have(bench: Bench):
    health = bench.engine.health()
    assert [(server.state, server.policy_version) for server in health] == [
        ("ready", bench.version)
    ] * max(len(bench.fakes), len(health))


def test_a_capable_engine_draws_equal_responses_from_equal_seeds(bench: Bench):
    if not bench.engine.capabilities().reproducible:
        pytest.skip("it says that it does not")
    first, again = (bench.engine.generate(PROMPTS, SAMPLING) for _ in range(2))
    assert [group.rollouts for group in first] == [group.rollouts for group in again]


@pytest.mark.parametrize(
    ("name", "shape"), [("model.norm.weight", (31,)), ("model.final_norm.weight", (32,))]
)
def test_weights_of_another_model_are_an_error_that_names_them(
    bench: Bench, name: str, shape: tuple[int, ...]
):
    wrong: Any = {name: torch.ones(shape)}
    with pytest.raises((KeyError, ValueError), match=name):
        bench.engine.load_weights(WholeWeights(wrong), version=bench.version + 1)
    assert all(fake.process and fake.process.is_alive() for fake in bench.fakes)
