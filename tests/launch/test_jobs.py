"""What runs on this machine: whose process is it?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_bupo.launch import jobs
from megatron_bupo.launch.folder import launch_dir, node_file


def test_a_process_that_began_after_its_id_was_noted_is_another_runs(tmp_path: Path):
    launch_dir(tmp_path).mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(60)", jobs.NODE]
    with subprocess.Popen(command) as process:
        while jobs.NODE not in Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)  # it has not become that command yet
        node_file(tmp_path).write_text(json.dumps({"pid": process.pid, "code": None}))
        os.utime(node_file(tmp_path), (0, 0))
        assert not jobs.end(tmp_path, now=True)
        os.utime(node_file(tmp_path))
        assert jobs.end(tmp_path, now=True)
        assert process.wait() == -signal.SIGKILL
    assert not jobs.end(tmp_path, now=True)
