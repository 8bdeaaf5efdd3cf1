"""Which policy does a step train? The whole of BuPO is in the answer.

A transformer adds to its residual stream layer by layer, so the stream after any layer l can be
read out through the unembedding E (arXiv 2512.19673, Eq 1 and 5)::

    full policy             pi(. | x)   = softmax(E norm(h_L))
    internal layer policy   pi_l(. | x) = softmax(E h_l)          1 <= l < L, without the final norm

BuPO (Eq 10) trains pi_l with the GRPO objective for the first `internal_steps` steps, then pi.
Responses come from pi in both phases; the ratio's two sides, old and new log-probs, come from the
policy that trains. The gradient of pi_l reaches the embedding, layers 1..l and E, and nothing else
(appendix A.4).

A schedule is a list of `(layer, steps)` stages from the bottom up; the paper's hard switch is one
stage. While PPO's critic warms up no policy trains at all, and the first stage comes after that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FullPolicy:
    """softmax(E norm(h_L)): what the model samples from."""

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class InternalLayerPolicy:
    """softmax(E h_l), layers counted from 1; `read_out_norm` puts the final norm before E (Table
    5's ablation).
    """

    layer: int
    read_out_norm: bool = False

    def __str__(self) -> str:
        return f"internal layer {self.layer}"


@dataclass(frozen=True)
class NoPolicy:
    """None yet: PPO's critic learns alone."""

    def __str__(self) -> str:
        return "critic alone"


Policy = FullPolicy | InternalLayerPolicy | NoPolicy
FULL, NO_POLICY = FullPolicy(), NoPolicy()


@dataclass(frozen=True)
class PhaseSchedule:
    """Internal stages bottom-up, then the full policy for good. No stages: GRPO."""

    stages: tuple[tuple[InternalLayerPolicy | NoPolicy, int], ...] = ()

    @classmethod
    def of(
        cls,
        stages: Iterable[Sequence[int]],
        *,
        read_out_norm: bool = False,
        resting_steps: int = 0,
    ) -> PhaseSchedule:
        """The schedule of `(layer, steps)` pairs, after `resting_steps` without a policy; pairs
        with no steps drop out.
        """
        internal = [(InternalLayerPolicy(layer, read_out_norm), n) for layer, n in stages if n]
        rest = [(NO_POLICY, resting_steps)] if resting_steps else []
        return cls((*rest, *internal))

    def until(self, end: int | None) -> PhaseSchedule:
        """The same up to step `end`, from which on the full policy trains; None: the same."""
        if end is None:
            return self
        kept, left = [], end
        for policy, steps in self.stages:
            kept.append((policy, min(steps, left)))
            left -= kept[-1][1]
        return PhaseSchedule(tuple(stage for stage in kept if stage[1]))

    def policy_at(self, step: int) -> Policy:
        """The policy that `step` (counted from 0) trains."""
        for policy, steps in self.stages:
            if step < steps:
                return policy
            step -= steps
        return FULL

    def phase_start(self, step: int) -> int:
        """The step with which the phase of `step` began: 0 for all of the first phase."""
        policy = self.policy_at(step)
        while step > 0 and self.policy_at(step - 1) == policy:
            step -= 1
        return step

    def begins_at(self, step: int) -> bool:
        """Does a new phase begin with `step`? Never at step 0: nothing came before."""
        return self.phase_start(step) == step > 0


def depth_of(policy: Policy, layers: int) -> int:
    """How many layers of an `layers`-deep model `policy` runs."""
    return policy.layer if isinstance(policy, InternalLayerPolicy) else layers
