"""The calls of a ComfyUI server that this engine makes.

A request that fails by accident is counted and made again, except that of a prompt: nobody knows whether it was taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec
from msgspec import Raw

from pytest_zimage.engines.comfyui.messages import (
    Accepted,
    Finished,
    ImageFile,
    NodeInfo,
    Queue,
    Refused,
    SystemStats,
)
from pytest_zimage.engines.comfyui.refusals import refusal
from pytest_zimage.engines.comfyui.slots import Graph
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.http import Http, StatusError
from pytest_zimage.errors import EngineError

_TRIES = 3
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")

T = TypeVar("T")


class ComfyUIApi:
    """One server, as one client of it. `faults` counts accidents by kind of requests that were made again."""

    def __init__(self, http: Http, what: str, client: str) -> None:
        self._http, self._what, self.client = http, what, client
        self.faults: dict[str, int] = {}

    def submit(self, graph: Graph, prompt_id: str) -> Accepted:
        """Queue a prompt. Raises `EngineError` with a sentence for each thing that is wrong with it.

        Servers before 0.3.50 give the prompt an id of their own.
        """
        body = {"prompt": graph, "client_id": self.client, "prompt_id": prompt_id}
        try:
            accepted = self._http.json("POST", "/prompt", Accepted, body)
        except StatusError as error:
            try:
                refused = msgspec.json.decode(error.body, type=Refused)
            except msgspec.MsgspecError:
                raise error from None
            raise refusal(self._what, graph, refused.error, refused.node_errors) from error
        # It becomes part of a path.
        if not _ID.fullmatch(accepted.prompt_id):
            raise EngineError(
                f"{self._what}: gives the prompt an id that is none: {accepted.prompt_id[:80]!r}",
                mend="its version may not be one that this was written for",
            )
        return accepted

    def finished(self, prompt_id: str) -> Finished | None:
        """What the history has of a prompt; None while it is not over, and for ever if it was deleted."""
        path = f"/history/{prompt_id}"
        return self._asked(lambda: self._http.json("GET", path, dict[str, Finished])).get(prompt_id)

    def has_drawn(self) -> bool:
        """Whether its history has a prompt, whoever sent it."""
        path = "/history"
        return bool(self._asked(lambda: self._http.json("GET", path, dict[str, Raw], params={"max_items": 1})))

    def queue(self, timeout_s: float | None = None) -> Queue:
        return self._asked(lambda: self._http.json("GET", "/queue", Queue, timeout_s=timeout_s))

    def withdraw(self, prompt_id: str, timeout_s: float) -> None:
        """Take a prompt out of the queue, and interrupt it if it runs."""
        self._tell("/queue", {"delete": [prompt_id]}, timeout_s)
        self._tell("/interrupt", {"prompt_id": prompt_id}, timeout_s)

    def free(self) -> None:
        """Have weights and cached results dropped: a flag, acted on when the server has nothing else to do."""
        self._tell("/free", {"unload_models": True, "free_memory": True})

    def view(self, file: ImageFile, max_bytes: int) -> bytes:
        """An image of its output folder."""
        where = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        try:
            return self._asked(lambda: self._http.raw("GET", "/view", max_bytes, where))
        except StatusError as error:
            raise EngineError(
                f"{self._what}: says that it saved {file.filename}, and has no such image: status {error.status}",
                mend="see whether something empties its output folder",
            ) from error

    def answers(self, timeout_s: float) -> bool:
        """Whether it serves requests by now."""
        try:
            self._http.json("GET", "/system_stats", SystemStats, timeout_s=timeout_s)
        except RequestFault:
            return False
        return True

    def stats(self) -> SystemStats:
        return self._asked(lambda: self._http.json("GET", "/system_stats", SystemStats))

    def choices(self, kind: str, name: str) -> tuple[str, ...]:
        """Values that the input `name` of the node class `kind` takes."""
        answer = self._asked(lambda: self._http.json("GET", f"/object_info/{kind}", dict[str, NodeInfo]))
        if kind not in answer:
            raise EngineError(
                f"{self._what}: has no node class {kind}", mend="update it, or install what has the class"
            )
        return answer[kind].choices(name)

    def log_text(self) -> str:
        """What it keeps of its log; empty where it does not tell."""
        try:
            return self._asked(lambda: self._http.json("GET", "/internal/logs", str))
        except EngineError:
            return ""

    def _tell(self, path: str, body: object, timeout_s: float | None = None) -> None:
        """Ask for what may as well be done twice."""
        self._asked(lambda: self._http.raw("POST", path, 4096, body=body, timeout_s=timeout_s))

    def _asked(self, ask: Callable[[], T]) -> T:
        for left in reversed(range(_TRIES)):
            try:
                return ask()
            except RequestFault as fault:
                if not left:
                    raise
                self.faults[fault.kind] = self.faults.get(fault.kind, 0) + 1
        raise AssertionError("unreachable")
