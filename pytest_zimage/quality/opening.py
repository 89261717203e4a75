"""Loads the scorers that a request names, for the judge's own process."""

from __future__ import annotations

import time
from importlib.metadata import version

import torch

from pytest_zimage.errors import UnsupportedError
from pytest_zimage.quality.clip import open_clip_scorer
from pytest_zimage.quality.lpips import open_lpips_scorer
from pytest_zimage.quality.pixels import pixel_scorers
from pytest_zimage.quality.protocol import Open, Ready
from pytest_zimage.quality.scoring import Report, Scoring

_THREADS = 8
"""As many as torch may use unless told: LPIPS of a 1024x1024 image took 0.12 s with 8 of 32 cores and 0.07 s with all,
which those that load and draw beside it need too."""


def open_scoring(request: Open, device_name: str, pid: int, import_s: float, progress: Report) -> tuple[Scoring, Ready]:
    """Load the scorers that `request` names; raises what their openers raise."""
    begin = time.perf_counter()
    device = torch.device(device_name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"the judge sees no device {device_name!r}", mend="let it run on the CPU")
    torch.set_num_threads(request.threads or min(torch.get_num_threads(), _THREADS))
    # TF32 would move scores by more than the gate's margin of error between two kinds of GPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    progress("loading CLIP", 0, 0)
    clip = open_clip_scorer(request.choice, device) if request.choice.clip else None
    progress("loading LPIPS", 0, 0)
    lpips = open_lpips_scorer(request.choice, device) if request.choice.lpips else None
    networks = tuple(opened.scorer for opened in (clip, lpips) if opened is not None)
    ready = Ready(
        pid=pid,
        import_s=import_s,
        load_s=time.perf_counter() - begin,
        scorers=(*networks, *pixel_scorers()),
        environment={
            "torch": str(torch.__version__),
            "pillow": version("pillow"),
            "device": device_name,
            "threads": str(torch.get_num_threads()),
        },
    )
    return Scoring(clip, lpips), ready
