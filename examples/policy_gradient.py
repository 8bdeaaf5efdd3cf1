"""GRPO's update on plain Megatron-Core, as loops all over the field make it: old log-probs of given
responses, then clipped ratios, Megatron's pipeline schedule, DDP and optimizer.

    torchrun --nproc-per-node 4 examples/policy_gradient.py --tp 2 --pp 2

It prints which layers each step has moved: all of them. `git apply
examples/policy_gradient_bupo.patch` makes it BuPO by two lines, and then the first two steps, which
train layer 2's internal policy, move layers 1 and 2 alone.
"""

import argparse
import os
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model

from megatron_bupo.mcore import cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(config, vocab, *, tied=False, **sharing):
    """This rank's part of a model, wrapped, and its optimizer."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=vocab,
        max_sequence_length=256,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    ).to(DEVICE)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **sharing)
    chunks = [DistributedDataParallel(config, ddp, model)]
    rates = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.01, "clip_grad": 1.0}
    shards = {"use_distributed_optimizer": ddp.use_distributed_optimizer}
    optimizer = get_megatron_optimizer(OptimizerConfig(**rates, **shards), chunks)
    config.finalize_model_grads_func = finalize_model_grads
    return chunks, optimizer


def run(chunks, batch, loss_of, *, forward_only):
    """Push `batch` through the pipeline, half of it at a time."""
    rows = batch["input_ids"].shape[0]
    parts = [{k: v[half] for k, v in batch.items()} for half in torch.arange(rows).chunk(2)]

    def forward(microbatches, model):
        part = next(microbatches)
        ids = part["input_ids"]
        targets, places = ids.roll(-1, 1), torch.arange(ids.shape[1], device=ids.device)
        above = places[:, None] < places[None, :]  # what attention may not see
        losses = model(ids, places.expand_as(ids), above[None, None], labels=targets)
        return losses, partial(loss_of, part)  # on the last stage: -log p of each next token

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(parts) for _ in chunks],
        model=chunks,
        num_microbatches=len(parts),
        seq_length=batch["input_ids"].shape[1],
        micro_batch_size=rows // len(parts),
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def logprobs(chunks, batch):
    """Log-probs of each next token, `[responses, tokens]`, on every stage."""
    with torch.no_grad():
        found = run(chunks, batch, lambda _part, nll, **_: -nll, forward_only=True)
    out = torch.cat(found) if found else torch.empty(batch["input_ids"].shape, device=DEVICE)
    dist.broadcast(
        out, mpu.get_pipeline_model_parallel_last_rank(), mpu.get_pipeline_model_parallel_group()
    )
    return out


def clipped_loss(part, nll):
    """The sum of the tokens' losses, how many they are, and what to report."""
    ratio, mask = torch.exp(-nll - part["old_logprobs"]), part["mask"]
    worth, clipped_worth = (r * part["advantages"] for r in (ratio, ratio.clamp(0.8, 1.2)))
    loss = -(torch.minimum(worth, clipped_worth) * mask).sum()
    return loss, mask.sum().int(), {"loss": torch.stack((loss.detach(), mask.sum()))}


def layers(chunks):
    """A copy of each layer's parameters, under the layer's number."""
    found = [layer for c in chunks for layer in get_attr_wrapped_model(c, "decoder").layers]
    return {layer.layer_number: [p.detach().clone() for p in layer.parameters()] for layer in found}


def moved(before, after):
    """The numbers of the layers, of all stages, that are not bit for bit what they were."""
    mine = [n for n in before if not all(map(torch.equal, before[n], after[n]))]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted({number for numbers in everyone for number in numbers})


def train(chunks, optimizer, batches, updates=2):
    """One step for each batch of responses: two updates that share old log-probs."""
    reports = []
    for step, rollouts in enumerate(batches):
        before = layers(chunks)
        batch = {**rollouts, "old_logprobs": logprobs(chunks, rollouts)}
        for _ in range(updates):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            sums = run(chunks, batch, clipped_loss, forward_only=False)
            _, grad_norm, _ = optimizer.step()
        changed = moved(before, layers(chunks))
        reports.append((step, batch["old_logprobs"], grad_norm, sums, changed))
    return reports


def start(tp, pp):
    """Join the process group that torchrun describes, and split it."""
    if DEVICE == "cpu":  # which Megatron-Core does not know
        cpu.install()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(0)


def main():
    """A few steps on made-up responses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    layout = parser.parse_args()
    start(layout.tp, layout.pp)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,  # gradients are divided by the tokens of all ranks
        use_cpu_initialization=DEVICE == "cpu",
        gradient_accumulation_fusion=False,
    )
    chunks, optimizer = build(config, vocab=64)
    made = torch.Generator().manual_seed(mpu.get_data_parallel_rank())
    batches = []
    for _ in range(4):  # where a sampler and a reward would stand
        ids = torch.randint(0, 64, (4, 16), generator=made)
        rewards = torch.randn(4, 1, generator=made)
        advantages = ((rewards - rewards.mean()) / rewards.std()).expand(4, 16)
        batch = {"input_ids": ids, "advantages": advantages, "mask": torch.ones(4, 16)}
        batches.append({name: tensor.to(DEVICE) for name, tensor in batch.items()})
    for step, _, grad_norm, _, changed in train(chunks, optimizer, batches):
        if dist.get_rank() == 0:
            numbers = ", ".join(map(str, changed))
            print(f"step {step}: layers {numbers} moved, gradient norm {grad_norm:.6f}")


if __name__ == "__main__":
    main()
