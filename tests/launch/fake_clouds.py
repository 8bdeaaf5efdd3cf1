"""As much of Kubernetes' API (with Kubeflow's trainer) and of Lepton's as a launch asks for, over
HTTP, with a record of what was asked.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

NOT_FOUND = 404, {"message": "not found", "reason": "NotFound"}


@dataclass
class Cloud:
    """Objects by the path that they are found at, and every request: verb, path, body."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    refusal: tuple[int, dict[str, Any]] | None = None  # the answer to everything
    address: str = ""

    def posted(self, ending: str) -> list[Any]:
        """Bodies of what was created at paths that end so."""
        return [body for verb, path, body in self.asked if verb == "POST" and path.endswith(ending)]

    def answer(self, verb: str, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((verb, path, body))
        if self.refusal is not None:
            return self.refusal
        return self._kubernetes(verb, path, body) or self._lepton(verb, path, body) or NOT_FOUND

    def _kubernetes(self, verb: str, path: str, body: Any) -> tuple[int, Any] | None:
        if not re.search(r"/(pods|trainjobs)(/|$)", path):
            return None
        if verb == "POST":
            self.objects[f"{path}/{body['metadata']['name']}"] = body
            return 201, body
        if verb == "DELETE":
            return (200, self.objects.pop(path)) if path in self.objects else NOT_FOUND
        if path.endswith("/pods"):  # watched: one event, of the newest
            pod = next(o for p, o in reversed(self.objects.items()) if p.startswith(path))
            return 200, {"type": "ADDED", "object": {**pod, "status": {"phase": "Running"}}}
        return (200, self.objects[path]) if path in self.objects else NOT_FOUND

    def _lepton(self, verb: str, path: str, body: Any) -> tuple[int, Any] | None:
        if path.endswith("/dedicated-node-groups"):
            metadata = {"id": "group-1", "name": "my-node-group"}
            return 200, [{"metadata": metadata, "spec": {}, "status": {}}]
        if path.endswith("/nodes"):
            spec = {"unschedulable": False}
            names = [{"id": f"node-{i}", "name": f"node-{i}"} for i in range(2)]
            return 200, [{"metadata": name, "spec": spec, "status": {}} for name in names]
        if verb == "POST" and path.endswith("/jobs"):
            job = {**body, "metadata": {"name": body["metadata"]["id"], **body["metadata"]}}
            copies = job["metadata"]["id"].startswith("data-mover")
            job["status"] = lepton_status("Completed" if copies else "Starting")
            self.objects[f"{path}/{job['metadata']['id']}"] = job
            return 201, job
        if path.endswith("/replicas"):
            ids = [f"{path.split('/')[-2]}-{i}-abcde" for i in range(2)]
            return 200, [{"id": name, "metadata": {"id": name, "name": name}} for name in ids]
        if path.endswith("/log"):
            return 200, "step 1/2\nstep 2/2\n"
        if verb == "DELETE" and path in self.objects:
            return 200, self.objects.pop(path)
        return (200, self.objects[path]) if path in self.objects else None


def lepton_status(state: str) -> dict[str, Any]:
    """Of a Lepton job with two pods."""
    return {"state": state, "job_name": "job", "ready": 2, "active": 2, "failed": 0, "succeeded": 0,
            "creation_time": 0, "completion_time": 0}  # fmt: skip


@contextmanager
def cloud() -> Iterator[Cloud]:
    """One, at `address`."""
    made = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, found = made.answer(self.command, urlsplit(self.path).path, body)
            text = found if isinstance(found, str) else f"{json.dumps(found)}\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = do_PATCH = _any

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
