from __future__ import annotations

import pytest

from megatron_bupo.config import load_config
from megatron_bupo.config.algorithm_rules import doubts


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_an_estimator_that_does_not_restrain_where_it_stands_is_told_of(estimator: str, place: str):
    keys = [f"algorithm.kl_estimator={estimator}", f"algorithm.kl_in={place}"]
    told = doubts(load_config(None, [*keys, "algorithm.kl_coefficient=0.1"]))
    if (estimator, place) in {("k2", "loss"), ("k3", "loss"), ("k1", "reward")}:
        assert told == []
    else:
        [text] = told
        assert text.startswith(f"warning: algorithm.kl_estimator={estimator} in the {place} ")
    assert doubts(load_config(None, keys)) == []
