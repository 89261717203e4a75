"""A stand-in of vLLM-Omni, from its documented interface: `python vllm_omni_server.py SCRIPT serve MODEL --omni ...`.

It draws no real picture, and fails in the ways that the script says.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image
from vllm_omni_script import Script, encoded, picture

HEAVY_BYTES = 64 << 20


class Server:
    """One server with one model."""

    def __init__(self, script: Script, arguments: argparse.Namespace) -> None:
        self.script, self.arguments = script, arguments
        self.model = script.served or arguments.model
        self.looks = 0
        self.number = 0
        self.waited = 0
        self.turn = asyncio.Lock()
        self.last: bytes | None = None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/images/generations", self.generate)
        return app

    async def health(self, request: web.Request) -> web.Response:
        self.looks += 1
        if self.looks <= self.script.health_503:
            return web.json_response({"status": "unhealthy", "reason": "No engine initialized"}, status=503)
        return web.json_response({"status": "healthy"})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.script.vllm_version or self.script.version})

    async def models(self, request: web.Request) -> web.Response:
        card = {"id": self.model, "object": "model", "owned_by": "vllm", "root": self.model, "permission": []}
        return web.json_response({"object": "list", "data": [card]})

    async def metrics(self, request: web.Request) -> web.Response:
        lines = ["# TYPE vllm_omni:requests_success counter", f"vllm_omni:requests_success_total {self.waited}"]
        script = self.script
        histograms = {"vllm_omni:e2e_request_latency_s": script.queue_s + script.draw_s}
        if script.release >= (0, 28):
            histograms["vllm_omni:request_queue_wait_s"] = script.queue_s
        for name, each_s in histograms.items() if script.counts else ():
            lines.append(f"# TYPE {name} histogram")
            # With labels, it has no figure before its first observation.
            if self.waited:
                lines += [
                    f'{name}_bucket{{stage="0",le="+Inf"}} {float(self.waited)}',
                    f'{name}_count{{stage="0"}} {float(self.waited)}',
                    f'{name}_sum{{stage="0"}} {self.waited * each_s}',
                ]
        return web.Response(text="\n".join(lines) + "\n")

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.number += 1
        body = await request.json()
        fault = self.script.fault(self.number)
        self.record({"request": body, "fault": fault})
        if body.get("model") not in (None, self.model):
            return refused(400, f"Model mismatch: request specifies '{body['model']}' but server runs '{self.model}'.")
        if fault.isdigit():
            code = int(fault)
            return refused(code, "Image generation failed: CUDA error" if code >= 500 else "steps: too many")
        if fault == "die":
            print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", flush=True)
            os._exit(137)
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        async with self.turn:
            answer = await self.drawn(body, fault)
        self.waited += 1 + self.script.others
        if fault == "cut":
            return await cut(request, json.dumps(answer).encode())
        if fault == "oversize":
            return await oversize(request)
        return web.Response(
            text="<html>" if fault == "no-json" else json.dumps(answer), content_type="application/json"
        )

    async def drawn(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        script = self.script
        began = time.perf_counter()
        guidance = script.guidance(body.get("guidance_scale"))
        await asyncio.sleep(script.draw_s * (2 if guidance else 1))
        device = body.get("generator_device", "cuda") if script.release >= (0, 16) else "cuda"
        arguments = self.arguments
        weights = " ".join(map(str, (self.model, arguments.quantization_config, arguments.backend)))
        image = picture(body, guidance, device, weights)
        if fault == "black":
            image = Image.new("RGB", image.size)
        if fault == "size":
            image = image.resize((image.width // 2, image.height))
        file = encoded(image, "JPEG" if fault == "jpeg" else "PNG")
        if fault == "same" and self.last is not None:
            file = self.last
        self.last = file
        text = "!" * 64 if fault == "bad-base64" else base64.b64encode(file).decode()
        answer: dict[str, Any] = {
            "created": int(time.time()),
            "data": [{"b64_json": text, "url": None, "revised_prompt": None}],
            "output_format": "png",
            "size": "16x16" if fault == "size-field" else body["size"],
        }
        if fault == "none":
            answer["data"] = []
        if fault == "two":
            answer["data"] *= 2
        if script.release >= (0, 26) and script.metrics and fault != "no-metrics":
            answer["metrics"] = self.figures(time.perf_counter() - began)
        return answer

    def figures(self, seconds: float) -> dict[str, Any]:
        parts = {"forward": 1.0, "text_encoder.forward": 0.1, "diffuse": 0.7, "vae.decode": 0.2}
        durations = {f"ZImagePipeline.{name}": share * seconds for name, share in parts.items()}
        profiled = self.arguments.enable_diffusion_pipeline_profiler
        return {"stage_durations": durations if profiled else None, "peak_memory_mb": self.script.peak_memory_mb}

    def record(self, line: dict[str, Any]) -> None:
        if self.script.record:
            with Path(self.script.record).open("a") as file:
                file.write(json.dumps(line) + "\n")


def refused(code: int, message: str) -> web.Response:
    kind = "InternalServerError" if code >= 500 else "BadRequestError"
    return web.json_response({"error": {"message": message, "type": kind, "param": None, "code": code}}, status=code)


async def cut(request: web.Request, data: bytes) -> web.StreamResponse:
    """Ends in the middle of its body."""
    response = web.StreamResponse(headers={"Content-Length": str(len(data))})
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    assert request.transport is not None
    request.transport.abort()
    return response


async def oversize(request: web.Request) -> web.StreamResponse:
    """Far more than any image, without saying so beforehand."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"created": 1, "data": [{"b64_json": "')
    for _ in range(HEAVY_BYTES >> 20):
        await response.write(b"A" * (1 << 20))
    await response.write(b'"}]}')
    return response


def read_arguments(script: Script, words: list[str]) -> argparse.Namespace:
    """The flags that the version knows; others end it, as they end the real one."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--omni", action="store_true", required=True)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--enable-diffusion-pipeline-profiler", action="store_true")
    parser.set_defaults(backend=os.environ.get("DIFFUSION_ATTENTION_BACKEND"), quantization_config=None)
    if script.release >= (0, 16):
        parser.add_argument("--quantization-config", type=json.loads)
    if script.release >= (0, 22):
        parser.add_argument("--diffusion-attention-backend", dest="backend")
    return parser.parse_args(words)


async def serve(server: Server) -> None:
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, server.arguments.host, server.arguments.port).start()
    print("Application startup complete.", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    script = Script.read(Path(sys.argv[1]))
    arguments = read_arguments(script, sys.argv[2:])
    server = Server(script, arguments)
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True).pid if script.child else None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    server.record({"pid": os.getpid(), "child": child, "words": sys.argv[2:], "gpu": visible})
    print(f"INFO 01-01 00:00:00 [api_server.py:1] vLLM API server version {script.vllm_version or script.version}")
    if script.vllm_version:
        print(f" --> vLLM-Omni version {script.version}\n --> vLLM version {script.vllm_version}")
    if script.dies_loading:
        print("(Worker) ERROR RuntimeError: Only SM 8.9 and newer can compute FP8", flush=True)
        sys.exit(1)
    for line in script.log_lines(arguments.backend):
        print(f"(Worker) INFO 01-01 00:00:00 [selector.py:88] {line}", flush=True)
    asyncio.run(serve(server))


if __name__ == "__main__":
    main()
