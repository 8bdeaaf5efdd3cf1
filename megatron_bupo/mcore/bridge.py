"""Architectures that our own table does not know, by Megatron-Bridge where it is installed.

The bridge describes the model, fills it and streams it back; that it computes what it should is
its word. It is given our layout, and asked for what depth routing and the read-out rely on: a
GPTModel whose unembedding is one matrix, and a place for every tensor. Weights leave by the
bridge's own collectives, a parameter at a time: slower than our one flat buffer per unit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megatron_bupo.config import expand
from megatron_bupo.config.schema import Config
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore import cpu, model
from megatron_bupo.mcore.hf_weights import Unit, layer_unit
from megatron_bupo.mcore.spec import block_spec, uses_transformer_engine

# What we train at all, and what our plain modules compute where Transformer Engine is missing.
TRAINED = {"num_moe_experts": None, "mtp_num_layers": None}
PLAIN = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "multi_latent_attention": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "transformer_layer_spec": default_layer_spec,
}


def read_sizes(config: Config) -> DecoderSizes:
    """The sizes of the model at `model.path`, if the bridge knows it and this run can train it."""
    bridge, provider = _open(config)
    sizes = DecoderSizes(
        family=bridge.hf_pretrained.config.architectures[0],
        layers=provider.num_layers,
        ffn_size=provider.ffn_hidden_size,
        heads=provider.num_attention_heads,
        kv_heads=provider.num_query_groups or provider.num_attention_heads,
        vocab_size=provider.vocab_size,
        tied=provider.share_embeddings_and_output_weights,
        max_positions=provider.seq_length,
    )
    if config.bupo.internal_layout is not None:
        reason = "Megatron-Bridge builds whole models alone"
        raise InputError("bupo.internal_layout", reason, "set bupo.internal_layout=null")
    parallel = config.parallel
    if sizes.vocab_size % parallel.tp:
        reason = f"Megatron-Bridge cannot cut the vocabulary of {sizes.vocab_size} into equal parts"
        raise InputError(f"parallel.tp={parallel.tp}", reason, "choose one that divides it")
    if sizes.tied and parallel.vpp > 1:
        reason = "Megatron-Bridge does not load tied embeddings into virtual stages"
        raise InputError(f"parallel.vpp={parallel.vpp}", reason, "set parallel.vpp=1")
    return sizes


def load(sizes: DecoderSizes, config: Config) -> tuple[Any, list[GPTModel], BridgeStream]:
    """Megatron's config, this rank's chunks with their weights, and their stream. Collective."""
    bridge, native = _open(config)
    settings = model.run_settings(config) | {
        "fp16": False,
        "deallocate_pipeline_outputs": False,  # with virtual stages the reported loss goes wrong
        "bias_activation_fusion": False,  # knows few activations
        "perform_initialization": True,  # in vain, but it marks which parameters are shards
    }
    for name, value in {**settings, **config.megatron}.items():
        if hasattr(native, name):
            setattr(native, name, value)
    if not uses_transformer_engine():
        native.transformer_layer_spec = _plain_layers
    native.finalize()
    native._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    stages = range(config.parallel.vpp) if config.parallel.vpp > 1 else [None]
    chunks = [_chunk(native, stage) for stage in stages]
    stream = BridgeStream(bridge, chunks, sizes)
    bridge.load_hf_weights(chunks)
    return native, chunks, stream


class BridgeStream:
    """What `WeightStream` is to our table."""

    def __init__(self, bridge: AutoBridge, chunks: list[GPTModel], sizes: DecoderSizes) -> None:
        self._bridge, self._chunks, self._sizes = bridge, chunks, sizes
        self._tasks: list[Any] = bridge.get_conversion_tasks(chunks)
        self._check_that_names_pair_up()

    @property
    def unit_of(self) -> dict[nn.Parameter, Unit]:
        """The unit that each parameter of this rank trains with."""
        found = {}
        for chunk in self._chunks:
            layers = [layer.layer_number for layer in cast("Any", chunk.decoder.layers)]
            for name, parameter in chunk.named_parameters():
                tied = self._is_tied_copy(name)
                found[parameter] = "embedding" if tied else _unit(name, layers)
        return found

    def tensors(self, wanted: Collection[Unit]) -> Iterator[tuple[str, Tensor]]:
        """`(hf_name, full tensor)` of the `wanted` units, the same on every rank. Collective."""
        layers = range(1, self._sizes.layers + 1)
        stream = self._bridge.export_hf_weights(
            self._chunks,
            show_progress=False,
            conversion_tasks=[
                t for t in self._tasks if _unit(t.global_param_name, layers) in wanted
            ],
            merge_adapter_weights=False,
        )
        for name, tensor in stream:
            yield name, tensor.detach()

    def _is_tied_copy(self, name: str) -> bool:
        return self._sizes.tied and name.startswith("output_layer.")

    def _check_that_names_pair_up(self) -> None:
        """The bridge itself only warns of a parameter that it leaves as it was initialised."""
        where = f"{self._sizes.family} by Megatron-Bridge"
        tasks = [task for task in self._tasks if task is not None]
        filled = {id(task.param_weight) for task in tasks}
        for chunk in self._chunks:
            for name, parameter in chunk.named_parameters():
                if id(parameter) not in filled and not self._is_tied_copy(name):
                    raise InputError(where, f"the checkpoint has nothing for the parameter {name}")
        read = {"lm_head.weight"} if self._sizes.tied else set()
        for task in tasks:
            names = task.mapping.hf_param
            read |= {names} if isinstance(names, str) else set(names.values())
        for name in self._bridge.hf_pretrained.state.source.get_all_keys():
            if name not in read and not name.endswith("rotary_emb.inv_freq"):
                raise InputError(where, f"no parameter takes the checkpoint's {name}")


def _open(config: Config) -> tuple[AutoBridge, Any]:
    """The bridge of the model at `model.path` and its description of it, if we can train it."""
    where = f"model.path={config.model.path}"
    try:
        bridge = AutoBridge.from_hf_pretrained(expand(config.model.path))
        provider = bridge.to_megatron_provider(load_weights=False)
    except Exception as error:  # whatever the bridge of that architecture trips over
        reason = f"Megatron-Bridge cannot read it: {' '.join(str(error).split())[:200]}"
        raise InputError(where, reason, "use a checkpoint of another architecture") from error
    if not isinstance(provider, GPTModelProvider):
        raise InputError(where, "is no GPTModel in Megatron-Core", "use a decoder-only model")
    if unfit := _unlike(TRAINED, provider):
        raise InputError(where, f"has {unfit}, which is not trained", "use a dense model")
    if not uses_transformer_engine() and (unfit := _unlike(PLAIN, provider)):
        reason = f"has {unfit}, which only Transformer Engine on a GPU computes"
        raise InputError(where, reason, "run it there, or use another model")
    return bridge, provider


def _unlike(plain: dict[str, Any], provider: Any) -> str:
    """The fields of `provider` that are not as in `plain`."""
    fields = {key: getattr(provider, key, value) for key, value in plain.items()}
    return ", ".join(f"{k}={v}" for k, v in fields.items() if (v or plain[k]) != plain[k])


def _plain_layers(native: Any, vp_stage: int | None = None) -> Any:
    pp_rank = mpu.get_pipeline_model_parallel_rank()
    return block_spec(native, qk_norm=native.qk_layernorm, vp_stage=vp_stage, pp_rank=pp_rank)


def _chunk(native: Any, stage: int | None) -> GPTModel:
    chunk = native.provide(
        pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        vp_stage=stage,
    )
    unembeds = getattr(chunk, "output_layer", None)
    if not isinstance(chunk, GPTModel) or (
        chunk.post_process
        and (type(unembeds) is not ColumnParallelLinear or unembeds.bias is not None)
    ):
        reason = (
            "its logits are not one matrix times the hidden state, as the read-out computes them"
        )
        raise InputError(type(native).__name__, reason, "use another architecture")
    return chunk.to(cpu.device())


def _unit(name: str, layers: Sequence[int]) -> Unit:
    """The unit of the Megatron parameter `name`, whose layer's index points into `layers`."""
    if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
        return layer_unit(layers[int(layer[1])])
    ends = {"embedding": "embedding", "decoder": "final_norm", "output_layer": "unembedding"}
    return ends[name.partition(".")[0]]


_scatter: Any = MegatronParamMapping.scatter_to_tp_ranks


def _scatter_contiguous(self: Any, splits: Any, *args: Any, **kwargs: Any) -> Tensor:
    """gloo sends a chunk's memory as it lies: for a cut by columns, silently the wrong numbers."""
    return _scatter(self, splits and [s.contiguous() for s in splits], *args, **kwargs)


MegatronParamMapping.scatter_to_tp_ranks = _scatter_contiguous
