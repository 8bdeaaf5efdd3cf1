"""The same advantages and losses as TRL's trainers compute, where they have the same; needs trl
(the extra `bench`). TRL 1.16 has no PPO any more, so nothing for gae and the value loss, and no
REINFORCE++; its RLOO's loss clips the product of a response's ratios, which none of ours does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_bupo.algorithm.advantages import (
    leave_one_out_advantages,
    token_advantages,
    token_weights,
    whitened,
)
from megatron_bupo.algorithm.kl import kl_estimates
from megatron_bupo.algorithm.policy_loss import policy_loss
from megatron_bupo.bed import chain_sums

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

trl = pytest.importorskip("trl")

PROMPTS, GROUP, TOKENS, LONGEST = 3, 4, 9, 12
SMALL = {"max_completion_length": LONGEST, "num_generations": GROUP, "report_to": "none"}
SMALL |= {"per_device_train_batch_size": PROMPTS * GROUP, "use_cpu": True, "bf16": False}
SMALL |= {"gradient_checkpointing": False}


@pytest.fixture(scope="module")
def trainer_of(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """`trainer_of(kind, rewards)`: TRL's GRPO or RLOO trainer, whose rewards are these."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trl")
    chain_sums.save_tokenizer(folder)

    def make(kind: str, rewards: torch.Tensor, **knobs: Any) -> Any:
        def reward(completions: list[str], **_: Any) -> list[float]:
            assert len(completions) == rewards.numel()
            return rewards.flatten().tolist()

        return getattr(trl, f"{kind}Trainer")(
            AutoModelForCausalLM.from_pretrained(tiny_model_dir(vocab=16)),
            reward,
            getattr(trl, f"{kind}Config")(str(folder / kind), **SMALL, **knobs),
            Dataset.from_list([{"prompt": "1+2="}] * PROMPTS),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )

    return make


@pytest.mark.parametrize(
    ("estimator", "kind", "knobs"),
    [
        ("grpo", "GRPO", {"scale_rewards": "group"}),
        ("dr_grpo", "GRPO", {"scale_rewards": "none"}),
        ("rloo", "RLOO", {"beta": 0.3}),  # k1, taken off the reward
    ],
)
def test_advantages_are_those_of_trls_trainers(
    estimator: str, kind: str, knobs: dict[str, Any], trainer_of: Callable[..., Any]
):
    rewards = torch.randn(PROMPTS, GROUP)
    trainer = trainer_of(kind, rewards, **knobs)
    scores: list[torch.Tensor] = []  # of the policy and of the reference

    def score(_model: Any, ids: torch.Tensor, _mask: Any, tokens: int, *_: Any, **__: Any) -> Any:
        scores.append(torch.randn(len(ids), tokens))
        return scores[-1], None, None

    trainer._get_per_token_logps_and_entropies = score
    found = trainer._generate_and_score_completions([{"prompt": "1+2="}] * rewards.numel())
    learns = found["completion_mask"].bool()
    kl = kl_estimates(*scores, estimator="k1") * learns if "beta" in knobs else None
    ours = token_advantages(
        rewards, learns, estimator=estimator, kl=kl, kl_coefficient=knobs.get("beta", 0.0)
    )
    if estimator == "grpo":  # theirs adds 1e-4 to the standard deviation
        std = rewards.std(dim=1).repeat_interleave(GROUP)[:, None]
        ours = ours * (std + 1e-6) / (std + 1e-4)
    torch.testing.assert_close(ours, found["advantages"][:, None] * learns)


def test_values_are_whitened_as_by_trls_trainer(trainer_of: Callable[..., Any]):
    rewards = torch.randn(PROMPTS, GROUP)
    trainer = trainer_of("RLOO", rewards, beta=0.0, normalize_advantages=True)
    found = trainer._generate_and_score_completions([{"prompt": "1+2="}] * rewards.numel())
    plain = leave_one_out_advantages(rewards).view(-1, 1)
    ours = whitened(plain, torch.ones_like(plain, dtype=torch.bool)).flatten()
    std = plain.std()  # theirs adds 1e-4 to it, ours 1e-8 to its square
    torch.testing.assert_close(
        ours * (std.square() + 1e-8).sqrt() / (std + 1e-4), found["advantages"]
    )


@pytest.mark.parametrize(
    ("kind", "aggregation", "theirs"),
    [
        ("clipped", "sequence_mean", {"loss_type": "grpo"}),
        ("clipped", "token_mean", {"loss_type": "dapo"}),
        ("clipped", "constant_length", {"loss_type": "dr_grpo"}),
        (
            "gspo",
            "sequence_mean",
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        ),
        ("cispo", "token_mean", {"loss_type": "cispo"}),
        (  # k3, in the loss; TRL's default multiplies it by the ratio
            "clipped",
            "token_mean",
            {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
        ),
    ],
)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_losses_and_their_gradients_are_those_of_trls_trainer(
    kind: str,
    aggregation: str,
    theirs: dict[str, Any],
    dual_clip: float | None,
    trainer_of: Callable[..., Any],
):
    trainer = trainer_of("GRPO", torch.zeros(0), **theirs)
    trainer.current_gradient_accumulation_steps = 1
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 0.28
    trainer.args.delta = dual_clip
    if kind == "cispo":
        trainer.epsilon_high = 1.28  # an absolute bound there, and none below
    shape = PROMPTS * GROUP, TOKENS
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (shape[0], 1))
    old, ref = -3 * torch.rand(shape), -3 * torch.rand(shape)
    drift = torch.linspace(-1.5, 1.5, shape[0])[torch.randperm(shape[0])][:, None]
    logprobs, worth = old + drift + torch.randn(shape), torch.randn(shape[0])
    one, other = (logprobs.clone().requires_grad_() for _ in range(2))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        one,
        torch.zeros(shape),
        None,
    )
    ids = torch.zeros(shape, dtype=torch.long)
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "advantages": worth,
            "num_items_in_batch": mask.sum(),
        },
    )
    loss.backward()
    means = ((logprobs - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    weights = token_weights(mask, aggregation, longest=LONGEST)[mask]
    ours, statistics = policy_loss(
        other[mask],
        old[mask],
        worth[:, None].expand(shape)[mask],
        weights,
        kind=kind,
        clip_low=1.0 if kind == "cispo" else 0.2,
        clip_high=0.28,
        dual_clip=dual_clip,
        sequence_log_ratios=means.expand(shape)[mask],
    )
    if "beta" in theirs:
        kl = kl_estimates(other[mask], ref[mask], estimator="k3")
        ours = ours + theirs["beta"] * (weights * kl).sum()
    ours.backward()
    assert float(statistics.clipped) > 5
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(other.grad, one.grad)
