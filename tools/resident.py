"""Memory of this process on Linux, as the kernel counts it: what is in RAM now, and at most."""

from __future__ import annotations

import ctypes
from pathlib import Path


def resident_bytes(*, peak: bool = False) -> int:
    """Bytes of this process in RAM now, or at most since `forget_peak`."""
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith(field))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """From now on the peak is that from now on; a forked process else begins with its parent's,
    and with what its parent had freed, which would be used again unseen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
