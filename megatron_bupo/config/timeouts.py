"""How long may a rank wait for another? A stall is told of before the collectives give up."""

from __future__ import annotations

from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError

COLLECTIVE_TIMEOUT_S = 1800.0  # then waiting ranks fail, and with them the job


def check_timeouts(config: Config) -> None:
    """The report of a stall comes in time."""
    stall_s = config.logging.stall_s
    if stall_s >= COLLECTIVE_TIMEOUT_S:
        raise InputError(
            f"logging.stall_s={stall_s:g}",
            f"collectives give up after {COLLECTIVE_TIMEOUT_S:g} s, before the report",
            "choose less, at best half of it, or 0 for no report",
        )
