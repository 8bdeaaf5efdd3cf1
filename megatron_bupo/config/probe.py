"""Settings of what is watched while a run trains, and of what leaves an internal phase early. No
torch here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeConfig:
    """The diagnostics of the paper's Figures 4, 5 and 7, on texts that stay the same."""

    every: int = 0  # steps between probes, each before the step it stands at trains; 0: never
    prompts: int = 32  # the first ones of evaluation's, where there is none of training's
    max_response_tokens: int | None = None  # None: rollout.max_response_tokens
    # Texts to read, a file as `score` takes it; None: the model's own answers before training
    responses: str | None = None
    # Whose internal policy is watched; None: the layer that trains last below the full policy, and
    # without one the full policy alone
    layer: int | None = None


@dataclass(frozen=True)
class GuardConfig:
    """Leave the internal phase for good when a probe crosses one of these bounds; null: none."""

    enabled: bool = False
    # Of the full policy on fixed texts, to that at step 0; where they are its own answers, the
    # logarithm is its KL from what it was: 0.1 nats a token
    perplexity_ratio: float | None = 1.1
    kl_increase_nats: float | None = None  # of KL(internal || full), over that at step 0
    entropy_increase_nats: float | None = None  # of the full policy on fixed texts, likewise
    repetition_increase: float | None = 0.2  # of the fraction of repeated 4-grams in responses
    response_tokens_ratio: float | None = 2.0  # of the mean length, to that at step 0
    patience: int = 1  # probes in a row that must cross a bound
