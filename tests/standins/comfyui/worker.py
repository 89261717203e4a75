"""The stand-in's queue, cache, history and websockets: what outlives one prompt."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from execution import Execution
from faults import Faults
from logbook import Logbook

Row = list[Any]
"""`[number, prompt id, graph, extra data, outputs]`."""


class Worker:
    """One prompt at a time, as the documented `prompt_worker`."""

    def __init__(self, options: Any, log: Logbook, faults: Faults) -> None:
        self.options, self.log, self.faults = options, log, faults
        self.pending: list[Row] = []
        self.running: list[Row] = []
        self.history: dict[str, dict[str, Any]] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.fault_of: dict[str, dict[str, Any]] = {}
        """By prompt id."""
        self.cache: dict[str, Any] = {}
        """By the node's signature."""
        self.free = False
        self.interrupt = False
        self.saved: dict[str, tuple[str, bytes]] = {}
        """Folder and file of every picture, by its name."""
        self.fault_of_file: dict[str, dict[str, Any]] = {}
        self._wake = asyncio.Event()

    def put(self, row: Row) -> None:
        self.pending.append(row)
        self._wake.set()

    def set_free(self) -> None:
        self.free = True
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.pending:
                row = self.pending.pop(0)
                self.running.append(row)
                await self._one(row)
                self.running.remove(row)
            if self.free:
                self.free = False
                self.cache.clear()

    async def _one(self, row: Row) -> None:
        id, client = row[1], row[3].get("client_id", "")
        fault = self.fault_of.get(id, {})
        entry = await Execution(self, row, fault).run()
        self.interrupt = False
        if fault.get("fault") == "no_history":
            self.faults.count("no_history")
        else:
            self.history[id] = entry
        await self.broadcast_status()
        await self.send(client, "executing", {"node": None, "prompt_id": id})

    async def send(self, client: str, kind: str, data: dict[str, Any]) -> None:
        socket = self.sockets.get(client)
        if socket is not None and not socket.closed:
            try:
                if self.faults.script.get("noise") and kind != "status":
                    # A preview, a custom node's own text, and what becomes of somebody else's prompt.
                    await socket.send_bytes(b"\0\0\0\1\0\0\0\1\xff\xd8")
                    await socket.send_str("custom: not JSON")
                    await socket.send_json({"type": "custom", "data": {"node": ["odd"], "prompt_id": 5}})
                    await socket.send_json({"type": kind, "data": {**data, "prompt_id": "another", "node": None}})
                await socket.send_json({"type": kind, "data": data})
            except ConnectionError:
                self.sockets.pop(client, None)

    async def monitor(self) -> None:
        """What a custom node tells every client all the time, if the script says every how many seconds."""
        while True:
            every_s = self.faults.script.get("monitor_s")
            await asyncio.sleep(every_s or 0.05)
            for client in list(self.sockets) if every_s else ():
                await self.send(client, "crystools.monitor", {"cpu_utilization": 12.5, "gpus": []})

    async def broadcast_status(self) -> None:
        for client in list(self.sockets):
            await self.send(client, "status", {"status": self.queue_info()})

    def queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": len(self.pending) + len(self.running)}}
