"""Every knob, with its unit, default and meaning. YAML files hold deltas to these; nothing else
holds defaults. What is asked and how it is graded stands in `questions.py`, what leads from rewards
to a loss in `algorithm.py`, Adam in `optimizer.py`, PPO's critic in `critic.py`, HICRA in
`hicra.py`, what is watched meanwhile in `probe.py`.

No torch here: a config is read, checked and printed before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_bupo.config.algorithm import AlgorithmConfig
from megatron_bupo.config.critic import CriticConfig
from megatron_bupo.config.hicra import HicraConfig
from megatron_bupo.config.optimizer import OptimizerConfig
from megatron_bupo.config.probe import GuardConfig, ProbeConfig
from megatron_bupo.config.questions import (
    BenchmarkConfig,
    DataConfig,
    EvaluationConfig,
    RewardConfig,
    RewardTermConfig,
    SourceConfig,
)

__all__ = [  # here, and what stands in those
    "AlgorithmConfig",
    "BenchmarkConfig",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "GuardConfig",
    "HicraConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "RewardConfig",
    "RewardTermConfig",
    "SourceConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """The model to train: a Hugging Face checkpoint directory, loaded online under any layout."""

    path: str = "???"
    tokenizer: str | None = None  # directory; None: model.path
    dtype: str = "float32"  # of parameters and activations on the actor: float32 | bfloat16


@dataclass(frozen=True)
class RolloutConfig:
    """Responses are always sampled from the full policy."""

    engine: str = "embedded"  # embedded: in the trainer's processes | sglang: servers over HTTP
    prompts_per_step: int = 128
    responses_per_prompt: int = 8
    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    # Groups whose rewards are all equal are replaced by groups of further prompts, in at most so
    # many rounds; see rollout/dynamic_sampling.py
    dynamic_sampling_rounds: int = 0
    batch_size: int = 256  # responses that the embedded engine decodes at a time, per rank
    # The rest is for servers. Steps whose rollouts may be generated ahead, while others train; 0:
    # strictly on-policy
    max_staleness: int = 0
    overlap_phases: str = "all"  # all | full: generate ahead in the full-policy phase only
    colocated: bool = False  # servers give their GPU memory to the trainer while it trains
    # Responses that are unfinished after so long, or when those that finished hold so many tokens,
    # are cut and graded as they are; None: never
    step_budget_s: float | None = None
    step_budget_tokens: int | None = None


@dataclass(frozen=True)
class ServersConfig:
    """SGLang servers: `count` of them that we start on this machine, or those at `addresses`."""

    addresses: list[str] = field(default_factory=list)  # e.g. http://10.0.0.5:30000; starts none
    count: int = 1  # to start; `sglang.*` are their native options
    python: str | None = None  # interpreter that can import sglang; None: the trainer's own
    env: dict[str, Any] = field(default_factory=dict)  # environment of the servers that we start
    api_key: str | None = None
    router: bool = False  # dispatch through sglang-router instead of to the least loaded
    start_timeout_s: float = 900.0  # from start to ready
    request_timeout_s: float = 1800.0  # for one response
    batch_timeout_s: float = 7200.0  # for all responses of a step
    attempts: int = 5  # at one response, on whichever server, before the run stops
    health_every_s: float = 10.0
    restarts: int = 10  # of one server that we started, before it is given up


@dataclass(frozen=True)
class SyncConfig:
    """How new weights reach the servers."""

    # broadcast: a process group (NCCL; gloo on CPU) | http: in the request | disk: safetensors in a
    # directory that all see | ipc: memory of the same machine or GPU
    mode: str = "broadcast"
    bucket_bytes: int = 2**29  # of tensors sent at a time
    directory: str | None = None  # of mode disk; None: run_dir/weights
    verify: bool = False  # compare checksums after every sync; after a recovery always
    pause: str = "retract"  # what running responses do meanwhile: retract | in_place | abort
    timeout_s: float = 600.0  # for one bucket


@dataclass(frozen=True)
class StageConfig:
    """One stage of a bottom-up schedule: train internal layer `layer` for `steps` steps."""

    layer: int = 0
    steps: int = 0


@dataclass(frozen=True)
class ParallelConfig:
    """The actor's layout over ranks."""

    tp: int = 1  # tensor-parallel size
    pp: int = 1  # pipeline-parallel size
    vpp: int = 1  # model chunks per pipeline stage (interleaved schedule)
    dp: int | None = (
        None  # data-parallel size; None: what the number of ranks leaves (1 on a laptop)
    )
    sp: bool = False  # sequence parallelism in the tensor-parallel group
    cp: int = 1  # context-parallel size: ranks that share each sequence
    ep: int = 1  # expert-parallel size: data- and context-parallel ranks that share the experts
    etp: int | None = None  # tensor-parallel size inside an expert; None: tp
    distributed_optimizer: bool = False


AUTO = "auto"


