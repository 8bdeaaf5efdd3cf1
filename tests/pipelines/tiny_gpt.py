"""A Megatron-Core GPTModel as pipelines build theirs, and what its policies say, read by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_bupo.mcore import cpu

LAYERS, VOCAB = 4, 32
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


class CausalAttention(nn.Module):
    """Of rectangles and packed rows, as Transformer Engine's; Megatron's own knows no packing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Of `[tokens, responses, heads, head_dim]`, or packed without the second dimension."""
        row = kwargs.get("packed_seq_params")
        if row is None:
            pieces = [(query, key, value)]
        else:
            sizes = row.cu_seqlens_q.diff().tolist()
            pieces = zip(*(x[:, None].split(sizes) for x in (query, key, value)), strict=True)
        attend: Any = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        read = [attend(*(x.permute(1, 2, 0, 3) for x in piece)) for piece in pieces]
        out = torch.cat([x.permute(2, 0, 1, 3).flatten(2) for x in read])
        return out if row is None else out[:, 0]


def tiny_gpt(**settings: Any) -> GPTModel:
    """A random one, on a rank of its own."""
    cpu.install()
    if not mpu.is_initialized():
        mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=16,
        num_attention_heads=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.5,
        **settings,
    )
    layer = get_gpt_layer_local_spec()
    attention: Any = layer.submodules.self_attention.submodules  # type: ignore[union-attr]
    attention.core_attention = CausalAttention
    return GPTModel(config, layer, VOCAB, 64, position_embedding_type="rope")


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """What the pipeline's forward pass gives, `[responses, tokens, vocab]`."""
    positions = torch.arange(tokens.shape[1])[None].expand(tokens.shape)
    return model(tokens, positions, None)


def read_by_hand(model: GPTModel, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """Of a model that nothing is attached to: the logits of each policy, under its name."""
    streams: dict[str, Tensor] = {}
    decoder: Any = model.decoder
    for number, layer in enumerate(decoder.layers, start=1):
        name = f"internal layer {number}"
        layer.register_forward_hook(lambda *args, name=name: streams.update({name: args[2][0]}))
    with torch.no_grad():
        full = logits(model, tokens)
    weight = model.output_layer.weight
    read = {name: (h @ weight.t()).transpose(0, 1).detach() for name, h in streams.items()}
    for layer in decoder.layers:
        layer._forward_hooks.clear()
    return {**read, "full": full}


def known_gpt() -> tuple[GPTModel, Callable[[Any], str]]:
    """A tiny one, and what names the policy that it computes now."""
    model = tiny_gpt()
    by_hand = read_by_hand(model)

    def computed(model: Any) -> str:
        now = logits(model)
        [name] = [n for n, known in by_hand.items() if torch.allclose(now, known, atol=1e-6)]
        return name

    return model, computed
