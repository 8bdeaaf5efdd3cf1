"""The reference for all readings: transformers with hooks, whole logits, softmax in fp64.

Nothing here is fast, sharded, chunked or cached, and nothing is shared with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from megatron_bupo.types import TokenBatch


@torch.no_grad()
def dense_readings(model: Any, batch: TokenBatch, *, normed: bool = False) -> dict[str, Tensor]:
    """By column, fp64 `[layers, tokens]`, or `[tokens]` of the whole model: one response at a time,
    at the positions that its tokens were drawn at.
    """
    parts = [
        _of_response(model, ids, mask, normed=normed)
        for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)
        if mask.any()
    ]
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def _of_response(model: Any, ids: Tensor, mask: Tensor, *, normed: bool) -> dict[str, Tensor]:
    ids = ids[: int(mask.nonzero().max()) + 1]
    before = mask[: len(ids)].nonzero().flatten() - 1
    seen, final = _passed(model, ids)
    logits = model.lm_head(final[before]).double()
    full = logits.log_softmax(-1)
    stream = seen[0]["layer_in"][before]
    columns: dict[str, list[Tensor]] = {}

    def add(**values: Tensor) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    last = _entropy(_logprobs(model, stream, normed))
    embedding = last
    for layer in seen:
        rows = {name: tensor[before] for name, tensor in layer.items()}
        log_p = {name: _logprobs(model, x, normed) for name, x in rows.items()}
        h = {name: _entropy(x) for name, x in log_p.items()}
        middle = rows["layer_in"] + rows["attention_out"]
        add(
            **_beside("", log_p["layer_out"], full),
            attention_entropy_nats=h["attention_out"],
            attention_input_entropy_nats=h["attention_in"],
            ffn_entropy_nats=h["ffn_out"],
            ffn_input_entropy_nats=h["ffn_in"],
            layer_entropy_change_nats=h["layer_out"] - last,
            attention_entropy_change_nats=h["attention_out"] - h["attention_in"],
            ffn_entropy_change_nats=h["ffn_out"] - h["ffn_in"],
            attention_cosine=F.cosine_similarity(rows["attention_out"], rows["layer_in"], dim=-1),
            ffn_cosine=F.cosine_similarity(rows["ffn_out"], middle, dim=-1),
        )
        if not normed:
            add(**_beside("normed_", _logprobs(model, rows["layer_out"], True), full))
        last = h["layer_out"]
    targets = ids[before + 1]
    return {name: torch.stack(values).double() for name, values in columns.items()} | {
        "embedding_entropy_nats": embedding,
        "full_entropy_nats": _entropy(full),
        "full_logprob_nats": full.gather(1, targets[:, None]).squeeze(1),
    }


@torch.no_grad()
def dense_probe(model: Any, batch: TokenBatch, layer: int) -> dict[str, Tensor]:
    """What a probe of `layer` reads, fp64 `[tokens]` or `[later layers, tokens]`."""
    parts = []
    for row, mask in zip(batch.input_ids, batch.response_mask, strict=True):
        if not mask.any():
            continue
        ids = row[: int(mask.nonzero().max()) + 1]
        before = mask[: len(ids)].nonzero().flatten() - 1
        seen, final = _passed(model, ids)
        full = model.lm_head(final[before]).double().log_softmax(-1)
        streams = [seen[0]["layer_in"][before], *(of["layer_out"][before] for of in seen)]
        own = _logprobs(model, streams[layer], False)
        later = streams[layer + 1 :]
        parts.append(
            {
                "full_logprob": full.gather(1, ids[before + 1][:, None]).squeeze(1),
                "full_entropy": _entropy(full),
                "kl_to_full": _kl(own, full),
                "kl_from_full": _kl(full, own),
                "entropy": _entropy(own),
                "entropy_before": _entropy(_logprobs(model, streams[layer - 1], False)),
                "cosine": torch.stack(
                    [F.cosine_similarity(streams[layer], x, dim=-1).double() for x in later]
                ),
                "kl_to_later": torch.stack([_kl(own, _logprobs(model, x, False)) for x in later]),
            }
        )
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _passed(model: Any, ids: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What passes in and out of the modules of each layer `[tokens, hidden]`, and norm(h_L)."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    handles = []
    for layer, into in zip(model.model.layers, seen, strict=True):
        parts = {
            "layer": layer,
            "attention_in": layer.input_layernorm,
            "attention_out": layer.self_attn,
            "ffn_in": layer.post_attention_layernorm,
            "ffn_out": layer.mlp,
        }
        for name, module in parts.items():

            def hook(_: Any, args: Any, out: Any, name: str = name, into: Any = into) -> None:
                out = out[0] if isinstance(out, tuple) else out
                if name == "layer":
                    into["layer_in"], into["layer_out"] = args[0][0], out[0]
                else:
                    into[name] = out[0]

            handles.append(module.register_forward_hook(hook))
    final = model.model(ids[None]).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return seen, final


def _logprobs(model: Any, x: Tensor, normed: bool) -> Tensor:
    return model.lm_head(model.model.norm(x) if normed else x).double().log_softmax(-1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _beside(prefix: str, log_p: Tensor, full: Tensor) -> dict[str, Tensor]:
    return {
        f"{prefix}entropy_nats": _entropy(log_p),
        f"{prefix}kl_to_full_nats": _kl(log_p, full),
        f"{prefix}kl_from_full_nats": _kl(full, log_p),
        f"{prefix}top1_agreement": (log_p.argmax(-1) == full.argmax(-1)).double(),
    }
