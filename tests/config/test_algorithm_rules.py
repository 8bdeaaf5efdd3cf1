from __future__ import annotations

import pytest

from megatron_bupo.config.algorithm_rules import doubts
from megatron_bupo.config.schema import AlgorithmConfig, Config


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_an_estimator_that_does_not_restrain_where_it_stands_is_told_of(estimator: str, place: str):
    without, kl = (
        Config(algorithm=AlgorithmConfig(kl_coefficient=c, kl_estimator=estimator, kl_in=place))
        for c in (0.0, 0.1)
    )
    told = doubts(kl)
    if (estimator, place) in {("k2", "loss"), ("k3", "loss"), ("k1", "reward")}:
        assert told == []
    else:
        [text] = told
        assert text.startswith(f"warning: algorithm.kl_estimator={estimator} in the {place} ")
    assert doubts(without) == []
