"""What is worth knowing about a step, as `area/what_unit` numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_bupo.algorithm.bupo import FULL, Policy
from megatron_bupo.algorithm.hicra import most_uncertain
from megatron_bupo.algorithm.kl import kl_estimates
from megatron_bupo.algorithm.planning_measures import (
    Planning,
    Use,
    following_entropy,
    frequency_entropy,
    perplexity,
    share_of,
)
from megatron_bupo.algorithm.value import explained_variance
from megatron_bupo.record.answer_types import answer_type
from megatron_bupo.types import Grade, Rollout, RolloutGroup, SyncReport, TokenBatch, UpdateReport

if TYPE_CHECKING:
    from torch import Tensor


def _rollouts(groups: Sequence[RolloutGroup]) -> Iterator[Rollout]:
    return (rollout for group in groups for rollout in group.rollouts)


def rollout_measures(
    groups: Sequence[RolloutGroup], grades: Sequence[Sequence[Grade]]
) -> dict[str, float]:
    """Rewards, lengths and the full policy's entropy, which sampled every response in every phase.

    `entropy/full_nats` is the mean over response tokens of the entropy of the distribution that
    each was drawn from (at the sampling temperature), where the engine tells it.
    """
    rewards = [[grade.reward for grade in group] for group in grades]
    entropies = [h for rollout in _rollouts(groups) for h in rollout.entropies or ()]
    said = {"entropy/full_nats": fmean(entropies)} if entropies else {}
    said |= _source_rewards(groups, rewards)
    return said | {
        "rollout/reward_mean": fmean(reward for group in rewards for reward in group),
        "rollout/groups_with_signal_fraction": fmean(float(min(g) < max(g)) for g in rewards),
        "rollout/response_tokens_mean": fmean(len(r.response_ids) for r in _rollouts(groups)),
        "rollout/truncated_fraction": fmean(r.finish_reason == "length" for r in _rollouts(groups)),
        "rollout/cut_fraction": fmean(r.finish_reason == "abort" for r in _rollouts(groups)),
        "rollout/reward_warnings": sum(g.warning is not None for group in grades for g in group),
        **_reward_measures(groups, grades),
    }


def _reward_measures(
    groups: Sequence[RolloutGroup], grades: Sequence[Sequence[Grade]]
) -> dict[str, float]:
    """The terms of a composed reward, before they are weighed, and correctness by the type of the
    reference answer, where there is more than one.
    """
    terms: dict[str, list[float]] = {}
    types: dict[str, list[float]] = {}
    for group, its_grades in zip(groups, grades, strict=True):
        of_type = types.setdefault(answer_type(group.prompt.answer), [])
        of_type += [grade.correctness for grade in its_grades]
        for grade in its_grades:
            for name, value in grade.components.items():
                terms.setdefault(name, []).append(value)
    known = {f"reward/{name}_mean": fmean(values) for name, values in sorted(terms.items())}
    if len(types) > 1:
        known |= {f"reward/answers_{n}_mean": fmean(v) for n, v in sorted(types.items()) if v}
    return known


def _source_rewards(
    groups: Sequence[RolloutGroup], rewards: Sequence[Sequence[float]]
) -> dict[str, float]:
    """The mean reward of each source of a mixture that the step asked."""
    by_source: dict[str, list[float]] = {}
    for group, its_rewards in zip(groups, rewards, strict=True):
        if group.prompt.source is not None:
            by_source.setdefault(group.prompt.source, []).extend(its_rewards)
    return {f"source/{name}_reward_mean": fmean(x) for name, x in sorted(by_source.items())}


def warnings_of(grades: Sequence[Sequence[Grade]]) -> list[str]:
    """The distinct warnings of a step's grades."""
    return sorted({grade.warning for group in grades for grade in group if grade.warning})


