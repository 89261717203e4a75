"""The websocket on which a ComfyUI server tells one client what becomes of its prompts."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import msgspec
from websockets.exceptions import InvalidHandshake, WebSocketException
from websockets.sync.client import ClientConnection, connect

from pytest_zimage.engines.comfyui.messages import Event, event_decoder, message_decoder

_LONGEST = 8 << 20
"""Bytes of a message; previews and the state of a failed node stay below."""
_GREETING_S = 2.0
_DRAINED_S = 2.0
"""Longest time for reading away what is there already."""


class StreamLost(Exception):
    """The websocket is gone; what it would have told is in the history."""


class StreamRefused(StreamLost):
    """The server, or what is between, does not serve websockets."""


@dataclass(frozen=True)
class Told:
    """One event, and when it arrived here (seconds of `time.perf_counter`)."""

    type: str
    event: Event
    at: float


class EventStream:
    """A context manager; leaving it closes the socket. It is opened anew by `ensure_open` after it was lost."""

    def __init__(self, url: str, client: str, timeout_s: float) -> None:
        """`url` is the server's, with http or https; `timeout_s` limits connecting."""
        self._parts, self._client, self._timeout_s = urlsplit(url), client, timeout_s
        self._connection: ClientConnection | None = None
        self._stack = ExitStack()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ensure_open(self) -> None:
        """Raises `StreamLost`."""
        if self._connection is None:
            self._connection = self._connect()
            # Its first message says that it knows this client by now: what is told earlier would be told to nobody.
            self.receive(min(_GREETING_S, self._timeout_s))

    def drain(self) -> None:
        """Skip what was told of earlier prompts. Raises `StreamLost`, also where there is no end of it."""
        until = time.perf_counter() + _DRAINED_S
        while self._next(0.0) is not None:
            if time.perf_counter() > until:
                self.close()
                raise StreamLost(f"messages came without a pause for {_DRAINED_S:g} s")

    def receive(self, wait_s: float) -> Told | None:
        """The next event; None if none comes within `wait_s`. Raises `StreamLost`.

        Binary messages are previews, and texts that are none of its messages are of custom nodes: both are skipped.
        """
        until = time.perf_counter() + wait_s
        while (data := self._next(max(0.0, until - time.perf_counter()))) is not None:
            at = time.perf_counter()
            if isinstance(data, str):
                with suppress(msgspec.MsgspecError):
                    message = message_decoder.decode(data)
                    return Told(message.type, event_decoder.decode(message.data), at)
            # There may be no end of what is skipped.
            if at >= until:
                return None
        return None

    def _next(self, wait_s: float) -> str | bytes | None:
        if self._connection is None:
            raise StreamLost("not connected")
        try:
            return self._connection.recv(timeout=wait_s)
        except TimeoutError:
            return None
        except (OSError, WebSocketException) as error:
            self.close()
            raise StreamLost(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """Safe to call twice."""
        self._connection = None
        with suppress(OSError, WebSocketException):
            self._stack.close()

    def _connect(self) -> ClientConnection:
        secure = self._parts.scheme == "https"
        host, port = self._parts.hostname or "", self._parts.port or (443 if secure else 80)
        uri = self._parts._replace(
            scheme="wss" if secure else "ws", path=f"{self._parts.path}/ws", query=f"clientId={quote(self._client)}"
        ).geturl()
        try:
            # With a socket of our own there is no proxy from the environment, and no redirect is followed.
            sock = socket.create_connection((host, port), timeout=self._timeout_s)
        except OSError as error:
            raise StreamLost(str(error)) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connecting = connect(
                uri,
                sock=sock,
                compression=None,
                open_timeout=self._timeout_s,
                # A server that is busy loading answers no ping for a long time.
                ping_interval=None,
                close_timeout=1.0,
                max_size=_LONGEST,
            )
            return self._stack.enter_context(connecting)
        except (InvalidHandshake, ValueError) as error:
            sock.close()
            raise StreamRefused(f"{type(error).__name__}: {error}") from error
        except (OSError, WebSocketException) as error:
            sock.close()
            raise StreamLost(str(error) or type(error).__name__) from error
