"""The stand-in's routes, as the documented API has them, and those by which a test sets its faults."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from typing import Any

import nodes
from aiohttp import WSMsgType, web
from worker import Worker

ROUTES = web.RouteTableDef()
WORKER = web.AppKey("worker", Worker)
VERSION = "0.33.0"


@web.middleware
async def starting(request: web.Request, handler: Any) -> web.StreamResponse:
    """503 for the first requests of a server that is not ready yet."""
    start = request.app[WORKER].faults.start
    if start.get("busy", 0) > 0:
        start["busy"] -= 1
        return web.Response(status=503)
    return await handler(request)


def _is_canonical(id: Any) -> bool:
    try:
        return str(uuid.UUID(id)) == id
    except (ValueError, AttributeError, TypeError):
        return False


async def _go_wrong(request: web.Request, fault: dict[str, Any], place: str) -> web.Response | None:
    """Drop, refuse or never answer, if `fault` is one of `place`, and that only once."""
    kind, _, where = fault.get("fault", "").partition("_")
    if where != place:
        return None
    request.app[WORKER].faults.count(fault.pop("fault"))
    if kind == "drop":
        assert request.transport is not None
        request.transport.abort()
    if kind == "hang":
        await asyncio.sleep(3600)
    return web.Response(status=int(kind) if kind.isdecimal() else 500, text="Internal Server Error")


@ROUTES.post("/prompt")
async def prompt(request: web.Request) -> web.Response:
    worker = request.app[WORKER]
    body = await request.json()
    fault = worker.faults.next()
    if (answer := await _go_wrong(request, fault, "post")) is not None:
        return answer
    if answered := fault.get("answer"):
        worker.faults.count(fault["fault"])
        return web.json_response(answered, status=fault.get("status", 400))
    if "prompt" not in body:
        error = nodes.problem("no_prompt", "No prompt provided", "No prompt provided")
        return web.json_response({"error": error, "node_errors": {}}, status=400)
    graph = body["prompt"]
    error, node_errors, outputs = nodes.check_graph(graph, worker.options.files())
    if error is not None:
        return web.json_response({"error": error, "node_errors": node_errors}, status=400)
    id = str(uuid.uuid4()) if worker.options.own_ids else body.get("prompt_id", str(uuid.uuid4()))
    if not _is_canonical(id):
        said = "prompt_id must be a canonical UUID"
        return web.json_response(
            {"error": nodes.problem("invalid_prompt_id", said, str(id)), "node_errors": {}}, status=400
        )
    extra = {"create_time": int(time.time() * 1000), "client_id": body.get("client_id", "")}
    worker.fault_of[id] = fault
    if fault.get("fault") == "deleted":
        worker.faults.count("deleted")
    else:
        worker.put([0, id, graph, extra, outputs])
    if fault.get("fault") == "node_errors":
        worker.faults.count("node_errors")
        node_errors = fault["node_errors"]
    if (answer := await _go_wrong(request, fault, "answer")) is not None:
        return answer
    return web.json_response({"prompt_id": id, "number": 0, "node_errors": node_errors})


@ROUTES.get("/prompt")
async def get_prompt(request: web.Request) -> web.Response:
    return web.json_response(request.app[WORKER].queue_info())


@ROUTES.get("/queue")
async def get_queue(request: web.Request) -> web.Response:
    worker = request.app[WORKER]
    return web.json_response({"queue_running": worker.running, "queue_pending": worker.pending})


@ROUTES.post("/queue")
async def post_queue(request: web.Request) -> web.Response:
    worker, body = request.app[WORKER], await request.json()
    deleted = set(body.get("delete", []))
    worker.pending[:] = [row for row in worker.pending if not body.get("clear") and row[1] not in deleted]
    return web.Response()


@ROUTES.post("/interrupt")
async def interrupt(request: web.Request) -> web.Response:
    worker, body = request.app[WORKER], await request.json()
    wanted = body.get("prompt_id")
    if worker.running and (not wanted or wanted == worker.running[0][1]):
        worker.interrupt = True
    return web.Response()


@ROUTES.post("/free")
async def free(request: web.Request) -> web.Response:
    if (await request.json()).get("free_memory"):
        request.app[WORKER].set_free()
    return web.Response()


@ROUTES.get("/history")
async def histories(request: web.Request) -> web.Response:
    history = list(request.app[WORKER].history.items())
    return web.json_response(dict(history[: int(request.query.get("max_items", len(history)))]))


@ROUTES.get("/history/{id}")
async def history(request: web.Request) -> web.Response:
    worker, id = request.app[WORKER], request.match_info["id"]
    if (
        id in worker.history
        and (answer := await _go_wrong(request, worker.fault_of.get(id, {}), "history")) is not None
    ):
        return answer
    return web.json_response({id: worker.history[id]} if id in worker.history else {})


@ROUTES.get("/view")
async def view(request: web.Request) -> web.Response:
    worker, file = request.app[WORKER], request.query["filename"]
    if file not in worker.saved or worker.saved[file][0] != request.query.get("subfolder", ""):
        return web.Response(status=404)
    fault = worker.fault_of_file[file]
    if (answer := await _go_wrong(request, fault, "view")) is not None:
        return answer
    if "view" in fault:
        worker.faults.count(fault["fault"])
        body = bytes.fromhex(fault["view"]) * fault.get("times", 1)
        return web.Response(body=body, status=fault.get("view_status", 200), content_type="image/png")
    return web.Response(body=worker.saved[file][1], content_type="image/png")


@ROUTES.get("/object_info/{kind}")
async def object_info(request: web.Request) -> web.Response:
    kind = request.match_info["kind"]
    if kind not in nodes.KINDS:
        return web.json_response({})
    files = request.app[WORKER].options.files()
    required = {
        # Lists in the old form, numbers by their type: the real one mixes both.
        name: [files[nodes.FILES[name]] if name in nodes.FILES else wanted, {}]
        for name, wanted in nodes.KINDS[kind].inputs.items()
    }
    return web.json_response(
        {kind: {"input": {"required": required}, "name": kind, "output": [nodes.KINDS[kind].gives]}}
    )


@ROUTES.get("/system_stats")
async def system_stats(request: web.Request) -> web.Response:
    packages = [{"name": "comfy-kitchen", "installed": "0.2.40", "required": "0.2.40"}]
    system = {
        "os": sys.platform,
        "comfyui_version": VERSION,
        "python_version": sys.version,
        "pytorch_version": "2.11.0+cpu",
        "argv": sys.argv,
        "comfy_package_versions": packages,
    }
    gpu = request.app[WORKER].options.gpu
    named = {"name": f"cuda:0 {gpu} : native", "type": "cuda", "index": 0} if gpu else {"name": "cpu", "type": "cpu"}
    device = {"index": None, **named, "vram_total": 1 << 30, "vram_free": 1 << 29}
    return web.json_response({"system": system, "devices": [device]})


@ROUTES.get("/internal/logs")
async def logs(request: web.Request) -> web.Response:
    return web.json_response("".join(request.app[WORKER].log.lines))


@ROUTES.get("/ws")
async def websocket(request: web.Request) -> web.StreamResponse:
    worker, client = request.app[WORKER], request.query.get("clientId", uuid.uuid4().hex)
    if worker.faults.script.get("no_websocket"):
        return web.Response(status=404)
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    worker.sockets[client] = socket
    await worker.send(client, "status", {"status": worker.queue_info(), "sid": client})
    async for message in socket:
        if message.type == WSMsgType.ERROR:
            break
    if worker.sockets.get(client) is socket:
        del worker.sockets[client]
    return socket


@ROUTES.post("/standin/faults")
async def set_faults(request: web.Request) -> web.Response:
    request.app[WORKER].faults.set(await request.json())
    return web.Response()


@ROUTES.post("/standin/log")
async def lose_log(request: web.Request) -> web.Response:
    """What was logged so far is lost, as the oldest entries of the real one are."""
    request.app[WORKER].log.lines.clear()
    return web.Response()


@ROUTES.post("/standin/queue")
async def fill_queue(request: web.Request) -> web.Response:
    """Prompts of others, which stay where they are."""
    worker, body = request.app[WORKER], await request.json()
    rows = [[0, str(uuid.uuid4()), {}, {"client_id": "someone"}, []] for _ in range(body["running"] + body["waiting"])]
    worker.running[:], worker.pending[:] = rows[: body["running"]], rows[body["running"] :]
    return web.Response()


@ROUTES.get("/standin")
async def standin(request: web.Request) -> web.Response:
    worker = request.app[WORKER]
    return web.json_response(
        {"counts": worker.faults.counts, "sockets": len(worker.sockets), "history": list(worker.history)}
    )
