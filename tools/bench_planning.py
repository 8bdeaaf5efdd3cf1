"""What does it cost to find the planning tokens of a response, in microseconds a token?

    python tools/bench_planning.py --tokenizer DIR --grams examples/strategic_grams.yaml texts.jsonl

Two parts: which characters each token stands for, and which of them are in a gram. CPU time of one
process; in a run the ranks share the responses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is a module of its own

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask
from megatron_bupo.data.gram_files import read_grams
from megatron_bupo.data.token_texts import token_texts
from tools.mine_strategic_grams import correct_solutions


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print or write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="JSONL with a text a line")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory")
    parser.add_argument("--grams", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="texts (200)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    grams = StrategicGrams(read_grams(args.grams))
    tokens = planning = 0
    spent = [0.0, 0.0]
    for text in list(correct_solutions(args.texts, 0.0))[: args.limit]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        start = time.process_time()
        decoded, spans = token_texts(ids, decode)
        middle = time.process_time()
        planning += sum(planning_mask(decoded, spans, grams))
        spent = [spent[0] + middle - start, spent[1] + time.process_time() - middle]
        tokens += len(ids)
    found = {
        "tokens": tokens,
        "planning_fraction": planning / tokens,
        "text_us": spent[0] / tokens * 1e6,
        "mask_us": spent[1] / tokens * 1e6,
    }
    Console().print_json(data=found)
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