@dataclass(frozen=True)
class BupoConfig:
    """Which policy a step trains. `internal_steps: 0` is plain GRPO, exactly."""

    # Counted from 1, as in the paper. auto: what an analysis of the model's responses to
    # `auto_prompts` training prompts recommends, before step 0; everything then sees that number
    target_layer: int | str | None = None
    auto_prompts: int = 64
    internal_steps: int = 0
    stages: list[StageConfig] = field(
        default_factory=list
    )  # instead of the two above: bottom-up stages
    read_out_norm: bool = (
        False  # apply the final norm before the unembedding (the paper's ablation)
    )
    # Adam's state when layers begin to train at a phase switch; see mcore/optimizer.py
    optimizer_at_switch: str = "per_layer_step"  # per_layer_step | common_step | reset | warmup
    switch_warmup_steps: int = 10  # of optimizer_at_switch=warmup, after each switch
    # The internal phases under a layout of their own, with only the layers that they train; None:
    # under `parallel`, with the whole model in place
    internal_layout: ParallelConfig | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)  # `bupo.guard=true`: guard.enabled

    def phases(self) -> list[tuple[int, int]]:
        """The internal phases as `(layer, steps)`, bottom-up; none: GRPO."""
        stages = [(stage.layer, stage.steps) for stage in self.stages]
        if not stages and isinstance(self.target_layer, int):
            stages = [(self.target_layer, self.internal_steps)]
        return [(layer, steps) for layer, steps in stages if steps]


@dataclass(frozen=True)
class TrainerConfig:
    """How the actor works through a minibatch."""

    # Packed sequences (no padding) per forward-backward and data-parallel rank
    max_tokens_per_microbatch: int = 16384
    microbatch_size: int | None = None  # and at most this many responses; None: any number
    logprob_chunk_tokens: int = 1024  # rows of logits that exist at a time


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run resumes from, and what a finished one leaves."""

    every: int = 20  # steps between checkpoints
    keep: int = 2  # most recent checkpoints kept
    export_hf: bool = True  # write the final policy as an HF checkpoint to run_dir/hf


@dataclass(frozen=True)
class LoggingConfig:
    """Metrics always go to run_dir/metrics.jsonl."""

    tensorboard: bool = True
    trackers: list[str] = field(default_factory=list)  # wandb, trackio; offline by their own means
    project: str = "megatron_bupo"  # to trackers
    name: str | None = None  # of the run, to trackers; None: that of run_dir
    progress: bool = True  # a live display in a terminal, a line per step elsewhere
    stall_s: float = 600.0  # without progress: report which rank waits where; 0: never


@dataclass(frozen=True)
class DebugConfig:
    """For looking into a run."""

    dump_rollouts: bool = False  # every rollout of every step goes to run_dir/rollouts
    # Train from the rollouts and rewards that another run has dumped there; no engine, no grader
    replay: str | None = None
    rollout_only: bool = False  # generate, grade and dump, without training or evaluation
    # Compare trainer and sampler in every so many steps of the internal phase too
    mismatch_every: int = 0


@dataclass(frozen=True)
class Config:
    """One training run."""

    run_dir: str = "runs/bupo"
    steps: int = 300
    seed: int = 0
    prepare: str | None = (
        None  # module:function called with the config before the first check; makes what is missing
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    servers: ServersConfig = field(default_factory=ServersConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    bupo: BupoConfig = field(default_factory=BupoConfig)
    hicra: HicraConfig = field(default_factory=HicraConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    megatron: dict[str, Any] = field(
        default_factory=dict
    )  # native TransformerConfig, DDP and optimizer fields
    sglang: dict[str, Any] = field(default_factory=dict)  # native server options

    @property
    def has_critic(self) -> bool:
        """Does a critic say what responses will earn?"""
        return self.algorithm.advantage == "gae"

    @property
    def resting_steps(self) -> int:
        """Steps at the start in which the policy does not learn yet, but the critic."""
        return self.critic.warmup_steps if self.has_critic else 0

    def learned_steps(self, step: int) -> int:
        """Those of the run's first `step` steps that train the policy: its weights' version."""
        return max(0, step - self.resting_steps)

    @property
    def of_critic(self) -> Config:
        """The critic's settings, as if it were a model that trains by itself."""
        critic, minibatches = self.critic, self.critic.minibatches or self.algorithm.minibatches
        return replace(
            self,
            model=replace(self.model, path=critic.path or self.model.path),
            algorithm=replace(self.algorithm, minibatches=minibatches),
            optimizer=critic.optimizer,
            bupo=BupoConfig(),
            critic=CriticConfig(clip_range=critic.clip_range),
        )

    @property
    def corrects_rollouts(self) -> bool:
        """Does truncated importance sampling weigh the tokens of full-policy steps?"""
        mode, stale = self.algorithm.rollout_correction, self.rollout.max_staleness > 0
        return mode in {"tis", "tis_full"} or (mode == "auto" and stale)
