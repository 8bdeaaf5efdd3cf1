from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy
from tests.mcore.actors import random_batch, run_config, start_trainer
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.algorithm.bupo import Policy

LAYERS = ["layer 1", "layer 2", "layer 3", "layer 4"]


def _modules_run(model_dir: Path, policies: list[Policy]) -> list[Counter[str]]:
    """How often each policy's update runs each layer and the final norm, two micro-batches long."""
    trainer = start_trainer(model_dir, run_config())
    ran: Counter[str] = Counter()
    [gpt] = trainer.gpt_chunks
    modules = {f"layer {layer.layer_number}": layer for layer in gpt.decoder.layers}
    for name, module in {**modules, "final_norm": gpt.decoder.final_layernorm}.items():
        module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    batch, counts = random_batch(responses=4), []
    for policy in policies:
        ran.clear()
        old, _ = trainer.logprobs(batch, policy)
        trainer.update(batch.with_old_logprobs(old), policy, lr=0.0)
        counts.append(Counter(ran))
        assert trainer.router.policy == FULL
    return counts


def test_layers_above_the_target_do_not_run(tiny_model_dir: Callable[..., Path]):
    policies = [InternalLayerPolicy(1), InternalLayerPolicy(3, read_out_norm=True), FULL]
    [[first, normed, full]] = run_ranks(1, _modules_run, tiny_model_dir(vocab=67), policies)
    passes = 2 * 2  # log-probs and update, of two micro-batches
    assert first == {"layer 1": passes}
    assert normed == dict.fromkeys(["layer 1", "layer 2", "layer 3", "final_norm"], passes)
    assert full == dict.fromkeys([*LAYERS, "final_norm"], passes)


def _fail_halfway(model_dir: Path) -> Policy:
    trainer = start_trainer(model_dir, run_config())
    with pytest.raises(KeyError), trainer.router.computing(InternalLayerPolicy(1)):
        raise KeyError
    return trainer.router.policy


def test_an_error_does_not_leave_the_model_shortened(tiny_model_dir: Callable[..., Path]):
    assert run_ranks(1, _fail_halfway, tiny_model_dir()) == [FULL]
