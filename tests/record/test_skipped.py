from __future__ import annotations

import math

import pytest

from megatron_bupo.config.schema import OptimizerConfig
from megatron_bupo.errors import InputError
from megatron_bupo.record.measures import update_measures
from megatron_bupo.record.skipped import SkippedUpdates
from megatron_bupo.types import UpdateReport

GOOD = UpdateReport({"update/loss": 0.5, "update/grad_norm": 2.0, "update/skipped": 0.0})
NAN = UpdateReport({"update/loss": math.nan, "update/grad_norm": math.nan, "update/skipped": 1.0})
INF = UpdateReport({"update/loss": 0.25, "update/grad_norm": math.inf, "update/skipped": 1.0})


def test_a_step_tells_of_its_skipped_updates_in_one_line_with_their_cause():
    skipped = SkippedUpdates(OptimizerConfig(max_skipped_updates=9))
    assert skipped.after(0, [GOOD, GOOD]) == []
    assert skipped.after(11, [GOOD, NAN, INF, GOOD]) == [
        "step 12: 2 of 4 updates skipped: the gradient norm was inf (the loss 0.25)"
    ]
    assert skipped.after(12, [NAN]) == [
        "step 13: 1 of 1 updates skipped: the loss was nan, the gradient norm nan"
    ]


def test_too_many_in_a_row_stop_the_run_across_steps_but_a_good_update_begins_anew():
    skipped = SkippedUpdates(OptimizerConfig(max_skipped_updates=3))
    skipped.after(0, [NAN, NAN, GOOD, NAN])
    skipped.after(1, [NAN])
    with pytest.raises(InputError) as error:
        skipped.after(2, [INF, GOOD])
    assert str(error.value) == (
        "step 3: 3 skipped updates in a row: the gradient norm was inf (the loss 0.25); start "
        "again with a lower optimizer.lr, to go on from the last checkpoint, whose weights are "
        "finite, or raise optimizer.max_skipped_updates"
    )


def test_means_over_a_step_are_those_of_the_updates_that_were_made():
    measures = update_measures([GOOD, NAN, GOOD], lr=1e-3)
    assert measures["update/loss"] == 0.5
    assert measures["update/skipped"] == 1
    assert math.isnan(update_measures([NAN], lr=1e-3)["update/loss"])


def test_the_critics_updates_are_counted_and_named_apart_from_the_policys():
    bad = {"critic/value_loss": math.nan, "critic/grad_norm": 2.0, "critic/skipped": 1.0}
    skipped = SkippedUpdates(OptimizerConfig(max_skipped_updates=2), of_critic=True)
    assert skipped.after(0, [UpdateReport(bad)]) == [
        "step 1: 1 of 1 updates of the critic skipped: the loss was nan, the gradient norm 2.0"
    ]
    with pytest.raises(InputError, match=r"a lower critic\.optimizer\.lr, "):
        skipped.after(1, [UpdateReport(bad)])
    assert update_measures([UpdateReport(bad)], lr=1e-3, area="critic")["critic/skipped"] == 1
