"""How is a job on Kubernetes or Lepton, and what does it say? Asked of their APIs: NeMo-Run takes
whatever goes wrong when it asks for a job that is pending.

    executor    NeMo-Run's, as it was when the job was submitted
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

from megatron_bupo.errors import InputError

GONE = "over"  # it is not known any more
LOG_S = 10.0  # for a log that goes on to pause


def state(kind: str, executor: Any, job: str) -> str:
    """`PENDING`, `RUNNING`, `COMPLETED`, `FAILED`, ... or `over`.

    Raises:
        InputError: nobody answers, or not to us.
    """
    try:
        return _trainjob(executor, job) if kind == "kubernetes" else _batch_job(executor, job)
    except Exception as error:
        if _status(error) == 404:
            return GONE
        raise InputError(f"job {job}", said(error), "ask again later") from None


def cancel(executor: Any, job: str) -> None:
    """End it: containers get SIGTERM, and the time that the cloud gives them after it.

    Raises:
        InputError: nobody answers, or not to us.
    """
    try:
        executor.cancel(job)
    except Exception as error:
        if _status(error) != 404:
            raise InputError(f"job {job}", said(error), "cancel it again later") from None


def lines(kind: str, executor: Any, job: str, *, last: int | None) -> Iterator[str]:
    """What its first node has said, the `last` lines of it; None: and what it says from now on."""
    if kind == "kubernetes":
        yield from _kubectl(executor, job, last)
        return
    from leptonai.api.v2.client import APIClient
    from requests import RequestException

    client = APIClient()
    try:
        replicas = [replica.metadata.id_ or "" for replica in client.job.get_replicas(job)]
        first = [name for name in replicas if name.startswith(f"{job}-0")]
        timeout = None if last is None else LOG_S
        text: list[str] = []
        for name in first[:1]:
            with contextlib.suppress(RequestException):  # a log that pauses has no end
                for part in client.job.get_log(job, name, timeout=timeout):
                    text.append(part)
                    if last is None:
                        yield part.rstrip("\n")
        if last is not None:
            yield from "".join(text).splitlines()[-last:]
    except RuntimeError as error:
        raise InputError(f"job {job}", said(error), "ask again later") from None


def said(error: BaseException) -> str:
    """What whoever was asked has answered, on one line."""
    text = str(error)
    if command := getattr(error, "result", None):  # of a command that has failed
        text = command.stderr
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        text = json.loads(getattr(error, "body", None) or "")["message"]  # Kubernetes' own
    status = _status(error)
    prefix = f"HTTP {status}: " if status and str(status) not in text else ""
    return prefix + (" ".join(text.split()) or type(error).__name__)


def _status(error: BaseException) -> int | None:
    """Of an answer of HTTP's."""
    response = getattr(error, "response", None)
    return getattr(error, "status", None) or getattr(response, "status_code", None)


def _trainjob(executor: Any, job: str) -> str:
    found = executor._custom_objects_api.get_namespaced_custom_object(
        "trainer.kubeflow.org", "v1alpha1", executor.namespace, "trainjobs", job
    ).get("status", {})
    true = [c["type"] for c in found.get("conditions", []) if c["status"] == "True"]
    for condition, word in [("Complete", "COMPLETED"), ("Failed", "FAILED")]:
        if condition in true:
            return word
    if any(part.get("active") or part.get("ready") for part in found.get("jobsStatus", [])):
        return "RUNNING"
    return "SUSPENDED" if "Suspended" in true else "PENDING"


def _batch_job(executor: Any, job: str) -> str:
    word = str(executor.status(job).value)
    return {"UNK": "UNKNOWN"}.get(word, word.upper())


def _kubectl(executor: Any, job: str, last: int | None) -> Iterator[str]:
    chosen = f"jobset.sigs.k8s.io/jobset-name={job},batch.kubernetes.io/job-completion-index=0"
    command = ["kubectl", "logs", "--namespace", executor.namespace, "--selector", chosen]
    command += ["--container", "node", "--tail", "-1" if last is None else str(last)]
    command += ["--follow"] if last is None else []
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                yield line.rstrip("\n")
            error = process.stderr.read()
    except FileNotFoundError:
        raise InputError("kubectl", "is not installed here", "install it") from None
    if process.returncode and last is not None:
        raise InputError(" ".join(command), " ".join(error.split()), "see `status`")
