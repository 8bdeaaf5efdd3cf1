"""What do servers hold, how many responses do they decode at a time, and how long does it take?

A decode step goes through the weights that its tokens need, as slow as the slower of memory and
products, then reads each sequence's keys and values, reduces hidden states over tensor-parallel
ranks, twice in a layer, and samples from logits. Of S sequences on a replica, with lengths spread
evenly from 0 to the longest, L, all that fit decode together; the steps are at least L, for some
response is that long, and the mean batch is what S and L leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bupo.config.schema import Config
from megatron_bupo.config.server_rules import gpus_per_server
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture
from megatron_bupo.planner.counts import (
    all_parameters,
    all_products,
    attention_products,
    attention_sizes,
)
from megatron_bupo.planner.hardware import GIB, Hardware
from megatron_bupo.planner.workload import Workload

STATIC_FRACTION = 0.88  # SGLang's own choice lies near, by GPU and options
LOGIT_PASSES = 4
BYTES = 2  # of weights and of keys and values: servers run bf16
RUNNING = "max_running_requests"


@dataclass(frozen=True)
class Serving:
    """The servers of a recipe; bytes per GPU."""

    engine: str
    gpus: int  # that servers use, those of the trainer if they are shared
    replicas: int
    weights: float
    cache: float  # for keys and values
    rest: float  # context, CUDA graphs, activations
    asleep: float  # what is left of all that while a trainer on the same GPU trains
    cache_tokens: int  # per replica
    sequences: float  # that a replica decodes together, at most
    decode_s: float  # of a step's responses
    prefill_s: float

    @property
    def total(self) -> float:
        """Bytes on each GPU while they generate."""
        return self.weights + self.cache + self.rest

    @property
    def generate_s(self) -> float:
        """Seconds for a step's responses."""
        return self.decode_s + self.prefill_s


def server_gpus(config: Config) -> int:
    """GPUs that the recipe's servers use; 0 with the embedded engine."""
    if config.rollout.engine != "sglang":
        return 0
    for key in ("tp_size", "pp_size", "dp_size", "gpu_id_step"):
        value = config.sglang.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"sglang.{key}={value}", "is not a number of GPUs", "give 1 or more")
    return (len(config.servers.addresses) or config.servers.count) * gpus_per_server(config)


