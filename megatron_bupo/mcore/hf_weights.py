"""HF on disk, Megatron in memory: the names and shards of one in the other, as one table.

Loading, weight sync and export are the same table read in either direction. A row says which HF
tensors make up a Megatron parameter, along which HF dimension tensor parallelism cuts them, and how
the cut pieces are laid out in the Megatron parameter. Layer rows are relative to
`model.layers.{i}.` and `decoder.layers.{i}.`; where Transformer Engine fuses a norm into the
following linear layer the parameter has a second name. Experts are dealt out in order over the
expert-parallel ranks, which number their own from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megatron_bupo import progress
from megatron_bupo.hf.architecture import Architecture, DecoderSizes
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.model import padded_vocab_size

Pieces = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it holds."""

    hf: tuple[str, ...]
    megatron: tuple[str, ...]  # alternatives: plain spec, Transformer Engine spec
    cut: int | None  # HF dimension that tensor parallelism cuts; None: every rank has all of it
    join: Callable[[Pieces, Architecture], Tensor]  # this rank's HF pieces -> parameter
    split: Callable[[Tensor, Architecture], Pieces]  # and back
    expert: int | None = None  # that it belongs to, counted from 0 over all ranks


def _alone(pieces: Pieces, _: Architecture) -> Tensor:
    return pieces[0]


def _unchanged(parameter: Tensor, _: Architecture) -> Pieces:
    return (parameter,)


def _stack(pieces: Pieces, _: Architecture) -> Tensor:
    return torch.cat(pieces)


def _halves(parameter: Tensor, _: Architecture) -> Pieces:
    return parameter.chunk(2)


