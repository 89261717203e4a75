"""Requests that fail by accident: counted, made anew within bounds, never a sample."""

from __future__ import annotations

from pytest_zimage.errors import EngineError


class RequestFault(EngineError):
    """One request that went wrong while the server may be well: it may be made again.

    `kind` is what it is counted as: `dropped connection`, `status 500`, `timeout`.
    """

    def __init__(self, kind: str, message: str, *, mend: str = "") -> None:
        super().__init__(message, mend=mend)
        self.kind = kind
