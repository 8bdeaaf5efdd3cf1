"""Can a run be watched, and guarded, like this?"""

from __future__ import annotations

from megatron_bupo.config.schema import AUTO, Config
from megatron_bupo.errors import InputError

NEEDS_ALL_LAYERS = ("perplexity_ratio", "kl_increase_nats", "entropy_increase_nats")
NEEDS_ANSWERS = ("repetition_increase", "response_tokens_ratio")


def max_response_tokens(config: Config) -> int:
    """The longest answer that a probe asks for."""
    return config.probe.max_response_tokens or config.rollout.max_response_tokens


def watched_layer(config: Config) -> int | None:
    """The layer whose internal policy is watched; None: the full policy alone."""
    layers = [layer for layer, _ in config.bupo.phases()]
    return config.probe.layer or max(layers, default=None)


def check_probe(config: Config) -> None:
    """All rules that need no model."""
    probe = config.probe
    if probe.every and probe.responses is None and config.debug.replay is not None:
        raise InputError(
            f"probe.every={probe.every}",
            f"has no engine that could sample its texts with debug.replay={config.debug.replay}",
            "give texts as probe.responses; run_dir/probe/responses.jsonl of the run that dumped "
            "the rollouts has them, if that had probes",
        )
    if config.bupo.guard.enabled:
        _check_guard(config)


def doubts(config: Config) -> list[str]:
    """What to tell the person who starts the run: a guard that looks too rarely leaves nothing."""
    bupo, every, patience = config.bupo, config.probe.every, config.bupo.guard.patience
    internal = sum(steps for _, steps in bupo.phases()) or bupo.internal_steps
    internal = min(internal, config.steps)
    if not bupo.guard.enabled or (looks := (internal - 1) // every) >= patience:
        return []
    often = (internal - 1) // patience
    way_out = f"set probe.every={often} or less" if often else "set bupo.guard=false"
    reason = f"looks {looks} times within the {internal} internal steps (probe.every={every})"
    needs = f"leaves after bupo.guard.patience={patience} crossings: it cannot act"
    return [f"warning: bupo.guard.enabled=true {reason} and {needs}; {way_out}"]


def check_probe_against_model(config: Config, layers: int) -> None:
    """The layer that is watched lies inside the model."""
    layer = config.probe.layer
    if layer is None or layer < layers:
        return
    reason = f"the model has {layers} layers"
    if layer == layers:
        reason = f"is the last layer of a {layers}-layer model, whose policy is the full policy"
    raise InputError(f"probe.layer={layer}", reason, f"choose 1..{layers - 1}")


def _check_guard(config: Config) -> None:
    where, bupo, guard = "bupo.guard.enabled=true", config.bupo, config.bupo.guard
    if not config.probe.every:
        way_out = "set probe.every, 5 say, or bupo.guard=false"
        raise InputError(where, "judges by probes, and probe.every=0 makes none", way_out)
    if not bupo.phases() and not (bupo.target_layer == AUTO and bupo.internal_steps):
        reason = "there is no internal phase that it could leave"
        raise InputError(where, reason, "set bupo.guard=false, or train an internal layer")
    named = (*NEEDS_ALL_LAYERS, *NEEDS_ANSWERS)
    if all(getattr(guard, name) is None for name in named):
        keys = ", ".join(f"bupo.guard.{name}" for name in named)
        raise InputError(where, f"has no bound: {keys} are null", "set one of them")
    for name in NEEDS_ALL_LAYERS if bupo.internal_layout is not None else ():
        if (value := getattr(guard, name)) is not None:
            raise InputError(
                f"bupo.guard.{name}={value:g}",
                "asks what the full policy says, and the actor of bupo.internal_layout has only "
                "the internal policy's layers",
                f"set bupo.guard.{name}=null or bupo.internal_layout=null",
            )
    for name in NEEDS_ANSWERS if config.debug.replay is not None else ():
        if (value := getattr(guard, name)) is not None:
            raise InputError(
                f"bupo.guard.{name}={value:g}",
                "asks for fresh answers, and with debug.replay there is no engine",
                f"set bupo.guard.{name}=null",
            )
