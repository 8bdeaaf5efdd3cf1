"""What `bench_peers.py` compares: TRL, plain torch, the BuPO authors' way, and ours.

Each variant is a function that works for ever, a round whenever it is its turn. All have the same
weights, tokens, old log-probs and advantages, and nothing is recomputed but logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from megatron_bupo.algorithm import policy_loss as formulas
from megatron_bupo.algorithm.advantages import token_weights
from megatron_bupo.algorithm.bupo import Policy
from megatron_bupo.bed import chain_sums
from megatron_bupo.build import build
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.data.tokenizer import load_tokenizer
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.preflight import check_model, preflight
from megatron_bupo.train import train_step
from megatron_bupo.types import TokenBatch
from tools.shapes import Shape
from tools.turns import Turns

DEMO = Path(__file__).parents[1] / "conf" / "demo.yaml"
CLIP, LR = 0.2, 5e-5


@dataclass(frozen=True)
class Case(Shape):
    """A random model and its batch."""

    hidden: int = 256
    ffn: int = 768
    vocab: int = 32768
    prompt_tokens: int = 32
    response_tokens: int = 224
    target_layer: int = 3

    def write_model(self, directory: Path) -> None:
        """With some tokenizer too, which TRL asks for."""
        super().write_model(directory)
        chain_sums.save_tokenizer(directory)

    def batch(self) -> TokenBatch:
        """With old log-probs near those of a random model, so that some ratios are clipped on
        either side.
        """
        batch = super().batch()
        noise = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(1))
        old = (0.2 * noise - math.log(self.vocab)) * batch.response_mask
        return replace(batch, old_logprobs=old)


def hf_rounds(model: Any, loss: Callable[[], Tensor], turns: Turns) -> None:
    """Rounds of a transformers `model`: forward and backward of `loss()`."""
    model.train()
    while True:
        turns.wait()
        model.zero_grad(set_to_none=False)
        value = loss()
        value.backward()
        turns.stop()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        turns.tell(loss=value.item(), grad_norm=float(torch.nn.utils.get_total_norm(grads)))


def trl_loss(case: Case, model_dir: Path, turns: Turns) -> None:
    """TRL's own functions, called as by its training step."""
    batch, n = case.batch(), case.prompt_tokens
    assert batch.old_logprobs is not None
    assert batch.advantages is not None
    rows = [{"prompt": "1+1=", "answer": "2"}]
    trainer = grpo_trainer(model_dir, rows, responses=case.responses, group=case.responses)
    trainer.current_gradient_accumulation_steps = 1  # set by its training loop
    inputs = {
        "prompt_ids": batch.input_ids[:, :n],
        "prompt_mask": torch.ones_like(batch.input_ids[:, :n]),
        "completion_ids": batch.input_ids[:, n:],
        "completion_mask": torch.ones_like(batch.input_ids[:, n:]),
        "old_per_token_logps": batch.old_logprobs[:, n:],
        "advantages": batch.advantages[:, -1],
        "num_items_in_batch": batch.response_mask.sum(),
    }
    hf_rounds(trainer.model, lambda: trainer.compute_loss(trainer.model, inputs), turns)


