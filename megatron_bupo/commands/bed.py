"""`megatron-bupo bed`: the demo's model and data in a directory of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bupo.bed.prepare import EVAL, MODEL, TRAIN, make_bed
from megatron_bupo.config import expand
from megatron_bupo.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace


def run(args: Namespace) -> None:
    """Make what `args.out` lacks and say how to train on it."""
    bed = Path(expand(args.out))
    try:
        bed.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}", str(error.strerror), "choose another") from None
    make_bed(bed)
    print(
        f"{bed} is complete; train on it with\n"
        "megatron-bupo train --config conf/demo.yaml "
        f"model.path={bed / MODEL} data.train={bed / TRAIN} data.eval={bed / EVAL}"
    )