def _by_group(pieces: Pieces, arch: Architecture) -> Tensor:
    """q, k, v -> per key-value head: its query heads, its key, its value."""
    d, rest = arch.head_dim, pieces[0].shape[1:]
    grouped = [p.reshape(pieces[1].shape[0] // d, -1, d, *rest) for p in pieces]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _from_groups(parameter: Tensor, arch: Architecture) -> Pieces:
    queries, d, rest = arch.heads // arch.kv_heads, arch.head_dim, parameter.shape[1:]
    grouped = parameter.reshape(-1, queries + 2, d, *rest)
    return tuple(p.reshape(-1, *rest) for p in grouped.split((queries, 1, 1), dim=1))


def _row(hf: str, megatron: str, cut: int | None = None) -> Row:
    return Row(tuple(hf.split()), tuple(megatron.split()), cut, _alone, _unchanged)


def _qkv(kind: str) -> Row:
    hf = tuple(f"self_attn.{p}_proj.{kind}" for p in "qkv")
    return Row(hf, (f"self_attention.linear_qkv.{kind}",), 0, _by_group, _from_groups)


def _gate_up(kind: str) -> Row:
    hf = (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")
    return Row(hf, (f"mlp.linear_fc1.{kind}",), 0, _stack, _halves)


def is_stacked(row: Row) -> bool:
    """Are the HF tensors of `row` one above the other in the parameter of each rank?"""
    return row.join is _stack


EMBEDDING = _row("model.embed_tokens.weight", "embedding.word_embeddings.weight", 0)
FINAL_NORM = _row("model.norm.weight", "decoder.final_layernorm.weight")
UNEMBEDDING = _row("lm_head.weight", "output_layer.weight", 0)
VALUE_HEAD = _row("score.weight", "output_layer.weight")
VOCABULARY = (EMBEDDING, UNEMBEDDING)
_OUTSIDE_LAYERS = {
    "embedding": EMBEDDING,
    "final_norm": FINAL_NORM,
    "unembedding": UNEMBEDDING,
    "value_head": VALUE_HEAD,
}


def layer_rows(arch: Architecture, layer: int, *, ep: int = 1) -> list[Row]:
    """The rows of `layer` (counted from 1) of `arch`; its experts, all of them, come last."""
    rows = [
        _row(
            "input_layernorm.weight",
            "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight",
        ),
        _qkv("weight"),
        _row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", 1),
        _row(
            "post_attention_layernorm.weight",
            "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight",
        ),
    ]
    if arch.qk_norm:
        rows.append(_row("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"))
        rows.append(_row("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"))
    if arch.qkv_bias:
        rows.append(_qkv("bias"))
    if arch.mlp_bias:
        rows.append(_row("self_attn.o_proj.bias", "self_attention.linear_proj.bias"))
        rows += [_gate_up("bias"), _row("mlp.down_proj.bias", "mlp.linear_fc2.bias")]
    experts = arch.experts
    if experts is None or layer not in experts.layers:
        return [*rows, _gate_up("weight"), _row("mlp.down_proj.weight", "mlp.linear_fc2.weight", 1)]
    rows.append(_row("mlp.gate.weight", "mlp.router.weight"))
    own = experts.number // ep
    return rows + [row for e in range(experts.number) for row in _expert_rows(e, e % own)]


def _expert_rows(expert: int, place: int) -> list[Row]:
    """The rows of an expert, which is number `place` (from 0) of its rank's own."""
    hf, one = f"mlp.experts.{expert}.", f"mlp.experts.local_experts.{place}."
    fc1, fc2 = (
        (f"{one}linear_{name}.weight", f"mlp.experts.linear_{name}.weight{place}")
        for name in ("fc1", "fc2")
    )
    gate_up = (f"{hf}gate_proj.weight", f"{hf}up_proj.weight")
    return [
        Row(gate_up, fc1, 0, _stack, _halves, expert),
        Row((f"{hf}down_proj.weight",), fc2, 1, _alone, _unchanged, expert),
    ]


@dataclass(frozen=True)
class Held:
    """A row under its full HF names, and the parameter that holds it on this rank."""

    row: Row
    parameter: nn.Parameter


Unit = (
    # "embedding", "layer 1" ..., "final_norm", "unembedding" or "value_head": what is synced or
    # frozen as one
    str
)


def layer_unit(layer: int) -> Unit:
    """The unit of `layer`, counted from 1."""
    return f"layer {layer}"


def units(arch: DecoderSizes) -> list[Unit]:
    """All units of the model, in the order data flows through them."""
    layers = [layer_unit(layer) for layer in range(1, arch.layers + 1)]
    return ["embedding", *layers, "final_norm", *read_out_units(arch)]


def read_out_units(arch: DecoderSizes) -> list[Unit]:
    """What reads h_L out and is no other unit's."""
    if arch.value_head:
        return ["value_head"]
    return [] if arch.tied else ["unembedding"]


def unit_rows(unit: Unit, arch: Architecture, *, ep: int | None = None) -> list[Row]:
    """The rows of `unit` under their full HF names; `ep`: None is what this rank's groups have."""
    if not unit.startswith("layer "):
        return [_OUTSIDE_LAYERS[unit]]
    layer = int(unit.split()[1])
    prefix = f"model.layers.{layer - 1}."
    rows = layer_rows(arch, layer, ep=ep or mpu.get_expert_model_parallel_world_size())
    return [replace(row, hf=tuple(prefix + name for name in row.hf)) for row in rows]


def _is_elsewhere(row: Row, arch: Architecture) -> bool:
    """Does another expert-parallel rank hold the expert of `row`?"""
    if row.expert is None or arch.experts is None:
        return False
    own = arch.experts.number // mpu.get_expert_model_parallel_world_size()
    return row.expert // own != mpu.get_expert_model_parallel_rank()


def held_units(chunks: Sequence[Any], arch: Architecture) -> dict[Unit, list[Held]]:
    """What this rank holds of each unit. A tied unembedding on the last stage is the embedding's
    copy.
    """
    found: dict[Unit, list[Held]] = {}
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())

        def hold(unit: Unit, prefix: str = "") -> list[Held]:
            rows = [row for row in unit_rows(unit, arch) if not _is_elsewhere(row, arch)]
            names = [next(n for n in row.megatron if prefix + n in parameters) for row in rows]  # noqa: B023
            return [Held(r, parameters[prefix + n]) for r, n in zip(rows, names, strict=True)]  # noqa: B023

        if chunk.pre_process:
            found["embedding"] = hold("embedding")
        for i, layer in enumerate(chunk.decoder.layers):
            unit = layer_unit(layer.layer_number)
            found[unit] = hold(unit, f"decoder.layers.{i}.")
        if chunk.post_process:
            found["final_norm"] = hold("final_norm")
            found |= {unit: hold(unit) for unit in read_out_units(arch)}
            if arch.tied and not chunk.pre_process:
                copy = parameters[UNEMBEDDING.megatron[0]]
                found["tied unembedding"] = [Held(EMBEDDING, copy)]
    return found


def _rank_part(size: int, tp: int, rank: int) -> slice:
    return slice(rank * size // tp, (rank + 1) * size // tp)


def _vocabulary_part(tensor: Any, arch: Architecture, tp: int, rank: int) -> Tensor:
    """This rank's rows of a `[vocab, hidden]` tensor on disk, zeros where the vocabulary is
    padded.
    """
    rows = padded_vocab_size(arch, tp) // tp
    start, stop = (min(r * rows, arch.vocab_size) for r in (rank, rank + 1))
    piece = tensor[start:stop]
    return torch.cat((piece, piece.new_zeros(rows - piece.shape[0], piece.shape[1])))


def read_piece(tensor: Any, row: Row, arch: Architecture, tp: int, rank: int) -> Tensor:
    """This rank's piece of the HF tensor behind the lazy slice `tensor`; nothing else is read."""
    if row in VOCABULARY:
        return _vocabulary_part(tensor, arch, tp, rank)
    if row.cut is None:
        return tensor[:]
    shape = tensor.get_shape()
    part = _rank_part(shape[row.cut], tp, rank)
    return tensor[part] if row.cut == 0 else tensor[:, part]


def shard_group(row: Row) -> dist.ProcessGroup:
    """The ranks that cut the tensors of `row`."""
    if row.expert is None:
        return parallel.tensor_group()
    return cast("dist.ProcessGroup", mpu.get_expert_tensor_parallel_group())


def load(chunks: Sequence[Any], arch: Architecture, open_slice: Callable[[str], Any]) -> None:
    """Fill the parameters of `chunks` from HF tensors; `open_slice(hf_name)` gives a lazy
    safetensors slice. A rank reads its own shards and experts only.
    """
    with torch.no_grad():
        for parts in held_units(chunks, arch).values():
            for held in parts:
                progress.beat()
                group = shard_group(held.row)
                pieces = [
                    read_piece(open_slice(name), held.row, arch, group.size(), group.rank())
                    for name in held.row.hf
                ]
                held.parameter.copy_(held.row.join(tuple(pieces), arch))
                _mark(held)


def _mark(held: Held) -> None:
    """Say whose gradient the parameter's is.

    That it is a tensor-parallel shard Megatron says only where it also initialises the weights; one
    that is not marked is left out of the gradient norm on all ranks but the first, silently. That
    it belongs to an expert Megatron says only where experts are dealt out: without the mark 0.16
    sums gradients over the wrong ranks where tensor parallelism is another inside experts, and
    neither kind of layout can load the other's optimizer.
    """
    parameter, cut = held.parameter, held.row.cut
    if cut is not None and not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, cut, 1)
    if held.row.expert is not None:
        parameter.allreduce = False  # type: ignore[attr-defined]
        # Every rank that shares the experts holds something else, whatever cuts them.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
