"""Servers that share GPUs with the trainer: on a strict fake, which dies of a token that it is
asked for while its memory is given away, by a health check too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bupo.errors import InputError
from tests.rollout.contract import PROMPTS, SAMPLING, bench_of, make_model, on
from tests.rollout.fake import Fake, fake_server

SHARING = ["--enable-memory-saver", "--enable-weights-cpu-backup"]


@pytest.mark.slow
def test_a_server_rests_while_the_trainer_works_and_wakes_with_the_weights_that_it_had(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model = make_model(tmp_path / "model", tiny_model_dir(vocab=16, scale=0.15))
    settings = ["rollout.colocated=true", "servers.health_every_s=0.2"]
    with (
        fake_server(model, tmp_path / "log", *SHARING) as fake,
        bench_of(model, tmp_path, [*on(fake), *settings]) as bench,
    ):
        for only in ("model.layers.0.", "model.layers.1."):  # the rest it must have kept
            groups = bench.engine.generate(PROMPTS, SAMPLING)
            bench.check(groups, SAMPLING, oldest=bench.version)
            time.sleep(0.6)  # the trainer works, and health checks are due
            bench.learn(only)
        again = bench.engine.generate(PROMPTS, SAMPLING)  # as an evaluation after a step
        bench.check(again, SAMPLING, oldest=bench.version)
        bench.check(bench.engine.generate(PROMPTS, SAMPLING), SAMPLING, oldest=bench.version)
        with pytest.raises(OSError, match=r"closed|reset|refused"):  # it did rest
            fake.ask("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}})


def test_a_server_that_would_keep_its_memory_or_has_other_ranks_is_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
):
    model = make_model(tmp_path / "model", tiny_model_dir(vocab=16, scale=0.15))
    with fake_server(model, tmp_path / "keeps", *SHARING[:1]) as keeps:
        said = refusal(model, tmp_path, keeps)
    assert said.startswith("rollout.colocated=true: server 0 at http")
    assert said.endswith(" back; start it with --enable-memory-saver --enable-weights-cpu-backup")
    with fake_server(model, tmp_path / "two", *SHARING, "--tp-size", "2") as two:
        said = refusal(model, tmp_path, two, "sync.mode=ipc")
    assert said.startswith("sync.mode=ipc: server 0 at http")
    assert " has 2 ranks, and 1 of the trainer's for it; start servers that " in said


def refusal(model: Path, tmp_path: Path, fake: Fake, *settings: str) -> str:
    with (
        pytest.raises(InputError) as error,
        bench_of(model, tmp_path, [*on(fake), "rollout.colocated=true", *settings]),
    ):
        pass
    return str(error.value).partition("did not come up: ")[2]
