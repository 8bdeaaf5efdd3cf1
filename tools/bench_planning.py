"""What does it cost to know the planning tokens of a step, in microseconds a token?

    python tools/bench_planning.py --tokenizer DIR --grams examples/strategic_grams.yaml texts.jsonl

Four parts, of which the ranks of a run share the first three: which characters each token stands
for (text), which tokens are in a gram (mask), which grams count and what follows them (uses), and
the measures that a step logs of all its responses (measures). CPU time of one process. The texts
are put one after the other and cut into responses of --response-tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is a module of its own

from megatron_bupo.algorithm.planning_measures import Planning, Use, uses
from megatron_bupo.algorithm.planning_tokens import StrategicGrams, inside
from megatron_bupo.data.gram_files import read_clusters, read_grams
from megatron_bupo.data.token_texts import decoder_of, token_texts
from megatron_bupo.record.measures import planning_measures
from tools.mine_strategic_grams import correct_solutions

PARTS = ("text", "mask", "uses", "measures")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print or write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="JSONL with a text a line")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory")
    parser.add_argument("--grams", type=Path, required=True)
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--response-tokens", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    texts = cycle(correct_solutions(args.texts, 0.0))
    encoded = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    ids = chain.from_iterable(encoded)
    responses = [list(islice(ids, args.response_tokens)) for _ in range(args.responses)]
    found = measure(responses, decoder_of(args.tokenizer), args.grams)
    Console().print_json(data=found)
    if args.json:
        args.json.write_text(json.dumps(found))


def measure(
    responses: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str], grams: Path
) -> dict[str, float]:
    """The cost of each part for `responses` of equal length."""
    known, clusters = StrategicGrams(read_grams(grams)), read_clusters(grams)
    spent = dict.fromkeys(PARTS, 0.0)
    masks: list[list[bool]] = []
    used: list[Use] = []
    for response in responses:
        start = time.process_time()
        text, spans = token_texts(response, decode)
        decoded = time.process_time()
        found = known.find(text)
        masks.append(inside(spans, found))
        masked = time.process_time()
        used += uses(text, found)
        spent["text"] += decoded - start
        spent["mask"] += masked - decoded
        spent["uses"] += time.process_time() - masked
    planning = Planning(torch.tensor(masks), used)
    numbers = torch.rand(2, *planning.tokens.shape)
    start = time.process_time()
    everywhere = torch.ones_like(planning.tokens)
    planning_measures(
        planning, everywhere, -numbers[0], numbers[1], clusters=clusters, fork_share=0.3
    )
    spent["measures"] = time.process_time() - start
    tokens = planning.tokens.numel()
    return {
        "tokens": tokens,
        "planning_fraction": float(planning.tokens.double().mean()),
        "grams_found": len(used),
        **{f"{part}_us": seconds / tokens * 1e6 for part, seconds in spent.items()},
        "step_s": sum(spent.values()),
    }


if __name__ == "__main__":
    main()
