from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.config.probe_rules import (
    check_probe_against_model,
    doubts,
    watched_layer,
)
from megatron_bupo.errors import InputError

BASE = ["model.path=m", "data.train=d", "reward.function=math", "parallel.dp=1", "steps=10"]
INTERNAL = ["bupo.target_layer=2", "bupo.internal_steps=4"]
GUARD = [*INTERNAL, "probe.every=2", "bupo.guard=true"]
NO_ANSWERS = ["bupo.guard.repetition_increase=null", "bupo.guard.response_tokens_ratio=null"]
REPLAY = ["debug.replay=r", "evaluation.every=0"]


@pytest.mark.parametrize(
    "settings",
    [
        ["probe.every=2"],
        GUARD,
        [*GUARD, "bupo.target_layer=auto"],
        [*GUARD, "bupo.internal_layout.pp=1", "bupo.guard.perplexity_ratio=null"],
        [*GUARD, *NO_ANSWERS, *REPLAY, "probe.responses=f"],
        ["bupo.guard=false", "bupo.guard.patience=3"],
    ],
)
def test_settings_that_do_what_they_say_pass(settings: list[str]):
    check(load_config(None, [*BASE, *settings]), None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([*INTERNAL, "bupo.guard=true"], "bupo.guard.enabled=true: judges by probes"),
        (["bupo.guard=true", "probe.every=2"], "there is no internal phase"),
        ([*GUARD, "bupo.guard.perplexity_ratio=null", *NO_ANSWERS], "has no bound"),
        ([*GUARD, "bupo.internal_layout.pp=1"], "bupo.guard.perplexity_ratio=1.1: asks what the"),
        (
            [
                *GUARD,
                "bupo.internal_layout.pp=1",
                "bupo.guard.perplexity_ratio=null",
                "bupo.guard.kl_increase_nats=1",
            ],
            "bupo.guard.kl_increase_nats=1: asks what the full policy says",
        ),
        ([*GUARD, *REPLAY, "probe.responses=f"], "bupo.guard.repetition_increase=0.2: asks for"),
        (["probe.every=2", *REPLAY], "probe.every=2: has no engine that could sample its texts"),
        (["bupo.guard.perplexity_ratio=1"], "bupo.guard.perplexity_ratio=1.0: is out of range"),
        (["bupo.guard.response_tokens_ratio=0.5"], "is out of range"),
        (["bupo.guard.kl_increase_nats=0"], "is out of range"),
        (["bupo.guard.patience=0"], "bupo.guard.patience=0: is out of range"),
        (["probe.every=-1"], "probe.every=-1: is out of range"),
        (["probe.layer=0"], "probe.layer=0: is out of range"),
        (["probe.prompts=0"], "probe.prompts=0: is out of range"),
    ],
)
def test_settings_that_do_not_are_refused_by_name(settings: list[str], told: str):
    with pytest.raises(InputError) as refused:
        check(load_config(None, [*BASE, *settings]), None)
    assert told in str(refused.value)


def test_guard_true_is_short_for_its_switch(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("bupo:\n  guard: true\n")
    assert load_config(str(tmp_path / "run.yaml"), BASE).bupo.guard.enabled
    both = ["bupo.guard.patience=3", "bupo.guard=true"]
    guard = load_config(None, [*BASE, *both]).bupo.guard
    assert (guard.enabled, guard.patience) == (True, 3)
    off = load_config(str(tmp_path / "run.yaml"), [*BASE, "bupo.guard=false"])
    assert not off.bupo.guard.enabled
    with pytest.raises(InputError, match="is a section"):
        load_config(None, [*BASE, "bupo=true"])


def test_the_highest_layer_that_trains_is_watched_if_no_other_is_named():
    config = load_config(None, [*BASE, "bupo.stages=[{layer:2,steps:1},{layer:5,steps:2}]"])
    assert watched_layer(config) == 5
    named = replace(config, probe=replace(config.probe, layer=3))
    assert watched_layer(named) == 3
    assert watched_layer(load_config(None, BASE)) is None
    check_probe_against_model(named, 4)
    for layers, told in ((3, "is the last layer"), (2, "the model has 2 layers")):
        with pytest.raises(InputError, match=told):
            check_probe_against_model(named, layers)


@pytest.mark.parametrize(
    ("settings", "looks", "way_out"),
    [  # four internal steps; the probe before step 0 is what later ones are compared with
        (["probe.every=1", "bupo.guard.patience=3"], 3, None),
        (["probe.every=3"], 1, None),
        (["probe.every=4"], 0, "set probe.every=3 or less"),
        (["probe.every=2", "bupo.guard.patience=2"], 1, "set probe.every=1 or less"),
        (["bupo.internal_steps=1"], 0, "set bupo.guard=false"),
        (["probe.every=4", "bupo.target_layer=auto"], 0, "set probe.every=3 or less"),
        (["probe.every=4", "bupo.guard=false"], 0, None),
    ],
)
def test_a_guard_that_looks_too_rarely_to_act_is_told_of(
    settings: list[str], looks: int, way_out: str | None
):
    told = doubts(load_config(None, [*BASE, *GUARD, *settings]))
    assert len(told) == (way_out is not None)
    for doubt in told:
        assert f"looks {looks} times within" in doubt
        assert doubt.endswith(f"it cannot act; {way_out}")
