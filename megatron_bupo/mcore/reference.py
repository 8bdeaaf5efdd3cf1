"""The weights that training began with, in the model for as long as a pass takes.

A copy of this rank's shards waits in host memory and changes places with the model's own values,
one parameter at a time: no second model is ever on the device, and what comes back is what left,
bit for bit. Values move, tensors stay: a parameter may be a view of DDP's or the distributed
optimizer's buffer, and what that optimizer steps may be a view of the parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ReferenceWeights:
    """What `parameters` hold now, for good."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._elsewhere = {p: _host_copy(p) for p in parameters}

    @contextmanager
    def in_place_of(self, parameters: Collection[nn.Parameter]) -> Iterator[None]:
        """Inside the block `parameters`, all those that are read there, are as in the beginning."""
        self._exchange(parameters)
        try:
            yield
        finally:
            self._exchange(parameters)

    @torch.no_grad()
    def _exchange(self, parameters: Collection[nn.Parameter]) -> None:
        for p in parameters:  # in stream order: nothing here waits for the device
            here = p.detach().clone()
            p.copy_(self._elsewhere[p], non_blocking=True)
            self._elsewhere[p].copy_(here, non_blocking=True)


def _host_copy(parameter: nn.Parameter) -> Tensor:
    pinned = torch.cuda.is_available()
    copy = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=pinned)
    return copy.copy_(parameter.detach())
