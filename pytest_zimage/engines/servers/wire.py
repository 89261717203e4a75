"""Connections that show signs of life while they wait, and are given up when a request has had its time.

All of it happens in the thread that asks, so whatever ends a wait (Ctrl-C too) leaves neither a thread nor a socket.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

TICK_S = 0.5
"""Between two signs of life."""


class TimeIsUp(Exception):
    """A request has had all its time."""


class Deadline:
    """How long the request that is under way may still take."""

    def __init__(self, waited: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`waited` is called after every `TICK_S` of waiting; what it raises ends the request."""
        self._waited, self._clock = waited, clock
        self._until = 0.0

    def begin(self, limit_s: float) -> None:
        self._until = self._clock() + limit_s

    def left_s(self) -> float:
        """Raises `TimeIsUp` if there is nothing left."""
        left_s = self._until - self._clock()
        if left_s <= 0:
            raise TimeIsUp
        return left_s

    def tick(self) -> None:
        """Raises `TimeIsUp`, or what `waited` does."""
        self.left_s()
        self._waited()


class _Wire(httpcore.NetworkStream):
    """A stream whose limits are the deadline's, not those that it is called with."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            try:
                return self._stream.read(max_bytes, min(TICK_S, self._deadline.left_s()))
            except httpcore.ReadTimeout:
                self._deadline.tick()

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # How much of it went out before a limit is not told, so there is no second try and no sign of life.
        try:
            self._stream.write(buffer, self._deadline.left_s())
        except httpcore.WriteTimeout as error:
            raise TimeIsUp from error

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            return _Wire(self._stream.start_tls(ssl_context, server_hostname, self._deadline.left_s()), self._deadline)
        except httpcore.ConnectTimeout as error:
            raise TimeIsUp from error

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Wires(httpcore.NetworkBackend):
    """Makes the connections of a pool."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            stream = self._backend.connect_tcp(host, port, self._deadline.left_s(), local_address, socket_options)
        except httpcore.ConnectTimeout as error:
            raise TimeIsUp from error
        return _Wire(stream, self._deadline)
