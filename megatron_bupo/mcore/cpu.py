"""Megatron-Core on a machine without CUDA: the few names it needs, and nothing where CUDA exists.

Megatron-Core asks for CUDA in three ways: functions of `torch.cuda`, `device="cuda"` given to a
factory function, and methods of Tensor (`.cuda()`, and `.type()` compared with
'torch.cuda.FloatTensor' in the optimizers). Each name is replaced by a thin function that answers
for the CPU. Ordinary tensor operations are not touched: a TorchFunctionMode would do the same job
but intercepts every call of torch, which adds about a tenth to a step of the demo
(tools/bench_cpu_shim.py measures it).

Mixtures of experts also exchange parts of unequal size, which gloo does not.

`install()` does nothing at all where `torch.cuda.is_available()`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    "arange empty empty_like full full_like ones ones_like rand rand_like randint randn tensor "
    "zeros zeros_like"
).split()


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` with `device="cuda"` read as the CPU; pinned memory needs a driver, so not
    pinned.
    """

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


class _Stream:
    """A stream or event of a device that finishes each call before the next: nothing to wait
    for.
    """

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, *_: Any) -> _Stream:
        return self

    def wait_stream(self, *_: Any) -> None: ...

    wait_event = synchronize = record = wait = wait_stream

    def query(self) -> bool:
        return True


def _current_device() -> torch.device:
    return CPU


def _patch_torch_cuda(megatron_random: Any) -> None:
    cuda: Any = torch.cuda

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    cuda.current_device = _current_device
    # A function of its own for every name: torch._dynamo refuses one object under two names.
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_, **__: _Stream())
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.get_rng_state, cuda.set_rng_state = get_rng_state, set_rng_state
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state


def _patch_factories() -> None:
    # `with torch.device("meta")` knows the factories by identity, from a list made on first use. It
    # must list the originals: with ours in it transformers would silently build models with unset
    # buffers.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))


def _patch_tensor() -> None:
    tensor: Any = torch.Tensor
    move, type_name, pin = tensor.to, tensor.type, tensor.pin_memory

    @functools.wraps(tensor.cuda)
    def cuda(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    @functools.wraps(type_name)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_name(self, *args, **kwargs)
        asks_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core")
        if isinstance(answer, str) and asks_megatron:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    tensor.cuda, tensor.to, tensor.type = cuda, to, type_
    tensor.pin_memory = functools.wraps(pin)(lambda self, *_, **__: self)


def _patch_expert_dispatch(token_dispatcher: Any, mappings: Any) -> None:
    gather, reduce = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def moved(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        # Megatron leaves a tensor on the CPU as it is; all-to-all wants numbers.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    def lengthened(part: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat((part, part.new_zeros(rows - len(part), *part.shape[1:])))

    # gloo gathers and scatters equal parts only.
    def gathered(part: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(part, group, None, *args)
        whole = gather(lengthened(part, max(sizes)), group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])

    def scattered(whole: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce(whole, group, None, *args)
        parts = [lengthened(part, max(sizes)) for part in whole.split(sizes)]
        return reduce(torch.cat(parts), group)[: sizes[group.rank()]]

    token_dispatcher.maybe_move_tensor_to_cpu = moved
    mappings._gather_along_first_dim = gathered
    mappings._reduce_scatter_along_first_dim = scattered


def install() -> None:
    """Make Megatron-Core run on gloo and the CPU in this process, for good. A no-op where CUDA
    exists.
    """
    if torch.cuda.is_available() or torch.cuda.current_device is _current_device:
        return
    # Before any name changes: Megatron imports torch._dynamo, which lists functions by identity.
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    dynamo: Any = torch._dynamo.config
    dynamo.disable = True  # Megatron's jit_fuser is torch.compile: half a minute for each function
    _patch_factories()
    _patch_tensor()
    _patch_torch_cuda(megatron_random)
    _patch_expert_dispatch(token_dispatcher, mappings)


def device() -> torch.device:
    """Where this rank's tensors live: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU
