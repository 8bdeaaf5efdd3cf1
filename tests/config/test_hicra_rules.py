from __future__ import annotations

import pytest

from megatron_bupo.config.checks import check
from megatron_bupo.config.load import load_config
from megatron_bupo.errors import InputError

BASE = ["model.path=m", "data.train=d", "reward.function=math", "parallel.dp=1", "steps=10"]
GRAMS = "hicra.grams=grams.yaml"
INTERNAL = ["bupo.target_layer=2", "bupo.internal_steps=2"]
WARMUP = ["algorithm.advantage=gae", "critic.warmup_steps=3"]


def refusal(*settings: str) -> str:
    with pytest.raises(InputError) as refused:
        check(load_config(None, [*BASE, *settings]), None)
    return str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        [GRAMS],
        [GRAMS, "hicra.mask=placebo", "hicra.alpha=0"],
        [GRAMS, "hicra.form=amplify", "hicra.alpha=2"],
        ["hicra.mask=entropy"],
        [GRAMS, "hicra.mask=entropy"],  # watches the one, credits the other
        [GRAMS, "hicra.alpha=0", "bupo.target_layer=2", "bupo.internal_steps=10"],
        [GRAMS, "hicra.phases=internal", "bupo.target_layer=2", "bupo.internal_steps=4"],
        [GRAMS, "hicra.from_step=9", "bupo.target_layer=2", "bupo.internal_steps=4"],
        [GRAMS, "hicra.phases=internal", "hicra.from_step=4", *WARMUP, *INTERNAL],
    ],
)
def test_settings_that_do_what_they_say_pass(settings: list[str]):
    check(load_config(None, [*BASE, *settings]), None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["hicra.alpha=0.5"], "hicra.alpha=0.5: does nothing without hicra.grams"),
        (["hicra.mask=placebo"], "hicra.mask=placebo: does nothing without hicra.grams"),
        ([GRAMS, "hicra.alpha=1.5"], "failures would be rewarded"),
        ([GRAMS, "hicra.alpha=-0.1"], "hicra.alpha=-0.1"),
        ([GRAMS, "hicra.mask=gram"], "hicra.mask=gram"),
        ([GRAMS, "hicra.from_step=10"], "no step of the run"),
        ([GRAMS, "hicra.phases=internal"], "no step of the run"),
        ([GRAMS, "bupo.target_layer=2", "bupo.internal_steps=10"], "no step of the run"),
        (
            [GRAMS, "bupo.target_layer=2", "bupo.internal_steps=7", *WARMUP],
            "of its 10 steps the first 7 after the 3 of critic.warmup_steps train internal ",
        ),
        (["hicra.mask=entropy", "hicra.entropy_share=0"], "hicra.entropy_share=0"),
        (
            "hicra.mask=entropy hicra.phases=both bupo.target_layer=2 bupo.internal_steps=4"
            " bupo.internal_layout.tp=1".split(),
            "has only the internal policy's layers",
        ),
    ],
)
def test_settings_that_do_nothing_or_something_else_are_refused(settings: list[str], told: str):
    assert told in refusal(*settings)
