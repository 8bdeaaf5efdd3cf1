"""How does a server sample from softmax(E h_l)? Its model stops after layer l and skips the norm.

Two scalars among the weights say so: `internal_policy.layer` (from 1; the model's number of layers
is the full policy) and `internal_policy.norm` (1: through the final norm). They come by any way
that weights come. As long as they do not, the model is SGLang's own, bit for bit.

SGLang keeps the residual stream as a sum that is still to be made, and its final norm makes it; so
without the norm the sum remains. A switch is never raised about: an exception while tensors load
ends the server's process. A refused one is logged and changes nothing, and `/get_weights_by_name`
tells what is in force.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from torch import Tensor

LAYER, NORM = "internal_policy.layer", "internal_policy.norm"
log = logging.getLogger(__name__)


class SwitchableReadOut:
    """To be mixed into a causal language model, in front of it."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_end = self.model.end_layer

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Load `weights` into all layers, whichever of them run, and switch if told to."""
        switch: dict[str, float] = {}

        def of_the_model() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in {LAYER, NORM}:
                    switch[name] = tensor.item()
                else:
                    yield name, tensor

        end, self.model.end_layer = self.model.end_layer, self.own_end  # it skips those above
        try:
            loaded = super().load_weights(of_the_model(), *args, **kwargs)  # type: ignore[misc]
        finally:
            self.model.end_layer = end
        if switch:
            layer, norm = self._in_force()
            self._switch(int(switch.get(LAYER, layer)), norm=bool(switch.get(NORM, norm)))
        return loaded

    def get_weights_by_name(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """SGLang's own, which also knows the two scalars."""
        if name in {LAYER, NORM}:
            return [self._in_force()[name == NORM]]
        return super().get_weights_by_name(name, *args, **kwargs)  # type: ignore[misc]

    def _in_force(self) -> tuple[float, float]:
        """The layer and the norm."""
        return float(self.model.end_layer), float("forward" not in vars(self.model.norm))

    def _switch(self, layer: int, *, norm: bool) -> None:
        layers = len(self.model.layers)
        is_full = layer == layers and norm
        reason = None if is_full else _obstacle()
        if not 1 <= layer <= layers:
            reason = f"the model has {layers} layers"
        if reason is not None:
            log.error("internal layer %d is not sampled from: %s", layer, reason)
            return
        self.model.end_layer = layer
        vars(self.model.norm).pop("forward", None)
        if not norm:
            self.model.norm.forward = _sum_alone
        log.info("sampling from layer %d of %d, final norm: %s", layer, layers, norm)


def _sum_alone(x: Tensor, residual: Tensor | None = None) -> Any:
    """What the final norm returns, without the norm."""
    if residual is None:
        return x
    return x + residual, residual


def _obstacle() -> str | None:
    """Why this server cannot stop after a layer."""
    parallel = get_parallel()
    if not cuda_graph_fully_disabled():
        return "its CUDA graphs replay all layers; start it with --disable-cuda-graph"
    if parallel.pp_size > 1:
        return "its layers are spread over pipeline stages"
    if parallel.attn_dp_size > 1 or parallel.attn_cp_size > 1 or parallel.enable_layernorm_sp:
        return "its ranks share tokens between layers; tensor parallelism alone is supported"
    if get_exec().overlap.enable_two_batch_overlap:
        return "two-batch overlap always runs all layers"
    if get_spec().speculative_algorithm is not None:
        return "speculative decoding drafts for the full policy"
    return None
