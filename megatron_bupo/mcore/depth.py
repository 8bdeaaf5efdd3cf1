"""An internal layer policy is the same Megatron model, run to layer l.

Layers above l become the identity, so h_l travels on through the ordinary pipeline schedule to the
last stage, where the unembedding reads it. Schedules, tensor shapes and sends stay as they are;
what is skipped costs nothing. Nothing is forked: each layer's class is exchanged for a subclass of
itself that asks the shared `DepthRouter` whether to run, which works for any layer class and keeps
parameter names.

Backward stops likewise below the lowest layer that learns, where `optimizer.lr_factors` freezes
the embedding and the layers next to it: those run, but remember nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy


class DepthRouter:
    """Which policy the attached model computes; `with router.computing(policy): ...` sets it."""

    def __init__(self) -> None:
        self.policy: Policy = FULL
        self.frozen_layers = 0  # from the bottom up, if the embedding is frozen too
        self._undo: list[Callable[[], None]] = []

    @contextmanager
    def computing(self, policy: Policy) -> Iterator[None]:
        """Compute `policy` inside the block."""
        before, self.policy = self.policy, policy
        try:
            yield
        finally:
            self.policy = before

    def detach(self) -> None:
        """Give every module its own class back."""
        while self._undo:
            self._undo.pop()()

    def route(self, chunks: Sequence[nn.Module]) -> None:
        """Make `chunks` stop where this router's policy does."""
        for chunk in chunks:
            decoder: Any = chunk.decoder
            for layer in decoder.layers:
                self._exchange(layer, _routed_layer)
            if decoder.final_layernorm is not None:
                self._exchange(decoder.final_layernorm, _routed_norm)
            self._undo.append(decoder.register_forward_hook(_own_node).remove)

    def _exchange(self, module: nn.Module, routed: Callable[..., type]) -> None:
        base = type(module)
        subclass: Any = routed(base, self)
        subclass.depth_router = self
        # Whoever looks for modules by the name of their class (LoRA does) shall find them.
        subclass.__name__, subclass.__qualname__ = base.__name__, base.__qualname__
        module.__class__ = subclass
        self._undo.append(partial(setattr, module, "__class__", base))

    def skips_layer(self, layer: int) -> bool:
        """Is `layer` (counted from 1) above what the policy reads?"""
        return is_above(self.policy, layer)

    def skips_final_norm(self) -> bool:
        """The paper reads h_l without the final norm (Eq 5); with it is the ablation of Table 5."""
        return skips_final_norm(self.policy)


def is_routed(chunk: Any) -> bool:
    """Does a router say where `chunk` stops?"""
    norm = chunk.decoder.final_layernorm
    parts = [*chunk.decoder.layers, *([norm] if norm is not None else [])]
    return any(hasattr(type(part), "depth_router") for part in parts)


def is_above(policy: Policy, layer: int) -> bool:
    """Does `policy` not reach `layer` (counted from 1)?"""
    return isinstance(policy, InternalLayerPolicy) and layer > policy.layer


def skips_final_norm(policy: Policy) -> bool:
    """Does `policy` read the residual stream without the final norm?"""
    return isinstance(policy, InternalLayerPolicy) and not policy.read_out_norm


def _routed_layer(base: type, router: DepthRouter) -> type:
    class RoutedLayer(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if router.skips_layer(self.layer_number):
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                return hidden, kwargs.get("context")
            if self.layer_number <= router.frozen_layers and torch.is_grad_enabled():
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                with torch.no_grad():
                    out, context = super().__call__(*args, **kwargs)
                return _NoGradient.apply(hidden, [out]), context
            return super().__call__(*args, **kwargs)

    return RoutedLayer


class _NoGradient(torch.autograd.Function):
    """A layer's output from its input, with a gradient of zero: pipeline stages below wait for
    one.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, out: list[Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shape = hidden.shape
        return out[0]  # in a list, so that it is no input that is handed through

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        [grad] = grads
        return (None if grad is None else grad.new_zeros(ctx.shape)), None


def _routed_norm(base: type, router: DepthRouter) -> type:
    class RoutedNorm(base):  # type: ignore[misc, valid-type]
        def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if router.skips_final_norm():
                return hidden
            return super().__call__(hidden, *args, **kwargs)

    return RoutedNorm


def _own_node(_module: nn.Module, _args: Any, output: Any) -> Any:
    """A stage that skips all its layers must still return a tensor of its own.

    The 1F1B schedule frees outputs and starts backward from them, so an output may be neither the
    received leaf itself nor a view of it.
    """
    if isinstance(output, Tensor) and output.is_leaf and output.requires_grad:
        return output.clone()
    if isinstance(output, Tensor) and output._base is not None:
        return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True)
    return output


def attach(chunks: Sequence[nn.Module]) -> DepthRouter:
    """Make the GPTModel `chunks` of this rank able to stop at any layer; returns their common
    switch.
    """
    router = DepthRouter()
    router.route(chunks)
    return router


@contextmanager
def returning_hidden_states(chunk: Any) -> Iterator[None]:
    """Inside the block `chunk` returns hidden states `[tokens, batch, hidden]`, not logits.

    GPTModel's unembedding would materialise `[tokens, vocab]`; `logprobs` unembeds in chunks
    instead. Only for the forward call: the reduction of tied embeddings asks `post_process` too.
    The final norm lives in the decoder and is not affected.
    """
    before, chunk.post_process = chunk.post_process, False
    try:
        yield
    finally:
        chunk.post_process = before
