from __future__ import annotations

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.errors import InputError

NEEDED = ["model.path=model", "data.train=train.jsonl"]


def test_a_stall_is_told_of_before_the_collectives_give_up():
    check(load_config(None, [*NEEDED, "logging.stall_s=1799"]), None)
    with pytest.raises(InputError) as error:
        check(load_config(None, [*NEEDED, "logging.stall_s=1800"]), None)
    assert str(error.value) == (
        "logging.stall_s=1800: collectives give up after 1800 s, before the report; "
        "choose less, at best half of it, or 0 for no report"
    )
