"""What the responses of a parity case are worth: by every advantage in turn, with HICRA on top, for
every loss in turn.

Ranks find the planning tokens together, as in a run, from the text that a tokenizer makes of the
responses; pytest's process finds them alone. To the actor all of it is one tensor.
"""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer

from megatron_bupo import credit
from megatron_bupo.algorithm.planning_tokens import StrategicGrams, words_of
from megatron_bupo.config.checks import CHOICES
from megatron_bupo.config.hicra import HicraConfig
from megatron_bupo.config.schema import AlgorithmConfig, Config
from megatron_bupo.planning_credit import PlanningCredit
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup, TokenBatch
from tests.small_tokenizers import byte_level

ADVANTAGES, LOSSES = CHOICES["algorithm.advantage"], CHOICES["algorithm.loss"]
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
LONGEST = 19  # tokens that a response may have


def algorithm(number: int) -> AlgorithmConfig:
    """The `number`th of all pairs of an advantage and a loss, again and again."""
    by_loss, advantage = divmod(number, len(ADVANTAGES))
    by_aggregation, loss = divmod(by_loss, len(LOSSES))
    dr_grpo = ADVANTAGES[advantage] == "dr_grpo"  # is the constant length too
    return AlgorithmConfig(
        advantage=ADVANTAGES[advantage],
        gamma=0.95,
        gae_lambda=0.9,
        loss=LOSSES[loss],
        loss_aggregation="auto" if dr_grpo else AGGREGATIONS[by_aggregation % len(AGGREGATIONS)],
        kl_coefficient=0.1,  # what a token is worth depends on its place
        kl_estimator="k1",
        kl_in="reward",
    )


def credited(batch: TokenBatch, algorithm: AlgorithmConfig) -> TokenBatch:
    """`batch`, with its old log-probs, and the advantages that it would have in a step. Collective
    in a worker of `run_ranks`.
    """
    assert batch.old_logprobs is not None
    group = _group(batch)
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(len(batch), generator=generator)
    noise = torch.randn(batch.input_ids.shape, generator=generator)
    batch = batch.with_ref_logprobs((batch.old_logprobs + noise) * batch.response_mask)
    grades = [[Grade(reward) for reward in rewards.tolist()]]
    if algorithm.advantage == "gae":
        batch = batch.with_values(torch.randn(batch.input_ids.shape, generator=generator))
    batch = credit.credited(batch, grades, algorithm)
    config = Config(hicra=HicraConfig(grams="those of the responses"))
    planning = PlanningCredit(config, _grams(group), {}, _tokenizer().decode)
    found = planning.find(batch, [group])
    assert found is not None
    assert 0.2 < int(found.tokens.sum()) / batch.response_tokens < 0.8
    return planning.give(batch, found, 0, entropies=None)[0]


def _group(batch: TokenBatch) -> RolloutGroup:
    rollouts = []
    for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True):
        begin = int(mask.int().argmax())
        response = ids[mask].tolist()
        prompt = Prompt(0, tuple(ids[:begin].tolist()), answer="", text="")
        text = _tokenizer().decode(response)
        sampled = (0.0,) * len(response)
        rollouts.append(Rollout(prompt, tuple(response), text, sampled, None, "stop", 0))
    return RolloutGroup(rollouts[0].prompt, tuple(rollouts))


def _grams(group: RolloutGroup) -> StrategicGrams:
    """Two pieces of each response, of two words and of one."""
    texts = [words_of(rollout.text) for rollout in group.rollouts]
    return StrategicGrams(" ".join(piece) for words in texts for piece in (words[1:3], words[4:5]))


@cache
def _tokenizer() -> Tokenizer:
    return byte_level([])
