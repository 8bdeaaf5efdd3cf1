from __future__ import annotations

import io
import math

from rich.console import Console

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from megatron_bupo.record.console import Display, log_line, sparkline
from tests.record.runs import records

RUN = records(("internal layer 6", 12), ("full", 3), evaluate_every=15)


def show(*, terminal: bool, **knobs: bool) -> str:
    """Everything that a display of RUN prints."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with Display(300, title="runs/x", console=console, **knobs) as display:
        display.say("the data is [here]")
        for record in RUN:
            display.step_begins(InternalLayerPolicy(6) if record["step"] < 12 else FULL)
            with display.doing("generate"):
                pass
            display.step_done(record)
    return screen.getvalue()


def test_a_step_is_one_line_with_its_policy_reward_update_entropies_and_times():
    assert log_line(RUN[11], 300) == (
        "step 12/300  internal layer 6 | reward 0.310  response 1830 tok | clip 0.7%  grad 0.31"
        " | H_6 1.89  H 0.49 nats | generate 41 s  train 18 s"
    )


def test_the_line_of_the_full_policy_has_one_entropy_and_the_accuracy_where_measured():
    assert log_line(RUN[14], 300) == (
        "step 15/300  full | reward 0.340  response 1830 tok | clip 0.7%  grad 0.31"
        " | H 0.49 nats | held-out 0.400 | generate 41 s  train 18 s"
    )
    assert "held-out before 0.250" in log_line(RUN[0], 300)


def test_a_run_with_a_reference_tells_how_far_it_is():
    assert "grad 0.31  KL 0.0025 |" in log_line(
        RUN[0] | {"update/kl_to_reference_nats": 0.0025}, 300
    )


def test_what_a_critic_foresees_is_on_the_line_and_is_never_minus_nothing():
    for foreseen, shown in ((0.213, "21%"), (-0.001, "0%")):
        record = {"step": 0, "policy": "critic alone", "critic/explained_variance": foreseen}
        assert log_line(record, 1) == f"step 1/1  critic alone | critic foresees {shown}"


def test_groups_that_were_replaced_are_on_the_line():
    replaced, none = (RUN[0] | {"rollout/replaced_groups": n} for n in (3.0, 0.0))
    assert "response 1830 tok  3 groups replaced |" in log_line(replaced, 300)
    assert "replaced" not in log_line(none, 300)


def test_what_goes_wrong_is_on_the_line_and_what_is_missing_is_not():
    wrong = {"truncated_fraction": 0.25, "cut_fraction": 0.5, "reward_warnings": 3.0}
    record = RUN[0] | {f"rollout/{name}": value for name, value in wrong.items()}
    assert "truncated 25%  cut 50%  3 grader warnings" in log_line(record, 300)
    assert log_line({"step": 0, "policy": "full"}, 1) == "step 1/1  full"


def test_outside_a_terminal_every_step_is_a_line_and_nothing_else():
    lines = show(terminal=False).splitlines()
    assert lines[0] == "the data is [here]"
    assert lines[1:] == [log_line(record, 300) for record in RUN]
    assert show(terminal=True, live=False).count("\n") == len(lines)


def test_a_terminal_shows_a_panel_that_ends_on_the_last_step():
    shown = show(terminal=True)
    assert "step 12/300" not in shown  # no log lines
    for fact in ["runs/x", "15/300", "full", "0.340", "0.486 nats", "0.250 → 0.400"]:
        assert fact in shown.rpartition("╭")[2]
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_a_quiet_rank_prints_nothing():
    assert show(terminal=True, on=False) == show(terminal=False, on=False) == ""


def test_a_sparkline_spans_its_own_range_with_gaps_where_not_finite():
    assert sparkline([0.0, 1.0, 7.0]) == "▁▂█"
    assert sparkline([2.0, math.nan, 2.0]) == "▁ ▁"
    assert sparkline([math.nan]) == ""
