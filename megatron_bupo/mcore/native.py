"""`megatron.*` keys go, under Megatron-Core's own names, to the dataclasses that have a field of
that name.

So a feature of the installed Megatron-Core needs no wrapper here:
`megatron.recompute_granularity=full` reaches TransformerConfig, `megatron.overlap_grad_reduce=true`
reaches DDP. Keys that describe the model, the layout or the learning rate belong to this project's
own config and are refused by `config.checks`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bupo.errors import InputError

NATIVE = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)


def _fields(native: type) -> set[str]:
    return {f.name for f in dataclasses.fields(native) if f.init}


def build_native(native: type, ours: Mapping[str, Any], passed: Mapping[str, Any]) -> Any:
    """`native(**...)` from our values and those of the user's `megatron.*` keys that it has.

    Our values that this Megatron-Core release does not know drop out: its dataclasses gain and lose
    fields between releases.
    """
    known = _fields(native)
    return native(**{k: v for k, v in {**ours, **passed}.items() if k in known})


def check_native(passed: Mapping[str, Any]) -> None:
    """Refuse `megatron.*` keys that no native config of the installed Megatron-Core has."""
    known = sorted(set().union(*(_fields(native) for native in NATIVE)))
    for key, value in passed.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                f"megatron.{key}={value}",
                "no such field in Megatron-Core's TransformerConfig, DDP or optimizer config",
                f"did you mean megatron.{near[0]}?" if near else "remove it",
            )
