"""Which tokens of a step plan, what is worth knowing of them, and how much more do they learn?
HICRA, as a run uses it.

With `hicra.grams` every step's planning tokens are found, once, and measured, whether they get
credit in that step or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_bupo import collective
from megatron_bupo.algorithm.bupo import FULL, NO_POLICY, Policy
from megatron_bupo.algorithm.hicra import displaced, most_uncertain, planning_advantages
from megatron_bupo.algorithm.planning_measures import Planning, Use, uses
from megatron_bupo.algorithm.planning_tokens import StrategicGrams, inside
from megatron_bupo.config import Config, expand
from megatron_bupo.data.gram_files import Cluster, read_clusters, read_grams
from megatron_bupo.data.packing import pack
from megatron_bupo.data.token_texts import decoder_of, token_texts
from megatron_bupo.engines import noise_seed
from megatron_bupo.record.measures import planning_measures
from megatron_bupo.types import Rollout, RolloutGroup, TokenBatch

PLACEBO = 2  # a stream of noise of its own, beside those of `engines`


@dataclass(frozen=True)
class PlanningCredit:
    """What finds the planning tokens of a step's rollouts, and makes them count more."""

    config: Config
    grams: StrategicGrams
    clusters: Mapping[str, Cluster]  # of the grams, where the file says them
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, config: Config) -> PlanningCredit:
        """As `config.hicra` has it."""
        path, model = config.hicra.grams, config.model
        file = None if path is None else Path(expand(path))
        grams = [] if file is None else read_grams(file)
        clusters = {} if file is None else read_clusters(file)
        decode = decoder_of(Path(expand(model.tokenizer or model.path)))
        return cls(config, StrategicGrams(grams), clusters, decode)

    def is_on(self, step: int, policy: Policy) -> bool:
        """Do some tokens count more in `step`, which trains `policy`?"""
        on = self.config.hicra.is_on(step, internal=policy != FULL)
        return on and policy != NO_POLICY

    def needs_entropies(self, step: int, policy: Policy) -> bool:
        """Must the full policy's entropies be known to say which tokens these are?"""
        return self.config.hicra.mask == "entropy" and self.is_on(step, policy)

    def find(self, batch: TokenBatch, groups: Sequence[RolloutGroup]) -> Planning | None:
        """What the responses plan; None without grams. The ranks share the work. Collective."""
        if self.config.hicra.grams is None:
            return None
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        read = collective.gather([self._read(rollout) for rollout in collective.share(rollouts)])
        tokens = torch.zeros_like(batch.response_mask)
        for i, (rollout, (mask, _)) in enumerate(zip(rollouts, read, strict=True)):
            begin = len(rollout.prompt.input_ids)
            tokens[i, begin : begin + len(mask)] = torch.tensor(list(mask), dtype=torch.bool)
        return Planning(tokens & batch.response_mask, [use for _, used in read for use in used])

    def measure(
        self,
        planning: Planning,
        batch: TokenBatch,
        groups: Sequence[RolloutGroup],
        full: tuple[Tensor, Tensor] | None,
    ) -> dict[str, float]:
        """What is worth knowing of `planning`. `full`: log-probs and entropies of the full policy,
        `[responses, tokens]` nats; None: as far as the engine told them.
        """
        logprobs, entropies = full or (batch.rollout_logprobs, sampled_entropies(batch, groups))
        share, clusters = self.config.hicra.entropy_share, self.clusters
        return planning_measures(
            planning, batch.response_mask, logprobs, entropies, clusters=clusters, fork_share=share
        )

    def watch(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """What is worth knowing of what rollouts plan from which nothing is learned. Collective."""
        batch = pack(groups, 0)
        planning = self.find(batch, groups)
        return {} if planning is None else self.measure(planning, batch, groups, None)

    def give(
        self, batch: TokenBatch, planning: Planning | None, step: int, *, entropies: Tensor | None
    ) -> tuple[TokenBatch, dict[str, float]]:
        """The batch with more weight on its planning tokens, and what that came to. `entropies`: of
        the full policy before the updates, `[responses, tokens]` nats.
        """
        hicra = self.config.hicra
        credited = self._credited(batch, planning, step, entropies)
        plain = batch.advantages
        assert plain is not None
        advantages = planning_advantages(plain, credited, alpha=hicra.alpha, form=hicra.form)
        tokens = max(batch.response_tokens, 1)
        return replace(batch, advantages=advantages), {
            "hicra/credited_tokens_fraction": int(credited.sum()) / tokens,
            "hicra/advantage_shift_mean": float((advantages - plain).double().sum()) / tokens,
        }

    def _credited(
        self, batch: TokenBatch, planning: Planning | None, step: int, entropies: Tensor | None
    ) -> Tensor:
        hicra = self.config.hicra
        if hicra.mask == "entropy":
            assert entropies is not None
            return most_uncertain(entropies, batch.response_mask, share=hicra.entropy_share)
        assert planning is not None
        if hicra.mask == "placebo":
            seed = noise_seed(self.config.seed, PLACEBO, step)
            return displaced(planning.tokens, batch.response_mask, seed=seed)
        return planning.tokens

    def _read(self, rollout: Rollout) -> tuple[bytes, list[Use]]:
        """Which tokens of a response plan, and the grams in it."""
        text, tokens = token_texts(rollout.response_ids, self.decode)
        found = self.grams.find(text)
        return bytes(inside(tokens, found)), uses(text, found)


def sampled_entropies(batch: TokenBatch, groups: Sequence[RolloutGroup]) -> Tensor | None:
    """What the engine told of the entropies, `[responses, tokens]` nats; None: not all of it."""
    told = [rollout.entropies for group in groups for rollout in group.rollouts]
    if any(entropies is None for entropies in told):
        return None
    entropies = torch.zeros(batch.input_ids.shape)
    entropies[batch.response_mask] = torch.tensor([x for of in told for x in of or ()])
    return entropies
