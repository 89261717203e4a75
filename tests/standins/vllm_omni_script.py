"""What the stand-in of vLLM-Omni is told to be: its version, its faults, and the pictures it draws."""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass
class Script:
    """One JSON file; a request's number counts the generations asked for since the start, from 1.

    The file's `then` takes its place once a server has read it.
    """

    version: str = "0.30.0"
    vllm_version: str | None = None
    """Where vLLM's differs from vLLM-Omni's."""
    record: str = ""
    """A file that gets one JSON line for every start and every generation."""
    health_503: int = 0
    """So many looks at its health find it loading."""
    draw_s: float = 0.0
    """One image without guidance; with it, twice that."""
    queue_s: float = 0.0
    """What it says each request waited."""
    others: int = 0
    """Requests of another client that it counts beside each of ours."""
    faults: dict[str, str] = field(default_factory=dict)
    """Fault by number of the request."""
    rates: dict[str, float] = field(default_factory=dict)
    """Share of the requests that get a fault, by fault."""
    rate_seed: int = 0
    served: str | None = None
    """Another model than it was started with."""
    backend: str | None = None
    """Another attention backend than it was asked for; empty: none is logged."""
    counts: bool = True
    """Whether its page of metrics counts requests."""
    metrics: bool = True
    """Whether replies carry metrics where the version has them."""
    peak_memory_mb: float = 13000.0
    dies_loading: bool = False
    child: bool = False
    """Starts a child that leaves its process session, as workers may."""

    @classmethod
    def read(cls, path: Path) -> Script:
        script = json.loads(path.read_text())
        if then := script.pop("then", None):
            path.write_text(json.dumps(then))
        return cls(**script)

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    def fault(self, number: int) -> str:
        """What is wrong with that request; empty: nothing."""
        if str(number) in self.faults:
            return self.faults[str(number)]
        drawn = random.Random(f"{self.rate_seed} {number}").random()
        for fault, share in self.rates.items():
            if drawn < share:
                return fault
            drawn -= share
        return ""

    def guidance(self, asked: float | None) -> float:
        """What the version makes of `guidance_scale`: 0 is none."""
        if self.release >= (0, 26):
            return 1.0 if asked is None else asked
        scale = asked or 1.0
        return scale if self.release >= (0, 18) or scale > 1 else 0.0

    def log_lines(self, asked: str | None) -> list[str]:
        """How the version says which attention backend it took."""
        backend = self.backend if self.backend is not None else asked
        if backend == "":
            return []
        if self.release >= (0, 22):
            source = "attention_config.default" if asked else "platform default"
            name = backend or "FLASH_ATTN"
            return [f"Resolved diffusion attention backend '{name}' for role='self' via {source}"]
        if backend is None:
            return ["Defaulting to diffusion attention backend FLASH_ATTN"]
        return [f"Using diffusion attention backend '{backend}'"]


def picture(body: dict[str, Any], guidance: float, device: str, weights: str) -> Image.Image:
    """A smooth picture of what was asked for, a little off for other `weights`: bf16's are close to FP8's."""
    width, height = map(int, body["size"].split("x"))
    asked = (body["prompt"], body["seed"], body["size"], body["num_inference_steps"], guidance, device)
    return Image.blend(_noise(repr(asked), width, height, 8), _noise(repr((asked, weights)), width, height, 32), 0.03)


def _noise(key: str, width: int, height: int, cells: int) -> Image.Image:
    source = random.Random(hashlib.sha256(key.encode()).digest())
    small = Image.frombytes("RGB", (cells, cells), source.randbytes(cells * cells * 3))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **({"compress_level": 0} if kind == "PNG" else {}))
    return file.getvalue()
