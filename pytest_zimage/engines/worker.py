"""A worker process: loads one variant, draws on request, reports what it observed.

Started as `python -m pytest_zimage.engines.worker DEVICE`; reads requests from standard input and writes replies to
what was standard output, which is taken away from everything else so that no library's print can break the protocol.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.engines.pipes import die_with_parent, take_stdout
from pytest_zimage.engines.protocol import (
    Canary,
    CanaryTimed,
    Close,
    Closed,
    Draw,
    DrawImages,
    Failure,
    Hello,
    Load,
    Loaded,
    Progress,
    Reply,
    Report,
    Reported,
    Request,
    Trace,
    decode_request,
    encode,
)
from pytest_zimage.errors import ZImageError

if TYPE_CHECKING:
    from pytest_zimage.engines.diffusers_engine import DiffusersEngine
    from pytest_zimage.probes.canary import Aside
    from pytest_zimage.probes.memory import MemorySampler

Say = Callable[[Reply], None]


def main(arguments: list[str], imported_s: float = 0.0) -> int:
    """`arguments`: the torch device, `cpu` or `cuda:N`; `imported_s`: what importing took before this process began."""
    started = time.perf_counter()
    (device,) = arguments
    die_with_parent()
    replies = take_stdout()

    def say(reply: Reply) -> None:
        replies.write(encode(reply))

    say(Progress("import"))
    import comfy_kitchen
    import torch

    from pytest_zimage.engines.diffusers_engine import DiffusersEngine
    from pytest_zimage.probes.canary import Aside
    from pytest_zimage.probes.environment import worker_environment
    from pytest_zimage.probes.memory import rss_now, worker_sampler

    engine = DiffusersEngine()
    environment = worker_environment(torch, comfy_kitchen, device)
    import_s = imported_s + time.perf_counter() - started
    say(Hello(pid=os.getpid(), import_s=import_s, rss_idle_bytes=rss_now(), environment=environment))
    aside = Aside(torch, device)
    with worker_sampler(torch, device) as sampler:
        for line in sys.stdin.buffer:
            request = decode_request(line)
            if isinstance(request, Close):
                say(Closed())
                return 0
            say(_answer(engine, sampler, aside, device, request, say))
    return 1


def _answer(
    engine: DiffusersEngine, sampler: MemorySampler, aside: Aside, device: str, request: Request, say: Say
) -> Reply:
    try:
        match request:
            case Load():
                say(Progress("load"))
                return _weighed(engine.load(request), device)
            case Draw():
                # The kernel keeps its high-water mark by itself; nothing of ours may run beside a timed image.
                with nullcontext() if request.first else sampler.paused():
                    return engine.draw(request, lambda stage, done, total: say(Progress(stage, done, total)))
            case DrawImages():
                return engine.draw_images(request, say)
            case Canary():
                # What it holds for a moment is not the variant's memory, whoever counts it.
                with sampler.paused(), aside.taken():
                    return _canary(device)
            case Trace():
                say(Progress("trace"))
                return engine.trace()
            case Report():
                return aside.corrected(_report(sampler, device))
            case Close():
                raise AssertionError("close is not answered here")
    except ZImageError as error:
        return Failure(type(error).__name__, error.message, error.mend)
    except Exception as error:
        return _failure(error, device, "loading" if isinstance(request, Load) else "drawing")


def _weighed(loaded: Loaded, device: str) -> Loaded:
    import torch

    from pytest_zimage.probes.memory import device_peaks

    return structs.replace(loaded, device_peak_bytes=device_peaks(torch, device)[0])


def _failure(error: Exception, device: str, doing: str) -> Failure:
    import torch

    from pytest_zimage.probes.shortage import shortage

    told = shortage(error, torch, device, doing)
    if told is None:
        return Failure(type(error).__name__, str(error), traceback=traceback.format_exc())
    # Where it happened is for the log; what to do about it does not hang on that.
    traceback.print_exc()
    return Failure(type(told).__name__, told.message, told.mend)


def _canary(device: str) -> CanaryTimed:
    import torch

    from pytest_zimage.probes.canary import time_canary

    return time_canary(torch, device)


def _report(sampler: MemorySampler, device: str) -> Reported:
    import torch

    from pytest_zimage.probes.memory import peaks

    return peaks(sampler, torch, device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
