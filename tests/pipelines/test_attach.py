"""What `attach` refuses, what it leaves as it was, and what a controller can be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, PhaseSchedule
from megatron_bupo.errors import InputError
from megatron_bupo.pipelines import attach
from tests.pipelines.tiny_gpt import known_gpt, logits, tiny_gpt
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULE = PhaseSchedule.of([(2, 2), (3, 1)])


class FullyShardedDataParallel(nn.Module):
    """As others name theirs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _refusals() -> dict[str, str]:
    def refusal(module: Any, schedule: PhaseSchedule = SCHEDULE) -> str:
        with pytest.raises(InputError) as refused:
            attach(module, schedule)
        return str(refused.value)

    gpt: Any = tiny_gpt()
    found = {
        "fsdp": refusal(FullyShardedDataParallel(gpt)),
        "other": refusal([nn.Linear(2, 2)]),
        "nothing": refusal([]),
        "last": refusal([gpt], PhaseSchedule.of([(4, 1)])),
        "rest": refusal([gpt], PhaseSchedule.of([(2, 1)], resting_steps=1)),
    }
    for name, value in {"mtp_num_layers": 1, "fp8": "hybrid", "cpu_offloading": True}.items():
        harmless = getattr(gpt.config, name)
        setattr(gpt.config, name, value)
        found[name] = refusal([gpt])
        setattr(gpt.config, name, harmless)
    head, gpt.output_layer = gpt.output_layer, nn.Linear(16, 1)
    found["critic"] = refusal([gpt])
    gpt.output_layer = head
    controller = attach([gpt], SCHEDULE)
    found["twice"] = refusal([gpt])
    gpt.config.cuda_graph_impl = "local"
    assert logits(gpt).isfinite().all()  # as graphs for sampling may be there
    controller.set_step(0)
    with pytest.raises(InputError) as refused:
        logits(gpt)
    return found | {"graphs": str(refused.value)}


def test_what_cannot_have_internal_phases_is_refused_by_name():
    [found] = run_ranks(1, _refusals)
    for name, words in {
        "fsdp": "FullyShardedDataParallel: waits for the gradient of every parameter",
        "other": "Linear: is no Megatron-Core GPTModel",
        "nothing": "model_chunks=[]",
        "last": "internal layer 4: the model has 4 layers",
        "rest": "critic alone",
        "mtp_num_layers": "mtp_num_layers=1",
        "fp8": "fp8=hybrid",
        "cpu_offloading": "cpu_offloading=True",
        "critic": "output_layer=Linear",
        "twice": "GPTModel: has a controller already",
        "graphs": "cuda_graph_impl=local",
    }.items():
        assert words in found[name]


def _looks(gpt: Any) -> tuple[Any, ...]:
    names = [type(module).__name__ for module in gpt.modules()]
    shapes = {name: value.shape for name, value in gpt.state_dict().items() if value is not None}
    return names, shapes, [name for name, _ in gpt.named_parameters()]


def _attached_and_detached() -> None:
    gpt, computed = known_gpt()
    before, types = _looks(gpt), [type(module) for module in gpt.modules()]
    controller = attach(gpt, SCHEDULE)
    controller.set_step(0)
    assert computed(gpt) == "internal layer 2"
    assert _looks(gpt) == before
    controller.detach()
    assert computed(gpt) == "full"
    assert [type(module) for module in gpt.modules()] == types
    torch.optim.SGD(gpt.parameters(), lr=0.1).step()  # nobody asks for a step any more
    assert attach(gpt, SCHEDULE).policy == FULL


def test_names_and_classes_look_as_before_and_are_after_detach():
    run_ranks(1, _attached_and_detached)


def _asked() -> None:
    gpt, computed = known_gpt()
    controller = attach([gpt], SCHEDULE)
    assert computed(gpt) == "full"
    optimizer = torch.optim.SGD(gpt.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="set_step"):
        optimizer.step()
    policies = [str(controller.set_step(step)) for step in range(4)]
    assert policies == ["internal layer 2", "internal layer 2", "internal layer 3", "full"]
    controller.set_step(1)
    with controller.full_policy():
        assert computed(gpt) == "full"
        assert not logits(gpt).requires_grad
        controller.set_step(2)  # as an adapter does before each pass
        assert computed(gpt) == "full"
    assert computed(gpt) == "internal layer 3"
    controller.set_step(1)
    assert computed(gpt) == "internal layer 2"
    assert logits(gpt).requires_grad
    controller.leave_internal_phase(1)
    assert computed(gpt) == "full"
    assert controller.set_step(0) == InternalLayerPolicy(2)
    kept = controller.state_dict()
    controller.detach()
    again = attach([gpt], SCHEDULE)
    again.load_state_dict(kept)
    assert not again.is_internal
    assert again.set_step(1) == FULL
    with pytest.raises(ValueError, match="step=-1"):
        again.set_step(-1)


def test_the_step_decides_unless_the_phase_was_left():
    run_ranks(1, _asked)


def _gradients(settings: dict[str, Any]) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    gpt = tiny_gpt(**settings)
    attach([gpt], SCHEDULE).set_step(0)
    logits(gpt).square().mean().backward()
    return {name: p.grad for name, p in gpt.named_parameters()}


def _recomputed() -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    plain = _gradients({})
    for settings in ({**full, "recompute_num_layers": 1}, {**full, "recompute_num_layers": 4}):
        found = _gradients(settings)
        for name, grad in plain.items():
            assert (grad is None) == (found[name] is None), name
            assert grad is None or torch.equal(grad, found[name]), name
    assert plain["decoder.layers.1.mlp.linear_fc2.weight"] is not None
    assert plain["decoder.layers.2.mlp.linear_fc2.weight"] is None


def test_recomputation_runs_the_layers_that_the_forward_pass_ran():
    run_ranks(1, _recomputed)
