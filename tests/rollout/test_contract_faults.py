"""What SGLang's client makes of servers that fail, lag, lie or are old, and of every way to send
weights: on strict fakes, so that what would kill a real server kills these.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bupo.errors import InputError, RunStopped
from megatron_bupo.types import RolloutGroup
from tests.moments import LIMIT_S
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
from tests.rollout.fake import FAKE, Fake, fake_server

pytestmark = pytest.mark.slow

COUNTED = ("fail_generates", "hang_generates", "refuse_updates", "stale_answers")
BenchOf = Callable[..., AbstractContextManager[Bench]]
Start = Callable[..., Fake]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("faults") / "model", tiny_model_dir(vocab=16, scale=0.15)
    )


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    """`start(*options, **faults)`: a server of this test's own."""
    with ExitStack() as stack:
        started: list[Fake] = []

        def one(*options: str, **faults: Any) -> Fake:
            log = tmp_path / f"log-{len(started)}"
            started.append(stack.enter_context(fake_server(model, log, *options, **faults)))
            return started[-1]

        yield one


@pytest.fixture(scope="module")
def living(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Fake]]:
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:
        yield [stack.enter_context(fake_server(model, logs / f"log-{i}")) for i in range(2)]


@pytest.fixture
def pair(living: list[Fake]) -> Iterator[list[Fake]]:
    """Two servers that survive the tests that use them, and are then as they were."""
    yield living
    for fake in living:
        fake.have(seconds_per_token=0, **dict.fromkeys(COUNTED, 0))
        fake.ask("/abort_request", {"abort_all": True})
        fake.ask("/continue_generation", {})
        fake.ask("/end_weight_update", {})


@pytest.fixture
def bench(model: Path, tmp_path: Path) -> BenchOf:
    """`with bench(fakes, *settings)`: an engine on `fakes`."""

    def of(fakes: Sequence[Fake], *settings: str) -> AbstractContextManager[Bench]:
        return bench_of(model, tmp_path / "run", [*on(*fakes), *settings], fakes)

    return of


def servers_of(groups: Sequence[RolloutGroup]) -> set[str | None]:
    return {rollout.server for group in groups for rollout in group.rollouts}


@pytest.mark.parametrize(
    "mode", [pytest.param("broadcast", marks=pytest.mark.slow), "http", "disk", "ipc"]
)
def test_every_way_to_send_weights_brings_exactly_those(
    pair: list[Fake], bench: BenchOf, mode: str
):
    fakes = pair[:1] if mode == "ipc" else pair  # which takes a rank for each server
    with bench(fakes, f"sync.mode={mode}", "sync.bucket_bytes=5000", "sync.verify=true") as b:
        for only in ("", "model.layers.0."):
            report = b.learn(only)
            assert report.behind == 0, b.news
            groups = b.engine.generate(PROMPTS, SAMPLING)
            b.check(groups, SAMPLING, oldest=b.version)
            assert servers_of(groups) == {fake.url for fake in fakes}
        assert {h.policy_version for h in b.engine.health()} == {2}


@pytest.mark.parametrize("pause", ["retract", "in_place", "abort"])
def test_responses_under_way_outlive_an_update_whatever_the_pause_does_to_them(
    pair: list[Fake], bench: BenchOf, pause: str
):
    with bench(pair, f"sync.pause={pause}", "sync.mode=http") as b:
        b.learn()
        for fake in pair:
            fake.have(seconds_per_token=SLOWLY_S)
        pending = b.engine.begin(PROMPTS, LONG)
        b.until_running()
        # in_place keeps keys and values of the old weights: let them be those of the new too
        b.learn("model.norm" if pause == "in_place" else "")
        b.hurry()
        groups = pending.collect()
        b.check(groups, LONG, oldest=1)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        assert any(len(rollout.versions) == 2 for rollout in rollouts)
        resent = [rollout.attempts for rollout in rollouts if len(rollout.versions) == 2]
        assert set(resent) == ({2} if pause == "abort" else {1})


