"""Can the internal phases run under `bupo.internal_layout`?

It is another layout of the same ranks, for an actor with the layers of the phase alone. So all
rules about `parallel.*` hold for it too, said of its own keys and of fewer layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from megatron_bupo.config.expert_rules import check_expert_ranks
from megatron_bupo.config.layout import UNEVEN
from megatron_bupo.config.parallel_rules import (
    ModelSizes,
    check_parallel,
    check_parallel_against_model,
)
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

KEY = "bupo.internal_layout"


def internal_config(config: Config) -> Config:
    """The settings of an actor under `bupo.internal_layout`."""
    layout = config.bupo.internal_layout
    assert layout is not None
    # Keys for uneven stages speak of the whole model's.
    megatron = {key: value for key, value in config.megatron.items() if key not in UNEVEN}
    return replace(config, parallel=layout, megatron=megatron)


def check_internal_layout(config: Config, world: int) -> None:
    """The rules that need no model; `parallel` has `world` ranks."""
    layout = config.bupo.internal_layout
    if layout is None or not config.bupo.phases():
        return
    _sizes_are_in_range(config)
    _one_kind_of_optimizer(config)
    with _named_as_its_own():
        check_parallel(internal_config(config))
    ranks = layout.tp * layout.cp * layout.pp
    if world % ranks or (layout.dp is not None and layout.dp * ranks != world):
        dp = "" if layout.dp is None else f" x dp {layout.dp}"
        raise InputError(
            f"{KEY}: tp {layout.tp} x cp {layout.cp} x pp {layout.pp}{dp}",
            f"does not give the {world} ranks of parallel, and both run on the same ones",
            f"leave {KEY}.dp out"
            if world % ranks == 0
            else f"choose sizes whose product divides {world}",
        )
    with _named_as_its_own():
        check_expert_ranks(internal_config(config), world)


def check_internal_layout_against_model(config: Config, model: ModelSizes) -> None:
    """Layers, heads and channels divide among its ranks, in each internal phase."""
    layout = config.bupo.internal_layout
    if layout is None:
        return
    for layer, _ in config.bupo.phases():
        chunks = layout.pp * layout.vpp
        if layer % chunks:
            vpp = f", {KEY}.vpp={layout.vpp}" if layout.vpp > 1 else ""
            fitting = [n for n in range(1, layer + 1) if layer % (n * layout.vpp) == 0]
            raise InputError(
                f"{KEY}.pp={layout.pp}{vpp}",
                f"does not divide the {layer} layers of the phase that trains layer {layer}",
                f"choose {KEY}.pp from {', '.join(map(str, fitting)) or 'none with this vpp'}",
            )
        lower = cast("ModelSizes", replace(cast("Any", model), layers=layer))
        with _named_as_its_own():
            check_parallel_against_model(internal_config(config), lower)


def _sizes_are_in_range(config: Config) -> None:
    layout = config.bupo.internal_layout
    for name in ("tp", "pp", "vpp", "dp", "cp", "ep", "etp"):
        size = getattr(layout, name)
        if size is not None and size < 1:
            raise InputError(f"{KEY}.{name}={size}", "is out of range", "must be at least 1")


def _one_kind_of_optimizer(config: Config) -> None:
    layout, wanted = config.bupo.internal_layout, config.parallel.distributed_optimizer
    if layout is not None and layout.distributed_optimizer != wanted:
        now, value = (str(flag).lower() for flag in (layout.distributed_optimizer, wanted))
        raise InputError(
            f"{KEY}.distributed_optimizer={now}",
            f"the optimizer's state goes on under parallel.distributed_optimizer={value}",
            f"set {KEY}.distributed_optimizer={value}",
        )


@contextmanager
def _named_as_its_own() -> Iterator[None]:
    """Inside the block, rules that speak of `parallel.*` mean `bupo.internal_layout.*`."""
    try:
        yield
    except InputError as error:
        parts = (re.sub(r"(?<![-\w.])parallel\.(?=\w)", f"{KEY}.", part) for part in error.args)
        raise InputError(*parts) from None
