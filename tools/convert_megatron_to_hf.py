"""A torch_dist or training checkpoint as an HF checkpoint directory; the same as
`megatron-bupo convert megatron-to-hf`.

    python tools/convert_megatron_to_hf.py --megatron DIR --out DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bupo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