def serving(config: Config, arch: Architecture, work: Workload, hardware: Hardware) -> Serving:
    """What serves the recipe, and for how long a step."""
    gpus, (tp, pp) = server_gpus(config), _sizes(config)
    replicas = max(1, gpus // (tp * pp))
    weights = BYTES * all_parameters(arch) / (tp * pp)
    static = _static_fraction(config) * hardware.memory_bytes
    cache = max(0.0, static - weights)
    layers = arch.layers / pp
    per_token = BYTES * 2 * layers * attention_sizes(arch, 1)[1] / min(tp, arch.kv_heads)
    held = int(cache / per_token)
    most = _most_running(config) or work.responses
    mean = work.prompt_tokens / config.rollout.responses_per_prompt + work.response_tokens / 2
    room = min(most, held / mean) if held else 0.0
    together = min(room, work.responses / replicas)
    decode, prefill = 0.0, 0.0
    if together >= 1:
        decode = _decode_s(config, arch, work, hardware, replicas=replicas, together=together)
        prefill = _prefill_s(arch, work, hardware, gpus=gpus)
    return Serving(
        engine="sglang",
        gpus=gpus,
        replicas=replicas,
        weights=weights,
        cache=cache,
        rest=hardware.reserve.server_gib * GIB,
        asleep=hardware.reserve.server_asleep_gib * GIB if config.rollout.colocated else 0.0,
        cache_tokens=held,
        sequences=together,
        decode_s=decode,
        prefill_s=prefill,
    )


def embedded(
    config: Config, arch: Architecture, work: Workload, hardware: Hardware, *, ranks: int
) -> Serving:
    """The engine inside the trainer's ranks: a whole copy of the model on each, and a cache of a
    batch's responses in full length.
    """
    number = 2 if config.model.dtype == "bfloat16" else 4
    weights = number * all_parameters(arch)
    mine = -(-work.responses // ranks)
    together = min(config.rollout.batch_size, mine)
    per_token = number * 2 * arch.layers * attention_sizes(arch)[1]
    rate, batches = hardware.products_per_s(config.model.dtype), -(-mine // together)
    step = max(weights / hardware.memory_per_s, together * all_parameters(arch) / rate)
    step += 1e-3 * (hardware.overhead.decode_step_ms + arch.layers * hardware.overhead.layer_ms)
    return Serving(
        engine="embedded",
        gpus=ranks,
        replicas=ranks,
        weights=weights,
        cache=per_token * together * work.longest,
        rest=0.0,
        asleep=weights,
        cache_tokens=int(together * work.longest),
        sequences=together,
        decode_s=batches * work.longest_response * step,
        prefill_s=0.0,
    )


def _sizes(config: Config) -> tuple[int, int]:
    """Over how many GPUs a replica's layers are cut, and over how many dealt out."""
    return config.sglang.get("tp_size", 1), config.sglang.get("pp_size", 1)


def _most_running(config: Config) -> int | None:
    value = config.sglang.get(RUNNING)
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(
            f"sglang.{RUNNING}={value}", "is not a number of responses", "give 1 or more"
        )
    return value


def _static_fraction(config: Config) -> float:
    value = config.sglang.get("mem_fraction_static", STATIC_FRACTION)
    if not isinstance(value, int | float) or not 0 < value < 1:
        where = f"sglang.mem_fraction_static={value}"
        raise InputError(where, "is not a share of the GPU's memory", "give 0.5, say")
    return float(value)


def _decode_s(
    config: Config,
    arch: Architecture,
    work: Workload,
    hardware: Hardware,
    *,
    replicas: int,
    together: float,
) -> float:
    tp, pp = _sizes(config)
    sequences = work.responses / replicas
    steps = max(work.longest_response, sequences * work.response_tokens / together)
    batch = sequences * work.response_tokens / steps
    context = work.prompt_tokens + work.response_tokens / 2
    step = decode_step_s(arch, hardware, batch=batch, context=context, tp=tp, pp=pp)
    return steps * step


def decode_step_s(
    arch: Architecture, hardware: Hardware, *, batch: float, context: float, tp: int, pp: int = 1
) -> float:
    """Seconds in which a server decodes a token of each of `batch` responses, that look back at
    `context` tokens in the mean.
    """
    gpus, overhead = tp * pp, hardware.overhead
    memory, rate = gpus * hardware.memory_per_s, gpus * hardware.products_per_s("bfloat16")
    products = all_products(arch, arch.layers) + arch.vocab_size * arch.hidden_size
    seconds = max(_touched_bytes(arch, batch) / memory, batch * products / rate)
    shared = gpus / max(1, tp / arch.kv_heads)  # more ranks than heads keep copies
    seconds += batch * context * cache_bytes(arch) / (shared * hardware.memory_per_s)
    # logits are written, turned to log-probs and sampled from in fp32
    seconds += LOGIT_PASSES * 4 * batch * arch.vocab_size / memory
    kernels = arch.layers + (0 if arch.experts is None else len(arch.experts.layers))
    fixed = overhead.decode_step_ms + kernels * overhead.decode_layer_ms
    fixed += batch * overhead.decode_sequence_ms
    if tp > 1:
        fixed += 2 * arch.layers * overhead.collective_ms
        row = BYTES * batch * arch.hidden_size
        seconds += 2 * arch.layers * 2 * row * (tp - 1) / tp / hardware.bytes_per_s(tp)
    return seconds + 1e-3 * fixed


def cache_bytes(arch: Architecture) -> int:
    """Keys and values of a token, in all layers."""
    return BYTES * 2 * arch.layers * attention_sizes(arch)[1]


def _touched_bytes(arch: Architecture, batch: float) -> float:
    """Of the weights, those that `batch` tokens go through."""
    total = all_parameters(arch)
    experts = arch.experts
    if experts is None:
        return BYTES * total
    of_experts = len(experts.layers) * experts.number * 3 * arch.hidden_size * experts.ffn_size
    idle = (1 - experts.per_token / experts.number) ** batch
    return BYTES * (total - idle * of_experts)


def _prefill_s(arch: Architecture, work: Workload, hardware: Hardware, *, gpus: int) -> float:
    """Each prompt once: its responses share what it left in the cache."""
    products = all_products(arch, arch.layers)
    products += arch.layers * attention_products(arch, work.prompt_tokens / 2)
    rate = hardware.products_per_s("bfloat16") * gpus
    return work.prompts * work.prompt_tokens * products / rate
