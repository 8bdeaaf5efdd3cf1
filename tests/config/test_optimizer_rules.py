from __future__ import annotations

from dataclasses import dataclass

import pytest

from megatron_bupo.config import Config, load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.errors import InputError

FACTORS = "optimizer.lr_factors"


@dataclass(frozen=True)
class Sizes:
    layers: int = 12
    heads: int = 4
    kv_heads: int = 4
    ffn_size: int = 64
    max_positions: int = 40960
    tied: bool = True
    experts: None = None


def config_with(*overrides: str) -> Config:
    return load_config(None, ["model.path=model", "data.train=train.jsonl", *overrides])


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            "{layers: 2}",
            (
                f"{FACTORS}.layers=2: names no part of the model; choose a layer (7, counted from "
                "1), layers (1-6), embedding, final_norm, unembedding"
            ),
        ),
        ("{0: 2}", f"{FACTORS}.0=2: names no part of the model; "),
        ("{0-3: 2}", f"{FACTORS}.0-3=2: names no part of the model; "),
        ("{6-1: 0.1}", f"{FACTORS}.6-1=0.1: names no part of the model; "),
        ("{7: -1}", f"{FACTORS}.7=-1: is out of range; must be at least 0 (0: frozen)"),
        ("{embedding: .nan}", f"{FACTORS}.embedding=nan: is out of range; must be at least 0"),
        (
            "{1-6: 0.1, 4-9: 2}",
            (
                f"{FACTORS}.4-9 with {FACTORS}.1-6: give layer 4 two factors; let the ranges not "
                "overlap"
            ),
        ),
        ("{3: 1, 3-3: 1}", f"{FACTORS}.3-3 with {FACTORS}.3: give layer 3 two factors; "),
    ],
)
def test_factors_that_mean_nothing_are_refused_with_a_way_out(factors: str, message: str):
    with pytest.raises(InputError) as error:
        check(config_with(f"{FACTORS}={factors}"), None)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (["{13: 2}"], Sizes(), f"{FACTORS}.13=2: the model has 12 layers; choose 1..12"),
        (["{9-13: 2}"], Sizes(), f"{FACTORS}.9-13=2: the model has 12 layers; choose 1..12"),
        (
            ["{unembedding: 0}"],
            Sizes(),
            (
                f"{FACTORS}.unembedding=0: the model's unembedding is its embedding (tied "
                f"weights); set {FACTORS}.embedding for both"
            ),
        ),
        (
            ["{1-3: 0, embedding: 0}", "bupo.target_layer=3", "bupo.internal_steps=5"],
            Sizes(),
            (
                f"{FACTORS}={{'1-3': 0.0, 'embedding': 0.0}}: freezes all that the internal "
                "policy of layer 3 could learn; leave a part of it a factor above 0"
            ),
        ),
        (
            ["{1-12: 0, embedding: 0, unembedding: 0, final_norm: 0}"],
            Sizes(tied=False),
            "freezes all that the full policy could learn",
        ),
    ],
)
def test_factors_that_do_not_fit_the_model_are_refused(
    overrides: list[str], model: Sizes, message: str
):
    factors, *others = overrides
    with pytest.raises(InputError) as error:
        check_against_model(config_with(f"{FACTORS}={factors}", *others), model)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("factors", "model"),
    [
        ("{1-6: 0, 7-12: 0.1, embedding: 0}", Sizes()),
        ("{12: 1e-3}", Sizes()),
        ("{unembedding: 0}", Sizes(tied=False)),
        ("{1-12: 0, embedding: 0, unembedding: 0}", Sizes(tied=False)),  # the final norm learns
    ],
)
def test_factors_that_leave_something_to_train_are_allowed(factors: str, model: Sizes):
    config = config_with(f"{FACTORS}={factors}")
    check(config, None)
    check_against_model(config, model)


def test_layers_may_be_written_as_numbers_and_set_one_by_one():
    config = config_with(f"{FACTORS}={{7: 2.0, 1-6: 0.1}}", f"{FACTORS}.embedding=0")
    assert config.optimizer.lr_factors == {"7": 2.0, "1-6": 0.1, "embedding": 0.0}
