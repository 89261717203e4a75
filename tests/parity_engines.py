"""Engines for the tests of parity: the real one with a change, and one that paints without any model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
from msgspec import structs
from PIL import Image

from pytest_zimage.engines.base import Engine
from pytest_zimage.engines.local import LocalEngine
from pytest_zimage.engines.protocol import DrawImages, DrawnImage, Load
from pytest_zimage.errors import EngineError


def require_parity(plan) -> None:
    """What any engine is asked for here."""
    if not plan.same_schedule or plan.workload.sampler != "euler":
        raise EngineError("was not asked for euler on the very noise levels")


class Painter(Engine):
    """Paints noise by prompt and seed; `fault` says what is wrong with that."""

    name = "painter"

    def __init__(self, fault: str = "none") -> None:
        self._fault = fault

    def run(self, plan, progress):
        raise EngineError(f"the server of {self._fault} is gone", mend="start it")

    def draw(self, plan, progress):
        require_parity(plan)
        if self._fault == "dead":
            raise EngineError("the other server is gone", mend="start it")
        wide, high = (64, 64) if self._fault == "size" else (plan.images.width, plan.images.height)
        drawn = tuple(self._paint(job, wide, high) for job in plan.images.jobs)
        return {"order": drawn[::-1], "fewer": drawn[:1]}.get(self._fault, drawn)

    def _paint(self, job, wide, high):
        seed = job.seed + (self._fault == "seed")
        pixels = np.random.default_rng([seed, len(job.text)]).integers(0, 256, (high, wide, 3), np.uint8)
        if self._fault == "black":
            pixels[:] = 0
        Image.fromarray(pixels).save(job.path)
        return DrawnImage(job.prompt, job.seed, job.path, hashlib.sha256(pixels.data).hexdigest())


class Other(LocalEngine):
    """The real engine under another name: `none`, or another `sampler`, or `truncating` where it rounds."""

    name = "other"

    def __init__(self, fault: str = "none") -> None:
        super().__init__()
        self._fault = fault

    def run(self, plan, progress):
        record = super().run(plan, progress)
        return structs.replace(record, environment={**record.environment, "torch": "9.9", "other_flags": "--fast"})

    def draw(self, plan, progress):
        require_parity(plan)
        if plan.inject:
            raise EngineError("a fault was put into both sides")
        if self._fault == "truncating":
            return _truncating(plan)
        if self._fault == "sampler":
            plan = replace(plan, workload=structs.replace(plan.workload, sampler="res_multistep"))
        return super().draw(plan, progress)


def _truncating(plan) -> tuple[DrawnImage, ...]:
    """Drawn in a process of its own, since the images must be made of the very floats."""
    load = Load(
        variant=plan.variant,
        workload=plan.workload,
        dims=plan.dims,
        files={role: str(path) for role, path in plan.files.items()},
        tokenizer=str(plan.tokenizer),
        device=plan.device,
    )
    asked = msgspec.json.encode([load, plan.images])
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, check=False)
    if done.returncode:
        raise EngineError(done.stderr.decode())
    return msgspec.json.decode(done.stdout, type=tuple[DrawnImage, ...])


def _draw_truncating() -> None:
    import torch

    from pytest_zimage.engines import drawing
    from pytest_zimage.engines.diffusers_engine import DiffusersEngine

    def truncated(decoded):
        image = (decoded[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
        return (image * 255).to(torch.uint8).contiguous().cpu()

    drawing.to_pixels = truncated
    load, images = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[Load, DrawImages])
    engine = DiffusersEngine()
    engine.load(load)
    drawn = engine.draw_images(images, lambda said: None).images
    sys.stdout.buffer.write(msgspec.json.encode(drawn))


if __name__ == "__main__":
    _draw_truncating()
