"""From a config to the engine that its rollouts come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.config import Config, expand
from megatron_bupo.mcore import cpu
from megatron_bupo.mcore.model import DTYPES
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.rollout.reading import stop_ids
from megatron_bupo.rollout.sglang import Model, SGLangEngine
from megatron_bupo.rollout.weights import StoredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_bupo.hf.architecture import DecoderSizes
    from megatron_bupo.rollout.engine import RolloutEngine
    from megatron_bupo.types import Weights


def rollout_engine(
    config: Config,
    arch: DecoderSizes,
    tokenizer: PreTrainedTokenizerBase,
    *,
    run_dir: Path,
    current_weights: Callable[[], Weights] | None = None,
    extra_env: Mapping[str, str] | None = None,
) -> RolloutEngine:
    """The engine that `rollout.engine` names, with the weights of `model.path`.

    `current_weights()` are all that the trainer has, for servers that lost theirs (without a
    trainer: those of the model directory); `extra_env` is more environment for servers that are
    started.
    """
    if config.rollout.engine == "embedded":
        return EmbeddedEngine(
            expand(config.model.path),
            tokenizer,
            batch_size=config.rollout.batch_size,
            dtype=DTYPES[config.model.dtype],
            device=cpu.device(),
        )
    stored = partial(StoredWeights, expand(config.model.path))
    ends = stop_ids(expand(config.model.path), tokenizer)
    return SGLangEngine(
        config,
        Model(arch, tokenizer, ends),
        run_dir=run_dir,
        current_weights=current_weights or stored,
        extra_env=extra_env,
    )
