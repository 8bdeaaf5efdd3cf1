from __future__ import annotations

import dataclasses

import pytest

from megatron_bupo.errors import InputError
from megatron_bupo.mcore.native import build_native, check_native


@dataclasses.dataclass
class Native:
    """A config of some release of Megatron-Core."""

    known: int = 1
    other: int = 2
    derived: int = dataclasses.field(init=False, default=3)


def test_a_native_option_goes_to_the_config_that_knows_it():
    ours = {"known": 10, "gone in this release": 20}
    assert build_native(Native, ours, {"other": 30, "elsewhere": 40}) == Native(10, 30)
    assert build_native(Native, ours, {"known": 50, "derived": 60}) == Native(50, 2)


def test_an_option_that_no_native_config_has_is_answered_with_the_nearest_name():
    check_native({"recompute_granularity": "full", "overlap_grad_reduce": True, "adam_eps": 1e-8})
    with pytest.raises(InputError) as caught:
        check_native({"recompute_granularty": "full"})
    message = str(caught.value)
    assert message.startswith(
        "megatron.recompute_granularty=full: no such field in Megatron-Core's"
    )
    assert message.endswith("; did you mean megatron.recompute_granularity?")
    with pytest.raises(InputError, match=r"zzzzzz=1: .*; remove it"):
        check_native({"zzzzzz": 1})
