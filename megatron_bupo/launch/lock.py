"""A run directory belongs to one run at a time.

The kernel keeps the lock on `run_dir/.lock`, not the file: it ends with the last process that holds
it, however that dies, so no killed run ever blocks its own resumption. Forked ranks share their
launcher's lock: a run that is killed holds its directory until its last rank is gone.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_bupo.errors import InputError

FILE = ".lock"
POLL_S = 0.05


@contextmanager
def hold(run_dir: Path, *, key: str = "run_dir=", patience_s: float = 10.0) -> Iterator[None]:
    """Make `run_dir`, which the user named as `key`, and hold it inside the block; a killed run's
    ranks have `patience_s` seconds to end.

    Raises:
        InputError: the directory cannot be made, or another process holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / FILE).open("a+")
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        raise InputError(f"{key}{run_dir}", reason, f"choose another {_name(key)}") from None
    with file:
        deadline = time.monotonic() + patience_s
        while not _locked(file):
            if time.monotonic() > deadline:
                file.seek(0)
                reason = f"another run is writing to it (process {file.read().strip()})"
                way_out = f"wait for it, end it, or choose another {_name(key)}"
                raise InputError(f"{key}{run_dir}", reason, way_out)
            time.sleep(POLL_S)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _name(key: str) -> str:
    return key.strip("= ")


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: better no protection than no run
        return True
    return True
