"""One prompt from the queue to the history: by the websocket, and by asking where that is silent or lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from pytest_zimage.engines.comfyui.api import ComfyUIApi
from pytest_zimage.engines.comfyui.messages import Finished
from pytest_zimage.engines.comfyui.stream import EventStream, StreamLost
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.errors import EngineError

_LOOK_S = 1.0
"""Silence after which the queue and the history are asked."""
_POLL_S = 0.05
_HISTORY_S = 5.0
"""The history is written before the end is told; so long it may still be missing."""
_ENDS = ("execution_success", "execution_error", "execution_interrupted")

Ticked = Callable[[int, int], None]


@dataclass
class Followed:
    """What became of a prompt."""

    finished: Finished
    nodes_s: dict[str, float] | None
    """Seconds of each node that ran, from its start to that of the next one, as they arrived here; None: not told."""


@dataclass
class _Timeline:
    """Arrivals of `executing`, and of the end."""

    marks: list[tuple[str, float]] = field(default_factory=list)
    end: float | None = None

    def seconds(self) -> dict[str, float] | None:
        if self.end is None:
            return None
        found: dict[str, float] = {}
        for (node, at), (_, until) in pairwise([*self.marks, ("", self.end)]):
            found[node] = found.get(node, 0.0) + until - at
        return found


class Follower:
    """Follows prompts of one client."""

    def __init__(
        self,
        api: ComfyUIApi,
        stream: EventStream | None,
        what: str,
        *,
        timeout_s: float,
        check: Callable[[], None],
        ticked: Ticked,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`stream` None: this server has none. `timeout_s` is the longest silence of a prompt.

        `check` raises if the server is dead; `ticked` gets the steps of the sampler, and (0, 0) for a sign of life.
        """
        self._api, self._stream, self._what = api, stream, what
        self._timeout_s, self._check, self._ticked, self._sleep = timeout_s, check, ticked, sleep

    def follow(self, prompt_id: str) -> Followed:
        """Wait until the prompt is over, however it ended.

        Raises `RequestFault` for one that is silent for too long, and `EngineError` for one that was deleted and for a
        server that has died.
        """
        timeline = _Timeline()
        if self._stream is not None:
            try:
                self._listen(self._stream, prompt_id, timeline)
            except StreamLost:
                # Some of its nodes are not told any more.
                timeline = _Timeline()
        return Followed(self._await_history(prompt_id, told=timeline.end is not None), timeline.seconds())

    def _listen(self, stream: EventStream, prompt_id: str, timeline: _Timeline) -> None:
        """Until the end is told, or the history has it."""
        look_s = min(_LOOK_S, self._timeout_s)
        absent, last_sign, looked = 0, time.monotonic(), time.monotonic()
        while True:
            told = stream.receive(look_s)
            if told is None or told.event.prompt_id != prompt_id:
                # What is told of others, such as a monitor's figures, is no sign of this prompt.
                if time.monotonic() - looked >= look_s:
                    looked = time.monotonic()
                    self._check()
                    self._ticked(0, 0)
                    if self._api.finished(prompt_id) is not None:
                        return
                    absent = self._absent(prompt_id, absent)
                    self._refuse_silence(prompt_id, last_sign)
                continue
            last_sign = looked = time.monotonic()
            if told.type == "executing":
                if told.event.node is None:
                    timeline.end = timeline.end or told.at
                    return
                timeline.marks.append((told.event.node, told.at))
            elif told.type == "progress":
                self._ticked(int(told.event.value), int(told.event.max))
            elif told.type in _ENDS:
                timeline.end = told.at

    def _await_history(self, prompt_id: str, *, told: bool) -> Finished:
        """Ask until it is there; `told`: it is over already, and must be."""
        absent, began, looked = 0, time.monotonic(), time.monotonic()
        while (finished := self._api.finished(prompt_id)) is None:
            self._check()
            now = time.monotonic()
            if told and now - began > min(_HISTORY_S, self._timeout_s):
                raise EngineError(
                    f"{self._what}: says that prompt {prompt_id} is over, and has nothing of it in its history",
                    mend="see whether something clears its history",
                )
            if now - looked > min(_LOOK_S, self._timeout_s / 4):
                looked = now
                self._ticked(0, 0)
                absent = 0 if told else self._absent(prompt_id, absent)
                self._refuse_silence(prompt_id, began)
            self._sleep(_POLL_S)
        return finished

    def _absent(self, prompt_id: str, before: int) -> int:
        """How many looks in a row have found it nowhere. On its way to the history a prompt may be in neither once."""
        if prompt_id in self._api.queue():
            return 0
        if before and self._api.finished(prompt_id) is None:
            raise EngineError(
                f"{self._what}: prompt {prompt_id} is neither in its queue nor in its history: it was deleted",
                mend="leave the server's queue alone while it is measured, or let one be started: --zimage-comfyui-dir",
            )
        return before + 1

    def _refuse_silence(self, prompt_id: str, since: float) -> None:
        if time.monotonic() - since > self._timeout_s:
            raise RequestFault(
                "timeout", f"{self._what}: nothing was heard of prompt {prompt_id} for {self._timeout_s:g} s"
            )