def policy_measures(
    policy: Policy,
    scores: tuple[Tensor, Tensor] | None,
    batch: TokenBatch,
    *,
    full: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """What is worth knowing of the policy that learns, from its log-probs and entropies before the
    step's first update (None: no policy learns), and of the full one if that is another, from
    `full`, the same of it. All `[responses, tokens]` nats.
    """
    if not batch.response_tokens:
        return {}
    known = {}
    if policy == FULL:
        full = scores
    elif scores is not None:
        known["entropy/internal_nats"] = _mean(scores[1], batch)
    if full is not None:
        known |= {"entropy/full_nats": _mean(full[1], batch), **mismatch_measures(full[0], batch)}
    return known


def _mean(values: Tensor, batch: TokenBatch) -> float:
    return float(values[batch.response_mask].double().mean())


def mismatch_measures(logprobs: Tensor, batch: TokenBatch) -> dict[str, float]:
    """How far trainer and rollout engine disagree about the full policy, nats: mean and maximum
    over response tokens, and KL(sampler || trainer) as k3 estimates it.

    Float noise where both have the same weights in fp32; a response of older weights is compared as
    it is.
    """
    trainer, sampler = (x[batch.response_mask].double() for x in (logprobs, batch.rollout_logprobs))
    gap = (trainer - sampler).abs()
    return {
        "rollout/logprob_gap_mean_nats": float(gap.mean()),
        "rollout/logprob_gap_max_nats": float(gap.max()),
        "rollout/logprob_gap_k3_nats": float(kl_estimates(sampler, trainer, estimator="k3").mean()),
    }


def planning_measures(
    planning: Planning,
    response_mask: Tensor,
    logprobs: Tensor,
    entropies: Tensor | None,
    *,
    clusters: Mapping[str, Hashable],
    fork_share: float,
) -> dict[str, float]:
    """What is worth knowing of the tokens that plan and of the others, that execute.

    `logprobs` and `entropies` (None: not known): of the full policy, all `[responses, tokens]`,
    nats. Forks are the `fork_share` of the tokens whose entropies are highest. What there is no
    token or gram of is left out.
    """
    if not response_mask.any():
        return {}
    known: dict[str, float] = {
        "hicra/planning_tokens_fraction": share_of(planning.tokens, response_mask),
        "hicra/planning_responses_fraction": float(planning.tokens.any(1).float().mean()),
        **_gram_measures(planning.uses, clusters),
    }
    kinds = {"planning": planning.tokens, "execution": response_mask & ~planning.tokens}
    for kind, tokens in kinds.items():
        if tokens.any():
            known[f"hicra/{kind}_perplexity"] = perplexity(logprobs, tokens)
            if entropies is not None:
                known[f"hicra/{kind}_entropy_nats"] = float(entropies[tokens].double().mean())
    if entropies is not None:
        forks = most_uncertain(entropies, response_mask, share=fork_share)
        if planning.tokens.any():
            among = share_of(forks, planning.tokens)
            known["hicra/forks_among_planning_fraction"] = among
        if forks.any():
            among = share_of(planning.tokens, forks)
            known["hicra/planning_among_forks_fraction"] = among
    return known


def _gram_measures(uses: Sequence[Use], clusters: Mapping[str, Hashable]) -> dict[str, float]:
    """How the grams that were found are spread. A gram without a cluster is one of its own."""
    grams = [use.gram for use in uses]
    known: dict[str, float] = {
        "hicra/grams_found_count": len(grams),
        "hicra/grams_distinct_count": len(set(grams)),
    }
    followed = [use for use in uses if use.next_word is not None]
    if grams:
        known["hicra/semantic_entropy_nats"] = frequency_entropy(grams)
        if clusters:
            meant = [clusters.get(gram, (gram,)) for gram in grams]
            known["hicra/semantic_cluster_entropy_nats"] = frequency_entropy(meant)
    if followed:
        known["hicra/following_entropy_nats"] = following_entropy(followed)
    return known


def sync_measures(sync: SyncReport) -> dict[str, float]:
    """What it cost to bring the step's weights to the engine: bytes to one server, over all
    ranks.
    """
    return {
        "sync/sent_bytes": sync.sent_bytes,
        "sync/behind_servers": sync.behind,
        "sync/recovered_servers": sync.recovered,
    }


def critic_measures(batch: TokenBatch) -> dict[str, float]:
    """What PPO's critic foresaw of the step's returns before it learned from them."""
    assert batch.values is not None
    assert batch.returns is not None
    learns = batch.learning_mask
    if not learns.any():
        return {}
    return {
        "critic/explained_variance": explained_variance(batch.values, batch.returns, learns),
        "critic/values_mean": float(batch.values[learns].double().mean()),
        "critic/returns_mean": float(batch.returns[learns].double().mean()),
    }


def update_measures(
    reports: Sequence[UpdateReport], lr: float, *, area: str = "update"
) -> dict[str, float]:
    """Means over the step's updates that were made, and the number of those that were not; `area`:
    update, the policy's, or critic.
    """
    every: list[Mapping[str, float]] = [report.metrics for report in reports]
    made = [metrics for metrics in every if not metrics[f"{area}/skipped"]] or every
    means = {key: fmean(metrics[key] for metrics in made) for key in every[0]}
    skipped = sum(metrics[f"{area}/skipped"] for metrics in every)
    return {**means, f"{area}/skipped": skipped, f"{area}/learning_rate": lr}
