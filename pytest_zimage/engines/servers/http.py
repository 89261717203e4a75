"""What is said to a server over HTTP: bounded in time and size, typed, and every accident told from a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlencode

import httpcore
import msgspec

from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.wire import Deadline, TimeIsUp, Wires
from pytest_zimage.errors import EngineError

JSON_BYTES = 16 << 20
"""The longest JSON that is read; a queue or a history with whole workflows in it stays far below."""
_KEPT_S = 2.0
"""Idle connections are not used again after this: a server that closes them does so after 5 s or more."""
_SHOWN = 500
"""Characters of a reply that an error quotes."""

T = TypeVar("T")
Value = str | int


class StatusError(EngineError):
    """An answer with a status that was not accepted: the server understood, and refuses."""

    def __init__(self, status: int, body: str, message: str, *, mend: str = "") -> None:
        super().__init__(message, mend=mend)
        self.status = status
        self.body = body
        """All of it, however little of it is JSON; at most `JSON_BYTES`."""


class Http:
    """One server's HTTP interface, for one thread. A context manager: leaving it closes every socket.

    Neither proxies nor credentials are taken from the environment, and no redirect is followed. Every request raises
    `RequestFault` for an accident that may not happen again (`dropped connection`, `timeout`, `status 5xx`),
    `StatusError` for another status than accepted, and `EngineError` for an answer that is too long or not what it
    should be.
    """

    def __init__(
        self,
        url: str,
        *,
        what: str,
        timeout_s: float,
        check: Callable[[], None] = lambda: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`what` names the server in messages; `timeout_s` limits each request from start to last byte.

        `check` is called when a request fails and while one waits, and raises if the server is dead; `waiting` shows a
        sign of life, twice a second while a request waits.
        """
        self.url = url.rstrip("/")
        self._what, self._timeout_s = what, timeout_s
        self._check, self._waiting = check, waiting
        self._deadline = Deadline(self._waited)
        self._pool = httpcore.ConnectionPool(network_backend=Wires(self._deadline), keepalive_expiry=_KEPT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def json(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: object = None,
        accept: Collection[int] = (200,),
        *,
        params: Mapping[str, Value] | None = None,
        timeout_s: float | None = None,
        max_bytes: int = JSON_BYTES,
    ) -> T:
        """The answer as `kind`, any type that msgspec decodes; `body` is sent as JSON unless None."""
        data = self.raw(method, path, max_bytes, params, body=body, accept=accept, timeout_s=timeout_s)
        return self.typed(method, path, data, kind)

    def typed(self, method: str, path: str, data: bytes, kind: type[T]) -> T:
        """`data`, which `raw` gave for that request, as `kind`: apart where reading it must not count as waiting."""
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(
                f"{self._what}: {method} {path}: the answer is not what it should be: {error}: {_quoted(data)}",
                mend="its version may not be one that this was written for",
            ) from error

    def raw(
        self,
        method: str,
        path: str,
        max_bytes: int,
        params: Mapping[str, Value] | None = None,
        *,
        body: object = None,
        accept: Collection[int] = (200,),
        timeout_s: float | None = None,
    ) -> bytes:
        """The answer as it came, at most `max_bytes` of it; `body` is sent as JSON unless None."""
        where = f"{self._what}: {method} {path}"
        target = f"{self.url}{path}?{urlencode(params)}" if params else self.url + path
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        self._deadline.begin(limit_s)
        try:
            status, data = self._exchange(method, target, body, where, max_bytes)
        except TimeIsUp as error:
            self._check()
            raise RequestFault("timeout", f"{where}: no whole answer within {limit_s:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            self._check()
            reason = str(error) or type(error).__name__
            raise RequestFault("dropped connection", f"{where}: the connection was dropped: {reason}") from error
        if status in accept:
            return data
        message = f"{where}: status {status}: {_quoted(data)}"
        if status >= 500:
            self._check()
            raise RequestFault(f"status {status}", message)
        raise StatusError(status, data.decode(errors="replace"), message)

    def close(self) -> None:
        """Close every socket; safe to call twice."""
        self._pool.close()

    def _exchange(self, method: str, target: str, body: object, where: str, max_bytes: int) -> tuple[int, bytes]:
        # What is not unpacked cannot grow.
        headers: dict[bytes | str, bytes | str] = {"Accept-Encoding": "identity"}
        content = None if method == "GET" else b""
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = msgspec.json.encode(body)
        with self._pool.stream(method, target, headers=headers, content=content) as response:
            data = bytearray()
            for chunk in response.iter_stream():
                data += chunk
                if len(data) > max_bytes:
                    raise EngineError(f"{where}: the answer is longer than {max_bytes} bytes")
            return response.status, bytes(data)

    def _waited(self) -> None:
        self._check()
        self._waiting()


def _quoted(data: bytes) -> str:
    text = data[: 4 * _SHOWN].decode(errors="replace")
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
