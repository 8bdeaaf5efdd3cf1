"""The options of `megatron-bupo convert`: to Megatron-Core, back, and are two the same?"""

from __future__ import annotations

import argparse

from megatron_bupo.command_line import Parser, add_overrides, count


def add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "convert",
        help="HF checkpoints to Megatron-Core's torch_dist and back",
        description="Convert checkpoints, in one process and a tensor at a time. A conversion that "
        "was killed goes on by the same command.",
        allow_abbrev=False,
    )
    conversions = parser.add_subparsers(dest="conversion", required=True, metavar="DIRECTION")
    there = conversions.add_parser(
        "hf-to-megatron",
        help="HF directory -> torch_dist, cut for any layout",
        epilog="example: megatron-bupo convert hf-to-megatron --hf DIR --out DIR parallel.tp=2 "
        "parallel.pp=2",
        allow_abbrev=False,
    )
    there.add_argument("--hf", metavar="DIR", required=True, help="HF checkpoint directory")
    _add_conversion(there)
    add_overrides(there)
    back = conversions.add_parser(
        "megatron-to-hf",
        help="torch_dist or a training checkpoint -> HF directory",
        epilog="example: megatron-bupo convert megatron-to-hf --megatron runs/demo --out DIR",
        allow_abbrev=False,
    )
    back.add_argument(
        "--megatron",
        metavar="DIR",
        required=True,
        help="torch_dist directory, training checkpoint (run_dir/checkpoints/step_N), or run_dir: "
        "its newest checkpoint",
    )
    back.add_argument(
        "--like", metavar="DIR", help="HF directory with config.json and tokenizer to take"
    )
    back.add_argument(
        "--shard-bytes",
        metavar="N",
        type=count,
        default=4 * 2**30,
        help="most bytes of tensors in a file (default: 4 GiB)",
    )
    _add_conversion(back)
    _add_verify(conversions)


def _add_verify(conversions: argparse._SubParsersAction[Parser]) -> None:
    parser = conversions.add_parser(
        "verify",
        help="are two checkpoints the same model? exit code 1 where they are not",
        description="Compare two checkpoints, each an HF directory or a Megatron one: every tensor "
        "bit by bit, config and tokenizer, and log-probs of the whole vocabulary on random tokens.",
        epilog="example: megatron-bupo convert verify HF_DIR MEGATRON_DIR parallel.tp=2",
        allow_abbrev=False,
    )
    parser.add_argument("--hf", metavar="DIR", help="one of the two, as an HF directory")
    parser.add_argument("--megatron", metavar="DIR", help="one of the two, as --megatron elsewhere")
    parser.add_argument("--no-logits", action="store_true", help="compute nothing: compare files")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="of log-probs, times the largest of their position (default: 1e-5)",
    )
    parser.add_argument("--sequences", type=count, default=4, metavar="N", help="default: 4")
    parser.add_argument("--tokens", type=count, default=32, metavar="N", help="of each; default 32")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--json", metavar="FILE", help="write all that was found")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FIRST SECOND [KEY=VALUE ...]",
        help="the two checkpoints; and the layout of a Megatron one, e.g. parallel.tp=2",
    )


def _add_conversion(parser: Parser) -> None:
    parser.add_argument("--out", metavar="DIR", required=True, help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast all weights; default: every one stays as it is stored",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DIR, once the new one is complete"
    )
