from __future__ import annotations

import pytest

from megatron_bupo.config.rollout_rules import check_rollout, doubts
from megatron_bupo.errors import InputError
from tests.config.test_checks import config_with

AHEAD = ("rollout.engine=sglang", "rollout.max_staleness=1")
INTERNAL = ("bupo.target_layer=6", "bupo.internal_steps=30")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(
            (
                [f"rollout.{name}"],
                (
                    f"rollout.{name}: is for servers, and rollout.engine=embedded generates in the "
                    "trainer's own processes; set rollout.engine=sglang, or leave rollout."
                    f"{name.partition('=')[0]} out"
                ),
            )
            for name in (
                "max_staleness=1",
                "colocated=true",
                "step_budget_s=60.0",
                "step_budget_tokens=1000",
            )
        ),
        (
            [*AHEAD, "debug.replay=runs/a"],
            (
                "rollout.max_staleness=1, debug.replay=runs/a: responses from files need not be "
                "generated ahead; leave rollout.max_staleness out; "
                "algorithm.rollout_correction=tis_full weighs their tokens as then"
            ),
        ),
        (
            ["algorithm.rollout_correction=tis", *INTERNAL],
            (
                "algorithm.rollout_correction=tis with an internal phase: there the sampler's and "
                "the learner's log-probs are of two policies, so no importance weight is defined; "
                "set algorithm.rollout_correction=tis_full to weigh the tokens of full-policy "
                "steps alone, or auto, which does that where rollout.max_staleness > 0"
            ),
        ),
        (
            [*AHEAD, *INTERNAL],
            (
                "rollout.max_staleness=1 with an internal phase: there the sampler's and the "
                "learner's log-probs are of two policies, so no importance weight is defined for "
                "stale responses; set rollout.overlap_phases=full to generate ahead in the "
                "full-policy phase only, or rollout.max_staleness=0"
            ),
        ),
        (
            [*INTERNAL, "bupo.internal_layout.dp=1", "debug.mismatch_every=5"],
            "debug.mismatch_every=5 with bupo.internal_layout: an actor with the layers of the ",
        ),
    ],
)
def test_rollouts_that_cannot_be_made_or_learned_from_are_refused_with_a_way_out(
    overrides: list[str], message: str
):
    with pytest.raises(InputError) as error:
        check_rollout(config_with(*overrides))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        AHEAD,
        (*AHEAD, "bupo.target_layer=6"),  # with internal_steps=0: GRPO
        (*AHEAD, *INTERNAL, "rollout.overlap_phases=full"),
        ("rollout.engine=sglang", "rollout.step_budget_s=60", "rollout.step_budget_tokens=1000"),
        (*INTERNAL, "debug.mismatch_every=5"),
        ("bupo.internal_layout.dp=1", "debug.mismatch_every=5"),
        ("algorithm.rollout_correction=tis", "bupo.target_layer=6"),
        ("algorithm.rollout_correction=tis_full", *INTERNAL),
    ],
)
def test_what_is_defined_is_allowed(overrides: tuple[str, ...]):
    check_rollout(config_with(*overrides))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), []),
        (AHEAD, []),
        (INTERNAL, []),
        (("rollout.top_p=0.8",), []),
        ((*AHEAD, "algorithm.rollout_correction=none"), ["as if they were of the present ones"]),
        ((*AHEAD, "rollout.top_p=0.8"), ["1/top_p=1.25 times as often"]),
        (("algorithm.rollout_correction=tis", "rollout.top_p=0.8"), ["1/top_p=1.25"]),
        (("algorithm.rollout_correction=tis_full", *INTERNAL), []),
        (
            (*AHEAD, *INTERNAL, "rollout.overlap_phases=full"),
            ["note: truncated importance sampling weighs the tokens of full-policy steps alone"],
        ),
    ],
)
def test_what_runs_but_is_not_what_it_seems_is_told(overrides: tuple[str, ...], told: list[str]):
    texts = doubts(config_with(*overrides))
    assert len(texts) == len(told)
    assert all(part in text for part, text in zip(told, texts, strict=True))
