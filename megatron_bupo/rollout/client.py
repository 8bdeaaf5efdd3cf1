"""One SGLang server's HTTP API, in the dialect of its version. No sglang import.

Every call ends in a reply or a `ServerError`: `Unreachable` where the connection failed or took too
long (another server may do better), `Refused` where the server answered that it will not.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_bupo.errors import InputError

OLDEST = (0, 5, 4)  # pauses and weight versions came shortly before
SESSIONS_SINCE = SPANS_SINCE = (0, 5, 23)
CONTROL_TIMEOUT_S = 120.0  # for calls that neither generate nor carry weights
# Of a connection that is used again. The server closes it after 5 s, and a request sent at that
# moment looks like a server that is lost.
IDLE_S = 2.0


class ServerError(Exception):
    """A server did not do what it was asked to."""


class Unreachable(ServerError):
    """No answer: the server is gone, or too slow."""


class Refused(ServerError):
    """The server answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


@dataclass(frozen=True)
class ServerFacts:
    """What a server says about itself."""

    version: str
    tp_size: int
    device: str
    dtype: str  # as it was told: auto is the checkpoint's
    context_tokens: int | None  # None: the model's
    cache_tokens: int | None  # of all that is under way
    deterministic: bool
    gives_memory: bool  # on request, and takes it back with the weights that were in it

    def most_tokens(self, model_context: int) -> int:
        """Of a prompt with its response. A longer response ends early, as if it had been asked to.

        Two less than fit: SGLang keeps one free in its cache and one in the context.
        """
        return min(self.context_tokens or model_context, self.cache_tokens or model_context) - 2

    @property
    def has_sessions(self) -> bool:
        """Do weight updates stand between /begin_weight_update and /end_weight_update?"""
        return _numbers(self.version) >= SESSIONS_SINCE

    @property
    def tells_spans(self) -> bool:
        """Does it say which weights drew which token?"""
        return _numbers(self.version) >= SPANS_SINCE


class ServerClient:
    """Calls to the server at `address`. All methods belong to one event loop."""

    def __init__(self, address: str, api_key: str | None = None) -> None:
        self.address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str, *, timeout_s: float = CONTROL_TIMEOUT_S) -> Any:
        """The JSON that `path` answers with."""
        return await self._call("GET", path, None, timeout_s)

    async def post(
        self, path: str, body: dict[str, Any] | bytes, *, timeout_s: float = CONTROL_TIMEOUT_S
    ) -> Any:
        """What `path` answers to `body` (bytes: JSON already); an answer that says `success: false`
        is a refusal.
        """
        return await self._call("POST", path, body, timeout_s)

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | bytes | None, timeout_s: float
    ) -> Any:
        if self._session is None:
            # A batch is in flight all at once.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        try:
            async with self._session.request(
                method,
                self.address + path,
                # aiohttp copies what a socket does not take at once, but a file it reads in pieces.
                data=io.BytesIO(body) if isinstance(body, bytes) else _serialised(body),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                text = await response.read()
                status = response.status
        except TimeoutError:
            raise Unreachable(f"no answer to {path} within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{path}: {type(error).__name__}: {error}") from None
        reply = _parse(text)
        refusal = isinstance(reply, dict) and reply.get("success") is False
        if status >= 300 or refusal:
            raise Refused(status, f"{path}: {_message(reply)}")
        return reply

    async def facts(self) -> ServerFacts:
        """What the server is; an InputError if it is too old to be driven."""
        info = await self._either("/server_info", "/get_server_info")
        version = str(info.get("version", "unknown"))
        if _numbers(version) < OLDEST:
            raise InputError(
                f"the server at {self.address}",
                f"is SGLang {version}, which this client does not speak",
                f"install sglang>={'.'.join(map(str, OLDEST))} there (0.5.23 is tested)",
            )
        return ServerFacts(
            version=version,
            tp_size=int(info.get("tp_size") or 1),
            device=str(info.get("device", "cuda")),
            dtype=str(info.get("dtype", "auto")),
            context_tokens=info.get("context_length"),
            cache_tokens=info.get("max_total_num_tokens"),
            deterministic=bool(info.get("enable_deterministic_inference", False)),
            gives_memory=all(
                info.get(name) for name in ("enable_memory_saver", "enable_weights_cpu_backup")
            ),
        )

    async def weight_version(self) -> str:
        """The version that its weights were last said to be."""
        info = await self._either("/model_info", "/get_model_info")
        return str(info.get("weight_version"))

    async def _either(self, path: str, older: str) -> dict[str, Any]:
        """The reply of `path`, or where there is none yet of its name in older releases."""
        try:
            reply = await self.get(path)
        except Refused as error:
            if error.status != 404:
                raise
            reply = await self.get(older)
        if not isinstance(reply, dict):
            raise ServerError(f"{path} does not answer as SGLang does, but {str(reply)[:80]!r}")
        return reply

    async def healthy(self, *, timeout_s: float) -> bool:
        """Does it generate? Takes about a second, and no time from a server that is busy."""
        try:
            await self.get("/health", timeout_s=timeout_s)
        except ServerError:
            return False
        return True


def _serialised(body: dict[str, Any] | None) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.decode(errors="replace")


def _message(reply: Any) -> str:
    """The sentence in an error's body, wherever that release puts it."""
    if isinstance(reply, dict):
        inner = reply.get("error", reply.get("message", reply))
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return str(reply)[:500]


def _numbers(version: str) -> tuple[int, ...]:
    """`0.5.23rc1` -> (0, 5, 23); of what is no version nothing, which is older than all."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, found[1].split("."))) if found else ()
