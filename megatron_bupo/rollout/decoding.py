"""Batched sampling from a transformers model: each prompt is read once, then a token per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from megatron_bupo import progress
from megatron_bupo.rollout.sampling import draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

DROP_FINISHED_BELOW = 0.75  # alive share of a batch's rows; dropping copies the cache, once


@dataclass(frozen=True)
class Response:
    """One sampled response; log-probs and entropies in nats, per token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    stopped: bool  # by a stop token, the last of `token_ids`


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of: Sequence[int],
    noise: Tensor,
    *,
    stop_ids: Tensor,
    temperature: float,
    top_p: float,
) -> list[Response]:
    """Sample a response per row, one batch of all rows.

    `prompt_of[row]` says which of `prompts` a row continues; `noise [rows, tokens]` holds the
    uniform numbers that its tokens are drawn with, and so bounds its length. A finished row runs
    on, unread, until enough rows have finished to be worth dropping.
    """
    count, limit = noise.shape
    batch = _Batch(model, prompts, torch.tensor(prompt_of, device=noise.device))
    rows = torch.arange(count, device=noise.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    lengths = torch.full_like(rows, limit)
    tokens = rows.new_zeros(count, limit)
    logprobs, entropies = torch.zeros(2, count, limit, device=noise.device)
    for t in range(limit):
        progress.beat()
        drawn = draw(batch.logits, noise[rows, t], temperature=temperature, top_p=top_p)
        tokens[rows, t], logprobs[rows, t], entropies[rows, t] = drawn
        ends = alive & torch.isin(drawn.tokens, stop_ids)
        lengths[rows[ends]] = t + 1
        alive &= ~ends
        survivors = int(alive.sum())
        if survivors == 0 or t + 1 == limit:
            break
        following = drawn.tokens
        if survivors < DROP_FINISHED_BELOW * len(rows):
            kept = alive.nonzero().squeeze(-1)
            rows, alive, following = rows[kept], alive[kept], following[kept]
            batch.select(kept)
        batch.advance(following)
    stopped = torch.isin(tokens.gather(1, lengths[:, None] - 1).squeeze(1), stop_ids)
    return [
        Response(
            tuple(tokens[row, :length].tolist()),
            tuple(logprobs[row, :length].tolist()),
            tuple(entropies[row, :length].tolist()),
            bool(stopped[row]),
        )
        for row, length in enumerate(lengths.tolist())
    ]


class _Batch:
    """Rows at the same step: their cache and the logits of their next tokens, `[rows, vocab]`."""

    logits: Tensor

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: Tensor
    ) -> None:
        self.model = model
        self.cache = Cache(layer_class_to_replicate=_RoomyLayer)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # At least one column of padding: transformers leaves out a mask that masks nothing, and its
        # grouped-query attention on CPU then takes more than twice as long.
        width = int(lengths.max()) + 1
        ids = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts])
        mask = torch.arange(width) >= width - lengths[:, None]  # left-padded: rows end together
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.mask = mask.to(prompt_of.device)
        self._forward(ids.to(prompt_of.device), positions.to(prompt_of.device))
        self.next_position = lengths.to(prompt_of.device)
        self.logits = self.logits[prompt_of]
        self.select(prompt_of)

    def select(self, rows: Tensor) -> None:
        """Go on with `rows` (repeats allowed); the logits stay, for `advance` replaces them."""
        self.cache.batch_select_indices(rows)
        self.next_position = self.next_position[rows]
        self.mask = self.mask[rows]

    def advance(self, tokens: Tensor) -> None:
        """Append `tokens [rows]`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._forward(tokens[:, None], self.next_position[:, None])
        self.next_position = self.next_position + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for more tokens: DynamicLayer copies all of itself for each token."""

    key_room: Tensor | None = None  # `keys`, `values` and the free room behind them
    value_room: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length()
        if used == 0:
            self.lazy_initialization(key_states, value_states)
        self.key_room = _append(self.key_room, used, key_states)
        self.value_room = _append(self.value_room, used, value_states)
        end = used + key_states.shape[-2]
        self.keys, self.values = self.key_room[:, :, :end], self.value_room[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.key_room, self.value_room = self.keys, self.values


def _append(room: Tensor | None, used: int, new: Tensor) -> Tensor:
    """Write `new` behind the `used` tokens of `room [batch, heads, tokens, size]`, or a larger."""
    end = used + new.shape[-2]
    if room is None or end > room.shape[-2]:
        larger = new.new_empty(*new.shape[:2], 2 * end, new.shape[-1])
        if room is not None:
            larger[:, :, :used] = room[:, :, :used]
        room = larger
    room[:, :, used:end] = new
    return room
