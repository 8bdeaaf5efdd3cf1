"""Which tokens of a step plan, and how much more do they learn? HICRA, as a run uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_bupo import collective
from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.algorithm.hicra import displaced, most_uncertain, planning_advantages
from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask
from megatron_bupo.config import Config, expand
from megatron_bupo.data.gram_files import read_grams
from megatron_bupo.data.token_texts import token_texts
from megatron_bupo.engines import noise_seed
from megatron_bupo.types import Rollout, RolloutGroup, TokenBatch

PLACEBO = 2  # a stream of noise of its own, beside those of `engines`


@dataclass(frozen=True)
class PlanningCredit:
    """What makes planning tokens of a step's rollouts count more."""

    config: Config
    grams: StrategicGrams
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, config: Config) -> PlanningCredit:
        """As `config.hicra` has it."""
        path, model = config.hicra.grams, config.model
        grams = [] if path is None else read_grams(Path(expand(path)))
        tokenizer = Path(expand(model.tokenizer or model.path)) / "tokenizer.json"
        decode = partial(Tokenizer.from_file(str(tokenizer)).decode, skip_special_tokens=False)
        return cls(config, StrategicGrams(grams), decode)

    def is_on(self, step: int, policy: Policy) -> bool:
        """Do some tokens count more in `step`, which trains `policy`?"""
        return self.config.hicra.is_on(step, internal=policy != FULL)

    @property
    def needs_entropies(self) -> bool:
        """Must the full policy's entropies be known to say which tokens these are?"""
        return self.config.hicra.mask == "entropy"

    def give(
        self,
        batch: TokenBatch,
        groups: Sequence[RolloutGroup],
        step: int,
        *,
        entropies: Tensor | None,
    ) -> tuple[TokenBatch, dict[str, float]]:
        """The batch with more weight on its planning tokens, and what that came to. `entropies`: of
        the full policy before the updates, `[responses, tokens]` nats. Collective.
        """
        hicra = self.config.hicra
        planning = self._mask(batch, groups, step, entropies)
        plain = batch.advantages
        assert plain is not None
        credited = planning_advantages(plain, planning, alpha=hicra.alpha, form=hicra.form)
        tokens = max(batch.response_tokens, 1)
        return replace(batch, advantages=credited), {
            "hicra/planning_tokens_fraction": int(planning.sum()) / tokens,
            "hicra/planning_responses_fraction": float(planning.any(1).float().mean()),
            "hicra/advantage_shift_mean": float((credited - plain).double().sum()) / tokens,
        }

    def _mask(
        self,
        batch: TokenBatch,
        groups: Sequence[RolloutGroup],
        step: int,
        entropies: Tensor | None,
    ) -> Tensor:
        hicra = self.config.hicra
        if hicra.mask == "entropy":
            assert entropies is not None
            return most_uncertain(entropies, batch.response_mask, share=hicra.entropy_share)
        planning = self._planning(batch, groups)
        if hicra.mask == "placebo":
            seed = noise_seed(self.config.seed, PLACEBO, step)
            return displaced(planning, batch.response_mask, seed=seed)
        return planning

    def _planning(self, batch: TokenBatch, groups: Sequence[RolloutGroup]) -> Tensor:
        """Is each token part of a gram? The ranks share the work."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        masks = collective.gather([self._mask_of(r) for r in collective.share(rollouts)])
        planning = torch.zeros_like(batch.response_mask)
        for i, (rollout, mask) in enumerate(zip(rollouts, masks, strict=True)):
            begin = len(rollout.prompt.input_ids)
            planning[i, begin : begin + len(mask)] = torch.tensor(list(mask), dtype=torch.bool)
        return planning & batch.response_mask

    def _mask_of(self, rollout: Rollout) -> bytes:
        text, tokens = token_texts(rollout.response_ids, self.decode)
        return bytes(planning_mask(text, tokens, self.grams))
