"""What does each internal layer policy of a model think of given responses?

    megatron-bupo bed --out runs/bed
    python examples/score_internal_policies.py runs/bed/model examples/rows.jsonl parallel.tp=2

The two rows are the demo's `4+9+3+6=`, once answered `>13>16>22#22$` and once with a carry
forgotten in the first sum. From Python one actor scores the rows under all policies;
`megatron-bupo score` does it for one policy, and writes the numbers of every token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from megatron_bupo.algorithm.bupo import FULL, InternalLayerPolicy, Policy
from megatron_bupo.commands.score import GivenResponse, read_responses
from megatron_bupo.config import load_config
from megatron_bupo.config.checks import check
from megatron_bupo.hf.reader import slice_opener
from megatron_bupo.hf.tensors import read_index
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.mcore import parallel
from megatron_bupo.mcore.actor import MegatronActor
from megatron_bupo.preflight import Preflight, check_model
from megatron_bupo.score import as_batch


def main(argv: Sequence[str]) -> None:
    """Check what the command line names, then score on as many ranks as the layout has."""
    model_dir, rows, *overrides = argv
    config = load_config(None, [f"model.path={model_dir}", f"data.train={rows}", *overrides])
    layout = check(config, None, training=False)
    architecture = check_model(config, training=False)
    responses = read_responses(Path(rows), architecture)
    run_ranks(score, layout.world, Preflight(config, architecture, layout), responses)


def score(ready: Preflight, responses: Sequence[GivenResponse]) -> None:
    """Print a line per policy. Every rank runs this."""
    with parallel.joined(ready.layout, seed=0):
        with ExitStack() as files:
            index = read_index(ready.config.model.path)
            actor = MegatronActor(ready.architecture, ready.config, slice_opener(index, files))
        batch = as_batch(responses)
        internal = [InternalLayerPolicy(n) for n in range(1, ready.architecture.layers)]
        policies: list[Policy] = [*internal, FULL]
        if dist.get_rank() == 0:
            print("mean log-prob of a token, by row | mean entropy, nats")
        for policy in policies:
            logprobs, entropies = actor.logprobs(batch, policy)
            tokens = batch.response_mask.sum(1)
            means = "  ".join(f"{mean:7.3f}" for mean in logprobs.sum(1) / tokens)
            if dist.get_rank() == 0:
                print(f"{policy!s:16} {means} | {entropies.sum() / tokens.sum():.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
