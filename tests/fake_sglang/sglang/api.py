"""The HTTP side: who may ask what, and in which words it is answered."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from sglang.faults import FAULTS, die
from sglang.sampling import BadRequest, SamplingParams
from sglang.scheduler import SENT_EVERY, Request, Scheduler
from sglang.weights import WeightUpdates

Reply = tuple[int, Any]  # status, JSON or text
MEMORY = {"weights", "kv_cache", "cuda_graph"}
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running or "
    "waiting requests, the operation will not be performed.)\n"
)
OPEN_PATHS = ("/health", "/ready", "/metrics")


class Api:
    """The endpoints of one server."""

    def __init__(
        self,
        scheduler: Scheduler,
        updates: WeightUpdates,
        arguments: dict[str, Any],
        decode: Callable[[list[int], bool], str] | None,
    ) -> None:
        self.scheduler, self.updates = scheduler, updates
        self.arguments, self.decode = arguments, decode
        self.get: dict[str, Callable[[], Reply]] = {
            "/ready": self._ready,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/v1/loads": self._loads,
            "/health": self._health,
            "/health_generate": self._health,
            "/flush_cache": lambda: self._flush({}),
            "/weights_checker": lambda: self._check_weights({}),
        }
        posts = {
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/abort_request": self._abort,
            "/flush_cache": self._flush,
            "/update_weight_version": self._set_version,
            "/weights_checker": self._check_weights,
            "/get_weights_by_name": lambda _: _error("Get parameter by name failed"),
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
            "/fake_faults": self._faults,
            "/update_weights_from_tensor": self._from_tensor,
            "/update_weights_from_disk": self._from_disk,
        }
        answers = {
            "/begin_weight_update": updates.begin,
            "/end_weight_update": updates.end,
            "/update_weights_from_distributed": updates.from_distributed,
            "/init_weights_update_group": updates.init_group,
            "/destroy_weights_update_group": updates.destroy_group,
        }
        for path, method in answers.items():
            posts[path] = lambda body, method=method: _told(*method(body))
        if FAULTS.old:
            del posts["/begin_weight_update"], posts["/end_weight_update"]
        self.post: dict[str, Callable[[dict[str, Any]], Reply]] = posts

    def may(self, path: str, authorization: str | None) -> bool:
        """Does whoever sent `authorization` get an answer from `path`?"""
        key = self.arguments.get("api_key")
        if not key or path.startswith(OPEN_PATHS):
            return True
        kind, _, token = (authorization or "").partition(" ")
        return kind.lower() == "bearer" and secrets.compare_digest(token, key)

    # --- generation ---

    def generate(self, body: dict[str, Any], connected: Callable[[], bool]) -> Reply:
        """`/generate`: one prompt or several, each `n` times, answered when all are."""
        if FAULTS.due("fail_generates"):
            return 500, "Internal Server Error"
        FAULTS.deadly("die_after_requests")
        if FAULTS.due("hang_generates"):
            while connected():
                time.sleep(0.1)
            raise ConnectionError
        requests, many = self._requests(body)
        self.scheduler.generate(requests, connected)
        replies = [self._response(request) for request in requests]
        return 200, replies if many else replies[0]

    def _requests(self, body: dict[str, Any]) -> tuple[list[Request], bool]:
        for name in ("text", "stream", "lora_path", "top_logprobs_num", "return_hidden_states"):
            if body.get(name):
                raise BadRequest(f"the fake does not know {name}", status=501)
        given = body.get("sampling_params") or {}
        params = SamplingParams.parse(given)
        ids = body.get("input_ids")
        if ids is None:
            raise BadRequest("Either text, input_ids or input_embeds should be provided.")
        batch = bool(ids) and isinstance(ids[0], list)
        prompts = ids if batch else [ids]
        if not all(prompts):
            raise BadRequest("input_ids cannot be empty.")
        if not all(type(token) is int for prompt in prompts for token in prompt):
            raise BadRequest("elements must be int or list")
        if params.min_new_tokens and self.decode is None:
            raise BadRequest("min_new_tokens is unavailable when skip_tokenizer_init=True")
        rid, start = body.get("rid"), body.get("logprob_start_len")
        many = len(prompts) * params.n > 1 or batch
        if isinstance(rid, str) and many:
            rid = [f"{rid}_{i}" for i in range(len(prompts))]
        made = []
        for i, prompt in enumerate(prompts):
            for _ in range(params.n):
                own = rid[i] if isinstance(rid, list) and params.n == 1 else None
                own = own or (rid if isinstance(rid, str) else None) or uuid.uuid4().hex
                logprob = bool(body.get("return_logprob"))
                first = -1 if start is None else start
                made.append(
                    Request(own, prompt, params, logprob, first, given.get("max_new_tokens"))
                )
        return made, many

    def _response(self, request: Request) -> dict[str, Any]:
        output, logprobs = request.output, request.logprobs
        if request.lost:  # what the scheduler had not yet sent is gone
            kept = len(output) // SENT_EVERY * SENT_EVERY
            output, logprobs = output[:kept], logprobs[:kept]
        version = self.scheduler.weight_version
        meta: dict[str, Any] = {"id": request.rid, "finish_reason": request.finish}
        meta |= {"weight_version": version, "completion_tokens": len(output)}
        if not request.lost:
            cached = request.cached_tokens
            meta |= {
                "prompt_tokens": len(request.prompt),
                "num_retractions": request.retractions,
                "reasoning_tokens": 0,
                "cached_tokens": cached,
                "cached_tokens_details": {"device": cached, "host": 0} if cached else None,
                "dp_rank": None,
            }
        if not FAULTS.old:
            meta["weight_versions"] = spans(request.versions, version, len(output))
            meta["weight_version"] = meta["weight_versions"][-1]["version"]
        if FAULTS.due("stale_answers"):
            meta |= {"weight_version": FAULTS.stale_version}
            whole = {"version": FAULTS.stale_version, "start": 0, "end": len(output)}
            meta |= {"weight_versions": [whole]} if not FAULTS.old else {}
        if request.return_logprob:
            chosen = zip(logprobs, output, strict=True)
            meta["output_token_logprobs"] = [[lp, token, None] for lp, token in chosen]
            meta["output_token_logprobs_length"] = len(output)
            ids = request.prompt[max(0, request.logprob_start) :]
            scored = zip(request.prompt_logprobs, ids, strict=False)
            meta["input_token_logprobs"] = [[lp, token, None] for lp, token in scored]
        meta["e2e_latency"] = time.perf_counter() - request.born
        meta["response_sent_to_client_ts"] = time.time()
        reply: dict[str, Any] = {"output_ids": output, "meta_info": meta}
        if self.decode is None:  # --skip-tokenizer-init
            return reply
        finish = request.finish or {}
        trim = finish["type"] == "stop" and not request.params.no_stop_trim
        shown = output[:-1] if trim else output
        return {"text": self.decode(shown, request.params.skip_special_tokens), **reply}

    # --- what it says about itself ---

    def _health(self) -> Reply:
        """Has anything come out of the scheduler, at worst one token of a request of its own?"""
        start, over = time.monotonic(), threading.Event()
        probe = SamplingParams(max_new_tokens=1, temperature=0.0)
        request = Request(f"HEALTH_CHECK_{uuid.uuid4().hex}", [0], probe, False, -1, 1)

        def ask() -> None:
            with contextlib.suppress(ConnectionError):
                self.scheduler.generate([request], lambda: not over.is_set())

        threading.Thread(target=ask, daemon=True).start()
        while time.monotonic() < start + FAULTS.health_timeout_s:
            time.sleep(0.05)
            if self.scheduler.last_output > start:
                over.set()
                self.scheduler.healthy = True
                return 200, ""
        over.set()
        self.scheduler.healthy = False
        return 503, ""

    def _ready(self) -> Reply:
        return 200 if self.scheduler.healthy and not self.scheduler.is_pause else 503, ""

    def _model_info(self) -> Reply:
        config = self.scheduler.model.config
        return 200, {
            "model_path": self.updates.model_path,
            "served_model_name": self.updates.model_path,
            "tokenizer_path": self.arguments["model_path"],
            "is_generation": True,
            "weight_version": self.scheduler.weight_version,
            "model_type": config["model_type"],
            "architectures": config["architectures"],
        }

    def _server_info(self) -> Reply:
        info = {
            "version": FAULTS.version,
            "status": "ready",
            "frontend": "python",
            "max_req_input_len": self.scheduler.context - 6,
            "internal_states": [{}],
        }
        return 200, self.arguments | info

    def _loads(self) -> Reply:
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        load = {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": waiting}
        return 200, {"loads": [load]}

    # --- control ---

    def _pause(self, body: dict[str, Any]) -> Reply:
        mode = body.get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise ValueError(f"mode: {mode!r}")
        self.scheduler.pause(mode)
        return 200, {"message": "Generation paused successfully.", "status": "ok"}

    def _continue(self, _body: dict[str, Any]) -> Reply:
        self.scheduler.resume()
        return 200, {"message": "Generation continued successfully.", "status": "ok"}

    def _abort(self, body: dict[str, Any]) -> Reply:
        rid, everything = body.get("rid") or "", bool(body.get("abort_all"))
        if rid or everything:
            self.scheduler.abort(rid, everything=everything)
        return 200, ""

    def _flush(self, _body: dict[str, Any]) -> Reply:
        with self.scheduler.lock:
            return (200, FLUSHED) if self.scheduler.flush() else (400, "Flush cache failed.\n")

    def _set_version(self, body: dict[str, Any]) -> Reply:
        version = body["new_version"]
        if body.get("abort_all_requests"):
            self.scheduler.abort(everything=True)
        with self.scheduler.lock:
            self.scheduler.set_version(version)
        message = f"Weight version updated to {version}"
        return 200, {"success": True, "message": message, "new_version": version}

    def _check_weights(self, body: dict[str, Any]) -> Reply:
        action = body.get("action", "checksum")
        if action != "checksum":
            return _told(False, f"Unsupported {action=}")
        with self.scheduler.lock:
            return 200, self.updates.checksum()

    def _from_tensor(self, body: dict[str, Any]) -> Reply:
        encoded = body["serialized_named_tensors"]
        payloads = [base64.b64decode(part, validate=True) for part in encoded]
        return _told(*self.updates.from_tensor(body, payloads))

    def _from_disk(self, body: dict[str, Any]) -> Reply:
        status, reply = _told(*self.updates.from_disk(body))
        return status, reply | {"num_paused_requests": 0}

    def _release(self, body: dict[str, Any]) -> Reply:
        scheduler = self.scheduler
        with scheduler.lock:
            if scheduler.running or (scheduler.waiting and not scheduler.engine_paused):
                die("release_memory_occupation should be called only when server is idle.")
            scheduler.released |= set(body.get("tags") or MEMORY)
            scheduler.flush()
        return 200, None

    def _resume(self, body: dict[str, Any]) -> Reply:
        with self.scheduler.lock:
            for tag in body.get("tags") or sorted(MEMORY):
                if tag not in self.scheduler.released:
                    die(f"KeyError: {tag!r}")
                self.scheduler.released.remove(tag)
        return 200, None

    def _faults(self, body: dict[str, Any]) -> Reply:
        FAULTS.change(body)
        return 200, {}


def spans(changes: list[tuple[str, int]], current: str, tokens: int) -> list[dict[str, Any]]:
    """Which version drew which tokens, from `changes` as (old version, tokens until then)."""
    found: list[dict[str, Any]] = []
    for version, end in [*changes, (current, tokens)]:
        end = min(end, tokens)  # noqa: PLW2901
        if found and end <= found[-1]["end"]:
            continue
        if found and version == found[-1]["version"]:
            found[-1]["end"] = end
        else:
            start = found[-1]["end"] if found else 0
            found.append({"version": version, "start": start, "end": end})
    return found


def _told(success: bool, message: str) -> Reply:
    return 200 if success else 400, {"success": success, "message": message}


def _error(message: str) -> Reply:
    return 400, {"error": {"message": message}}


class Server(ThreadingHTTPServer):
    """Connections of a whole batch at once."""

    daemon_threads = True
    request_queue_size = 2048

    def __init__(self, address: tuple[str, int], api: Api) -> None:
        self.api = api
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's
        print(format % args, flush=True)

    def do_GET(self) -> None:
        self._answer(self.server.api.get)

    def do_POST(self) -> None:
        self._answer(self.server.api.post)

    def _answer(self, endpoints: dict[str, Callable[..., Reply]]) -> None:
        api, path = self.server.api, urlsplit(self.path).path
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_post = self.command == "POST"
        try:
            if not api.may(path, self.headers.get("Authorization")):
                status, reply = 401, {"error": "Unauthorized"}
            elif is_post and path == "/generate":
                status, reply = api.generate(json.loads(data), self._connected)
            elif path in endpoints:
                status, reply = endpoints[path](*([json.loads(data or b"{}")] if is_post else []))
            elif path in api.get or path in api.post or path == "/generate":
                status, reply = 405, {"detail": "Method Not Allowed"}
            else:
                status, reply = 404, {"detail": "Not Found"}
        except BadRequest as bad:
            status, reply = bad.status, bad.body
        except (ValueError, KeyError, TypeError) as error:
            status, reply = 400, {"object": "error", "message": repr(error), "code": 400}
        except ConnectionError:
            self.close_connection = True
            return
        self._send(status, reply)

    def _send(self, status: int, reply: Any) -> None:
        text = isinstance(reply, str)
        body = reply.encode() if text else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if text else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True

    def _connected(self) -> bool:
        """Is the client still there? A closed connection reads as its end."""
        poll = select.poll()  # select() knows no descriptors from 1024 on
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(0):
            return True
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False
