"""One prompt of the stand-in: nodes in order, from the cache where they are in it, and every event told."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import nodes
import pictures

if TYPE_CHECKING:
    from worker import Row, Worker

_IN_SAMPLER = {
    "error",
    "out_of_memory",
    "die",
    "killed",
    "drop_websocket",
    "stuck",
    "stuck_hard",
    "interrupted",
    "stop",
}


class Interrupted(Exception):
    pass


class Execution:
    def __init__(self, worker: Worker, row: Row, fault: dict[str, Any]) -> None:
        self._worker, self._row, self._fault = worker, row, fault
        _, self._id, self._graph, extra, self._outputs = row
        self._name = fault.get("fault", "")
        self._client = extra.get("client_id", "")
        self._events: list[Any] = []
        self._shown: dict[str, Any] = {}
        self._node = ""

    async def run(self) -> dict[str, Any]:
        """The entry of the history."""
        worker, graph, success = self._worker, self._graph, False
        await self._tell("execution_start")
        try:
            await self._nodes()
            success = True
            await self._tell("execution_success")
        except Interrupted:
            await self._tell("execution_interrupted", **self._where(), executed=[])
        except (RuntimeError, MemoryError) as error:
            trace = ['  File "sampling.py", line 7, in sample\n', "    raise\n"]
            kind = "torch.OutOfMemoryError" if isinstance(error, MemoryError) else "RuntimeError"
            said = {"exception_message": f"{error}\n", "exception_type": kind, "traceback": trace}
            await self._tell("execution_error", **self._where(), executed=[], **said)
        keep = {nodes.signature(graph, node) for node in graph}
        worker.cache = {
            key: value for key, value in worker.cache.items() if key in keep and not worker.options.cache_none
        }
        done = {"status_str": "success" if success else "error", "completed": success, "messages": self._events}
        entry = {"prompt": self._row, "outputs": self._shown, "status": done, "meta": {}}
        if change := self._fault.get("history"):
            worker.faults.count(self._name)
            _merge(entry, change)
        if "outputs" in self._fault:
            worker.faults.count(self._name)
            entry["outputs"] = self._fault["outputs"]
        return entry

    async def _nodes(self) -> None:
        graph, cache = self._graph, self._worker.cache
        order = nodes.order(graph, self._outputs)
        if self._name == "loads_again":
            self._worker.faults.count(self._name)
            cache.clear()
        cached = [id for id in order if nodes.signature(graph, id) in cache]
        if self._name == "cached" and self._worker.saved:
            self._worker.faults.count(self._name)
            cached = order
            file, (folder, _) = list(self._worker.saved.items())[-1]
            cache |= {nodes.signature(graph, id): _shown(file, folder) for id in self._outputs}
        await self._tell("execution_cached", nodes=cached)
        for self._node in order:
            key = nodes.signature(graph, self._node)
            if self._node not in cached:
                await self._state(0, 1)
                running = {"node": self._node, "display_node": self._node, "prompt_id": self._id}
                await self._send("executing", running)
                cache[key] = await self._compute(graph[self._node]["class_type"], graph[self._node]["inputs"])
            if nodes.KINDS[graph[self._node]["class_type"]].output:
                self._shown[self._node] = cache[key]
                await self._send("executed", {"node": self._node, "output": cache[key], "prompt_id": self._id})

    async def _compute(self, kind: str, inputs: dict[str, Any]) -> Any:
        """What the cache holds of the node from now on."""
        if kind in ("UNETLoader", "CLIPLoader", "VAELoader"):
            options = self._worker.options
            await asyncio.sleep(options.load_ms / 1000)
            self._worker.log.loaded(kind)
            if kind == "UNETLoader" and "log" in self._fault:
                self._worker.faults.count(self._name)
                self._worker.log.say(self._fault["log"])
            name = next(name for name in nodes.FILES if name in inputs)
            return options.path_of(name, inputs[name]).read_bytes()
        if kind == "KSampler":
            await self._sample(inputs["steps"])
        elif "images" in inputs:
            folder, _, name = inputs.get("filename_prefix", "ComfyUI_temp").rpartition("/")
            # Counted on from what is there, as the real one does.
            file = f"{name}_{1 + sum(one.startswith(f'{name}_') for one in self._worker.saved):05}_.png"
            if "warns" in self._fault:
                self._worker.faults.count(self._name)
                self._worker.log.warn(self._fault["warns"])
            rgb, width, height = pictures.picture(self._graph, plain_cast=self._worker.options.plain_cast)
            if self._name == "black":
                self._worker.faults.count("black")
                self._worker.log.warn("nodes.py:1611: RuntimeWarning: invalid value encountered in cast")
                rgb = bytes(len(rgb))
            self._worker.saved[file] = folder, pictures.png(rgb, width, height)
            self._worker.fault_of_file[file] = self._fault
            return _shown(file, folder)
        return True

    async def _sample(self, steps: int) -> None:
        told_s, told = 0.0, 0
        for step in range(1, steps + 1):
            await asyncio.sleep(self._worker.options.step_ms / 1000)
            if step == 2:
                await self._go_wrong()
            if self._worker.interrupt:
                raise Interrupted
            now = time.monotonic()
            # Throttled as the real one: 100 ms and half a percent, first and last always.
            if step in (1, steps) or (now - told_s >= 0.1 and (step - told) / steps >= 0.005):
                told_s, told = now, step
                ticked = {"value": step, "max": steps, "prompt_id": self._id, "node": self._node}
                await self._state(step, steps)
                await self._send("progress", ticked)

    async def _go_wrong(self) -> None:
        worker, name = self._worker, self._name
        if name in _IN_SAMPLER:
            worker.faults.count(name)
        if name == "error":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        if name == "out_of_memory":
            raise MemoryError("Allocation on device 0 would exceed allowed memory")
        if name == "die":
            worker.log.say("Fatal: the driver is gone")
            os._exit(3)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if name == "interrupted":
            worker.interrupt = True
        if name == "drop_websocket" and (socket := worker.sockets.pop(self._client, None)) is not None:
            request = socket._req
            assert request is not None
            assert request.transport is not None
            request.transport.abort()
        while name == "stuck_hard" or (name == "stuck" and not worker.interrupt):
            await asyncio.sleep(0.01)

    def _where(self) -> dict[str, Any]:
        return {"node_id": self._node, "node_type": self._graph[self._node]["class_type"]}

    async def _state(self, value: float, most: float) -> None:
        """What newer versions tell beside `executing` and `progress`, with the nodes as a table."""
        id = self._node
        node = {"value": value, "max": most, "state": "running", "node_id": id, "prompt_id": self._id}
        node |= {"display_node_id": id, "parent_node_id": None, "real_node_id": id}
        await self._send("progress_state", {"prompt_id": self._id, "nodes": {id: node}})

    async def _tell(self, kind: str, **data: Any) -> None:
        """An event that the history keeps too."""
        stamped = {"prompt_id": self._id, **data, "timestamp": int(time.time() * 1000)}
        self._events.append([kind, stamped])
        await self._send(kind, stamped)

    async def _send(self, kind: str, data: dict[str, Any]) -> None:
        await self._worker.send(self._client, kind, data)


def _shown(file: str, folder: str) -> dict[str, Any]:
    return {"images": [{"filename": file, "subfolder": folder, "type": "output"}]}


def _merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