def plain_loss(case: Case, model_dir: Path, turns: Turns) -> None:
    """The logits of all response tokens at once."""
    batch, model = case.batch(), hf_model(model_dir)

    def loss() -> Tensor:
        keep = case.response_tokens + 1
        logits = model(batch.input_ids, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        targets = batch.input_ids[:, case.prompt_tokens :, None]
        return policy_loss(logits.log_softmax(-1).gather(-1, targets).squeeze(-1), batch)

    hf_rounds(model, loss, turns)


def authors_loss(case: Case, model_dir: Path, turns: Turns) -> None:
    """What `_forward_micro_batch_layer_k` of the authors' dp_actor.py computes: the full policy's
    logits, which nothing reads, and the internal layer's, each of all tokens.
    """
    batch, model = case.batch(), hf_model(model_dir)

    def loss() -> Tensor:
        output = model(batch.input_ids, use_cache=False, output_hidden_states=True)
        logits = model.lm_head(output.hidden_states[case.target_layer]).div_(1.0)
        targets = batch.input_ids.roll(-1, dims=1).flatten()
        logprobs = -F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        del logits, output
        logprobs = logprobs.view(batch.input_ids.shape)[:, case.prompt_tokens - 1 : -1]
        return policy_loss(logprobs, batch)

    hf_rounds(model, loss, turns)


def policy_loss(logprobs: Tensor, batch: TokenBatch) -> Tensor:
    """The clipped loss of `logprobs [responses, response tokens]`."""
    assert batch.old_logprobs is not None
    assert batch.advantages is not None
    weights = token_weights(batch.response_mask, "token_mean")
    old, advantages, weights = (
        x[:, -logprobs.shape[1] :] for x in (batch.old_logprobs, batch.advantages, weights)
    )
    loss, _ = formulas.policy_loss(
        logprobs, old, advantages, weights, clip_low=CLIP, clip_high=CLIP
    )
    return loss


def our_loss(
    case: Case, model_dir: Path, policy: Policy, overrides: Sequence[str], turns: Turns
) -> None:
    """An update of our trainer, up to its optimizer, which then changes nothing."""
    model = (f"model.path={model_dir}", "data.train=none")
    same = ("algorithm.dual_clip=null", f"algorithm.clip_low={CLIP}", f"algorithm.clip_high={CLIP}")
    config = load_config(None, [*model, *same, "optimizer.weight_decay=0", *overrides])
    arch, batch = check_model(config, training=False), case.batch()
    with parallel.joined(check(config, None, training=False), seed=0):
        with ExitStack() as files:
            trainer = MegatronTrainer(arch, config, slice_opener(read_index(str(model_dir)), files))
        optimizer: Any = trainer.optimizer
        step = optimizer.step

        def stop_and_step(*args: Any, **kwargs: Any) -> float:
            turns.stop()
            return step(*args, **kwargs)

        optimizer.step = stop_and_step
        while True:
            turns.wait()
            metrics = trainer.update(batch, policy, lr=0.0).metrics
            turns.tell(loss=metrics["update/loss"], grad_norm=metrics["update/grad_norm"])


def trl_step(bed: Path, turns: Turns) -> None:
    """TRL trains on the bed; a turn is from the end of one step to the end of the next."""

    class TakeTurns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.stop()
            turns.tell()
            turns.wait()

    rows = [json.loads(line) for line in (bed / "train.jsonl").read_text().splitlines()]
    trainer = grpo_trainer(bed / "model", rows, responses=128, group=8, callbacks=[TakeTurns()])
    turns.wait()
    trainer.train()


def our_step(bed: Path, overrides: Sequence[str], turns: Turns) -> None:
    """We train on the bed, on one rank."""
    as_trl = ("parallel.pp=1", "bupo.internal_steps=0", "algorithm.minibatches=1")
    as_trl += ("optimizer.warmup_steps=0", f"optimizer.lr={LR}", "trainer.microbatch_size=null")
    paths = (f"model.path={bed}/model", f"data.train={bed}/train.jsonl", "prepare=null")
    quiet = ("evaluation.every=0", "logging.tensorboard=false", "data.eval=null")
    config = load_config(str(DEMO), [*as_trl, *paths, *quiet, "run_dir=ours", *overrides])
    with build(preflight(config, None)) as run:
        for step in count():
            turns.wait()
            train_step(run, step, run.policy_for(step))
            turns.stop()
            turns.tell()


def hf_model(directory: Path) -> Any:
    """The model by transformers."""
    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)


def grpo_trainer(
    model_dir: Path, rows: list[dict[str, str]], *, responses: int, group: int, **kwargs: Any
) -> Any:
    """TRL's trainer with our demo's settings: one update of `responses` a step, nothing saved."""
    same = {"learning_rate": LR, "lr_scheduler_type": "constant", "epsilon": CLIP}
    same |= {"max_completion_length": 14, "num_generations": group, "max_steps": 10**6}
    here = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    records = {"logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    args = trl.GRPOConfig("trl", per_device_train_batch_size=responses, **same, **here, **records)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [chain_sums.reward(c, a) for c, a in zip(completions, answer, strict=True)]

    return trl.GRPOTrainer(
        hf_model(model_dir),
        reward,
        args,
        Dataset.from_list(rows),
        processing_class=load_tokenizer(str(model_dir)),
        **kwargs,
    )
