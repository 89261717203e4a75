"""The stand-in of vLLM-Omni as tests use it: an executable in place of `vllm`, or a server that runs already."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec import structs

from pytest_zimage.catalog import FitnessLimits, load_catalog
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.fit import FitPlan
from pytest_zimage.engines.protocol import DrawImages, ImageJob, Injection

SERVER = Path(__file__).with_name("vllm_omni_server.py")
HUB = "Tongyi-MAI/Z-Image-Turbo"
CATALOG = load_catalog()
WORKLOAD = structs.replace(CATALOG.workload("turbo-tiny-wide"), width=64, height=32)


class StandIn:
    """One script of the stand-in, and what it recorded."""

    def __init__(self, folder: Path, **script: Any) -> None:
        self.folder = folder
        self._record = folder / "record.jsonl"
        self._script = folder / "script.json"
        self._script.write_text(json.dumps({"record": str(self._record), **script}))
        self.command = folder / "vllm"
        self.command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SERVER}" "{self._script}" "$@"\n')
        self.command.chmod(0o755)

    def once(self, faults: dict[str, str]) -> None:
        """Faults of the first server only."""
        data = json.loads(self._script.read_text())
        self._script.write_text(json.dumps({**data, "faults": faults, "then": data}))

    def settings(self, **changed: Any) -> SimpleNamespace:
        """What the engine reads of the user's settings."""
        return SimpleNamespace(
            **{
                "models": "official",
                "cache": self.folder,
                "vllm_omni_command": "vllm" if changed.get("vllm_omni_url") else str(self.command),
                "vllm_omni_flags": (),
                "vllm_omni_url": None,
                "vllm_omni_pid": None,
                **changed,
            }
        )

    def plan(self, variant: str = "bf16", **changed: Any) -> RunPlan:
        """A run of 4 rounds; without images."""
        return RunPlan(
            **{
                "variant": CATALOG.variant(variant),
                "workload": WORKLOAD,
                "model_set": "official",
                "dims": CATALOG.models["official"],
                "files": {},
                "tokenizer": None,
                "device": "cpu",
                "gpu": "",
                "index": 0,
                "rounds": 4,
                "inject": Injection(),
                "images": None,
                "environment": {"python": "3"},
                "log": self.folder / "logs" / f"{variant}.log",
                "timeout_s": 30.0,
                "fit": FitPlan(FitnessLimits(judged=False), wait_s=0.0, recorded=None, root_pid=os.getpid()),
                **changed,
            }
        )

    def images(self, *seeds: int) -> DrawImages:
        """Images of one prompt, as files of the test's folder."""
        jobs = tuple(ImageJob("p", "a prompt", seed, str(self.folder / f"{seed}.png")) for seed in seeds)
        return DrawImages(jobs, WORKLOAD.width, WORKLOAD.height)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._record.read_text().splitlines()] if self._record.exists() else []

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "pid" in line]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies asked for, in order."""
        return [line["request"] for line in self.lines if "request" in line]

    @property
    def faults(self) -> dict[str, int]:
        """How often each fault was really made."""
        made = [line["fault"] for line in self.lines if line.get("fault")]
        return {fault: made.count(fault) for fault in made}

    @contextlib.contextmanager
    def running(self, *flags: str, model: str = HUB, port: int) -> Iterator[tuple[str, int]]:
        """A server started by somebody else: its URL and process."""
        words = [str(self.command), "serve", model, "--omni", "--host", "127.0.0.1", "--port", str(port), *flags]
        with (self.folder / "other.log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                _until_listening(url, process)
                yield url, process.pid
            finally:
                process.kill()


def _until_listening(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/version", timeout=5):
            return
        time.sleep(0.02)
    raise AssertionError("the stand-in ended")
