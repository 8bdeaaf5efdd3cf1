"""An HF checkpoint directory as a torch_dist checkpoint under any layout; the same as
`megatron-bupo convert hf-to-megatron`.

    python tools/convert_hf_to_megatron.py --hf DIR --out DIR parallel.tp=2 parallel.pp=2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bupo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