def test_a_server_killed_in_the_middle_of_a_batch_loses_nothing(start: Start, bench: BenchOf):
    fakes = [start(seconds_per_token=SLOWLY_S) for _ in range(2)]
    with bench(fakes) as b:
        b.learn()
        pending = b.engine.begin(PROMPTS, LONG)
        b.until_running()
        fakes[0].kill()
        b.hurry()
        groups = pending.collect()
        b.check(groups, LONG, oldest=1)
        attempts = [rollout.attempts for group in groups for rollout in group.rollouts]
        assert max(attempts) > 1
        again = b.engine.generate(PROMPTS, SAMPLING)
        b.check(again, SAMPLING, oldest=1)
        assert servers_of(again) == {fakes[1].url}


def test_a_managed_server_that_dies_is_started_again_and_has_the_weights_before_it_is_asked(
    model: Path, tmp_path: Path
):
    settings = ["rollout.engine=sglang", "servers.count=2", "sync.verify=true", "sync.mode=http"]
    env = {"PYTHONPATH": FAKE, "FAKE_SGLANG_SECONDS_PER_TOKEN": "0.01", "OMP_NUM_THREADS": "1"}
    settings += [f"servers.env.{name}={value}" for name, value in env.items()]
    with bench_of(model, tmp_path / "run", settings) as b:
        b.learn()
        pending = b.engine.begin(PROMPTS, LONG)
        b.until_running()
        victim = b.engine.fleet.servers[0]
        dead = victim.process.pid
        os.kill(dead, signal.SIGKILL)
        b.check(pending.collect(), LONG, oldest=1)
        b.learn("model.layers.2.")
        deadline = time.monotonic() + LIMIT_S
        while [h.state for h in b.engine.health()] != ["ready", "ready"]:
            assert time.monotonic() < deadline, b.news
            b.check(b.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=2)
        assert victim.process.pid != dead
        assert sum(h.restarts for h in b.engine.health()) == 1
        groups = b.engine.generate(PROMPTS, SAMPLING)
        assert len(servers_of(groups)) == 2
        b.check(groups, SAMPLING, oldest=2)


def test_an_update_that_never_reached_the_weights_is_found_by_their_checksums(
    model: Path, tmp_path: Path
):
    settings = ["rollout.engine=sglang", "sync.verify=true", "sync.mode=http"]
    settings += [f"servers.env.PYTHONPATH={FAKE}"]
    with bench_of(model, tmp_path / "run", settings) as b:
        b.learn()
        fake = Fake(b.engine.fleet.servers[0].address, None, tmp_path)
        fake.have(forget_updates=1)
        assert b.learn("model.layers.0.").behind == 1
        assert "is not what was sent" in b.news[-1]
        b.check(b.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=2)


def test_no_server_left_is_an_error_that_says_why(start: Start, bench: BenchOf):
    fake = start(seconds_per_token=SLOWLY_S)
    with bench([fake], "servers.attempts=2") as b:
        b.learn()
        pending = b.engine.begin(PROMPTS, LONG)
        b.until_running()
        fake.kill()
        with pytest.raises(RunStopped, match=f"(?s){fake.url.rpartition('/')[2]}"):
            pending.collect()


def test_a_response_with_older_weights_is_thrown_away(pair: list[Fake], bench: BenchOf):
    with bench(pair) as b:
        b.learn()
        b.learn()
        pair[0].have(stale_answers=2, stale_version="1")
        groups = b.engine.generate(PROMPTS, SAMPLING)
        b.check(groups, SAMPLING, oldest=2)
        attempts = [rollout.attempts for group in groups for rollout in group.rollouts]
        assert sum(attempts) >= len(attempts) + 2


