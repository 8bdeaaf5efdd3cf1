"""`python -m megatron_bupo` is `megatron-bupo`."""

from __future__ import annotations

from megatron_bupo.cli import main

if __name__ == "__main__":  # also imported by processes that are spawned
    raise SystemExit(main())
