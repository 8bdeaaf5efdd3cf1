"""Can the ranks share the experts of this model the way `parallel.ep` and `parallel.etp` say?"""

from __future__ import annotations

from typing import Any, Protocol

from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

DISPATCHERS = ("alltoall", "flex")
BALANCING = ("aux_loss", "none")


class ExpertSizes(Protocol):
    """The part of `hf.experts.Experts` that is checked."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def number(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...


def check_expert_ranks(config: Config, world: int) -> None:
    """Expert groups divide the ranks of a pipeline stage."""
    parallel = config.parallel
    etp = parallel.etp or parallel.tp
    ranks = world // parallel.pp
    if ranks % (parallel.ep * etp):
        fits = [n for n in range(1, ranks + 1) if ranks % (n * etp) == 0]
        raise InputError(
            f"parallel.ep={parallel.ep}, parallel.etp={etp}",
            f"{parallel.ep * etp} ranks hold all experts of a layer, which does not divide the "
            f"{ranks} ranks of a pipeline stage",
            f"choose parallel.ep from {', '.join(map(str, fits))}"
            if fits
            else f"choose a parallel.etp that divides {ranks}",
        )


def check_experts(config: Config, experts: ExpertSizes | None, layers: int) -> None:
    """The rules about a model whose lowest `layers` are run, with `experts` or without any."""
    if experts is None:
        _no_option_speaks_of_experts(config)
    if experts is None or min(experts.layers) > layers:
        _no_rank_shares_experts(config, layers)
        return
    _experts_divide(config, experts)
    _tensor_parallelism_splits_sequences_too(config)
    _one_of(config.megatron, "moe_token_dispatcher_type", DISPATCHERS, "rows differ in length")
    _one_of(config.megatron, "moe_router_load_balancing_type", BALANCING, "rows are packed")
    coefficient = config.megatron.get("moe_aux_loss_coeff", 0.0)
    if not isinstance(coefficient, int | float) or not coefficient >= 0:
        raise InputError(
            f"megatron.moe_aux_loss_coeff={coefficient}", "is not a number of at least 0"
        )


def _no_option_speaks_of_experts(config: Config) -> None:
    for key, value in config.megatron.items():
        if key.startswith("moe_"):
            raise InputError(
                f"megatron.{key}={value}", "speaks of experts, and the model has none", "remove it"
            )


def _no_rank_shares_experts(config: Config, layers: int) -> None:
    parallel = config.parallel
    for key, value, default in (("ep", parallel.ep, 1), ("etp", parallel.etp, None)):
        if value != default:
            raise InputError(
                f"parallel.{key}={value}",
                f"shares experts, and layers 1 to {layers} have none",
                "remove it",
            )


def _experts_divide(config: Config, experts: ExpertSizes) -> None:
    ep, etp = config.parallel.ep, config.parallel.etp or config.parallel.tp
    for key, value, what, size in (
        ("ep", ep, "experts", experts.number),
        ("etp", etp, "channels of each expert", experts.ffn_size),
    ):
        if size % value:
            fits = [str(n) for n in range(1, value) if size % n == 0]
            raise InputError(
                f"parallel.{key}={value}",
                f"does not divide the model's {size} {what}",
                f"choose parallel.{key} from {', '.join(fits)}",
            )


def _tensor_parallelism_splits_sequences_too(config: Config) -> None:
    if config.parallel.tp > 1 and not config.parallel.sp:
        raise InputError(
            f"parallel.tp={config.parallel.tp}, parallel.sp=false",
            "every tensor-parallel rank would send the same tokens to the experts",
            "set parallel.sp=true",
        )


def _one_of(passed: dict[str, Any], key: str, choices: tuple[str, ...], why: str) -> None:
    value = passed.get(key, choices[0])
    if value not in choices:
        raise InputError(
            f"megatron.{key}={value}", f"is not offered: {why}", f"choose {' or '.join(choices)}"
        )