def test_a_server_that_does_not_confirm_an_update_is_not_asked_until_it_does(
    pair: list[Fake], bench: BenchOf
):
    with bench(pair, "sync.mode=http") as b:
        b.learn()
        pair[0].have(refuse_updates=1)
        assert b.learn().behind == 1
        groups = b.engine.generate(PROMPTS, SAMPLING)
        b.check(groups, SAMPLING, oldest=2)
        deadline = time.monotonic() + LIMIT_S
        while [h.policy_version for h in b.engine.health()] != [2, 2]:
            assert time.monotonic() < deadline, b.news
            b.check(b.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=2)
            time.sleep(0.1)


def test_what_a_dead_trainer_left_open_is_no_obstacle(pair: list[Fake], bench: BenchOf):
    for fake in pair:
        assert fake.ask("/pause_generation", {"mode": "retract"})[0] == 200
        assert fake.ask("/begin_weight_update", {})[0] == 200
    with bench(pair) as b:
        b.learn()
        b.check(b.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=1)


def test_requests_that_fail_or_hang_are_made_again(pair: list[Fake], bench: BenchOf):
    with bench(pair, "servers.request_timeout_s=2", "servers.attempts=9") as b:
        b.learn()
        pair[0].have(fail_generates=2)
        pair[1].have(hang_generates=2)
        groups = b.engine.generate(PROMPTS, SAMPLING)
        b.check(groups, SAMPLING, oldest=1)
        attempts = [rollout.attempts for group in groups for rollout in group.rollouts]
        assert sum(attempts) - len(attempts) >= 4  # more where the machine is slow


@pytest.mark.parametrize("budget", ["rollout.step_budget_s=0.5", "rollout.step_budget_tokens=200"])
def test_a_spent_budget_cuts_what_is_unfinished_and_keeps_it(
    pair: list[Fake], bench: BenchOf, budget: str
):
    with bench(pair, budget) as b:
        b.learn()
        for fake in pair:
            fake.have(seconds_per_token=0.03)
        groups = b.engine.generate(PROMPTS, LONG)
        b.check(groups, LONG, oldest=1)
        cut = [r for group in groups for r in group.rollouts if r.finish_reason == "abort"]
        assert cut
        assert any(rollout.response_ids for rollout in cut)
        assert all(len(rollout.response_ids) < LONG.max_response_tokens for rollout in cut)
        assert any("were cut" in line for line in b.news)


def test_an_api_key_opens_the_server_and_a_wrong_one_is_named(start: Start, bench: BenchOf):
    fake = start("--api-key", "secret")
    with bench([fake], "servers.api_key=secret") as b:
        b.learn()
        b.check(b.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=1)
    with pytest.raises(InputError, match=r"servers\.api_key"), bench([fake]):
        pass


def test_a_release_without_sessions_and_spans_is_driven_too(start: Start, bench: BenchOf):
    fake = start(version="0.5.10", seconds_per_token=SLOWLY_S)
    with bench([fake], "sync.mode=http") as b:
        assert b.engine.capabilities().name == "sglang 0.5.10"
        b.learn()
        pending = b.engine.begin(PROMPTS, LONG)
        b.until_running()
        b.learn()
        b.hurry()
        groups = pending.collect()
        b.check(groups, LONG, oldest=1)
        assert any(len(r.versions) == 2 for group in groups for r in group.rollouts)


def test_a_release_that_is_not_spoken_is_refused_by_name(start: Start, bench: BenchOf):
    fake = start(version="0.3.0")
    with pytest.raises(InputError, match=r"SGLang 0\.3\.0"), bench([fake]):
        pass


def test_equal_seeds_draw_equal_responses_on_any_number_of_deterministic_servers(
    start: Start, bench: BenchOf
):
    fakes = [start("--enable-deterministic-inference") for _ in range(2)]
    drawn = []
    for some in (fakes[:1], fakes):
        with bench(some) as b:
            assert b.engine.capabilities().reproducible
            b.learn()
            groups = b.engine.generate(PROMPTS, replace(SAMPLING, responses_per_prompt=4))
            drawn.append([r.response_ids for group in groups for r in group.rollouts])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 10
