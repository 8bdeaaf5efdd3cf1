"""Settings of `hicra` that do nothing, or not what they say."""

from __future__ import annotations

from dataclasses import asdict

from megatron_bupo.config.hicra import HicraConfig
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError


def check_hicra(config: Config) -> None:
    """HICRA has grams if it needs them, meets a step of the run if it does more than watch, and
    rewards no failure.
    """
    hicra = config.hicra
    if not hicra.enabled:
        _nothing_else_is_set(hicra)
        return
    if hicra.form == "paper" and hicra.alpha > 1:
        raise InputError(
            f"hicra.alpha={hicra.alpha:g}",
            "makes A + alpha |A| positive where A is negative: failures would be rewarded",
            "choose at most 1, or hicra.form=amplify",
        )
    if not hicra.alpha:
        return
    _it_meets_a_step(config)
    if (
        hicra.mask == "entropy"
        and hicra.phases != "full"
        and config.bupo.internal_layout is not None
    ):
        raise InputError(
            "hicra.mask=entropy",
            "asks for entropies of the full policy, and the actor of bupo.internal_layout has only "
            "the internal policy's layers",
            "set hicra.phases=full or bupo.internal_layout=null",
        )


def _nothing_else_is_set(hicra: HicraConfig) -> None:
    default = asdict(HicraConfig())
    for name, value in asdict(hicra).items():
        if value != default[name]:
            shown = f"{value:g}" if isinstance(value, float) else value
            reason = "does nothing without hicra.grams"
            way_out = "set hicra.grams to a file of strategic grams, or leave both out"
            raise InputError(f"hicra.{name}={shown}", reason, way_out)


def _it_meets_a_step(config: Config) -> None:
    """Of the phases that it is for, some step comes at `from_step` or later."""
    hicra, resting = config.hicra, config.resting_steps
    internal = min(sum(steps for _, steps in config.bupo.phases()), config.steps - resting)
    ends = {"internal": resting + internal if internal else 0, "both": config.steps}
    end = ends.get(hicra.phases, config.steps if resting + internal < config.steps else 0)
    if hicra.from_step >= end:
        after = f" after the {resting} of critic.warmup_steps" if resting else ""
        raise InputError(
            f"hicra.phases={hicra.phases}, hicra.from_step={hicra.from_step}",
            f"no step of the run is such a one: of its {config.steps} steps the first {internal}"
            f"{after} train internal policies",
            "choose an earlier step or hicra.phases=both",
        )
