"""One run: its knobs (`schema`), where their values come from (`load`), what fits (`checks`)."""

from __future__ import annotations

from megatron_bupo.config.load import expand, flatten, load_config, to_yaml
from megatron_bupo.config.schema import Config

__all__ = ["Config", "expand", "flatten", "load_config", "to_yaml"]
