"""The judge's process: holds the scorers and answers for images on disk.

Started as `python -m pytest_zimage.quality.worker DEVICE`; reads requests from standard input and writes replies to
what was standard output. torch, open_clip, lpips and scikit-image are imported when the scorers are opened, and only
here.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING

from msgspec import Struct

from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.pipes import die_with_parent, take_stdout
from pytest_zimage.engines.protocol import Close, Closed, Failure, Progress, encode
from pytest_zimage.errors import EngineError, ZImageError
from pytest_zimage.quality.protocol import (
    Compared,
    ComparePairs,
    ControlsScored,
    MakePreviews,
    Open,
    PreviewsMade,
    Ready,
    Reply,
    Request,
    ScoreControls,
    Scored,
    ScoreImages,
    decode_request,
)

if TYPE_CHECKING:
    from pytest_zimage.quality.scoring import Scoring


def main(arguments: list[str]) -> int:
    """`arguments`: the torch device, `cpu` or `cuda:N`."""
    (device,) = arguments
    die_with_parent()
    replies = take_stdout()

    def say(reply: Struct) -> None:
        replies.write(encode(reply))

    judge = _Judge(device, lambda stage, done, total: say(Progress(stage, done, total)))
    for line in sys.stdin.buffer:
        request = decode_request(line)
        if isinstance(request, Close):
            say(Closed())
            return 0
        say(judge.answer(request))
    return 1


class _Judge:
    def __init__(self, device: str, report: ReportProgress) -> None:
        self._device = device
        self._report = report
        self._opened: Scoring | None = None

    def answer(self, request: Request) -> Reply:
        try:
            return self._answer(request)
        except ZImageError as error:
            return Failure(type(error).__name__, error.message, error.mend)
        except Exception as error:
            return Failure(type(error).__name__, str(error), traceback=traceback.format_exc())

    def _answer(self, request: Request) -> Reply:
        if isinstance(request, Open):
            return self._open(request)
        import torch

        from pytest_zimage.quality.preview import make_previews

        with torch.inference_mode():
            match request:
                case ScoreImages():
                    return Scored(self._scoring().score(request.items, self._report))
                case ScoreControls():
                    return ControlsScored(self._scoring().controls(request, self._report))
                case ComparePairs():
                    return Compared(self._scoring().compare(request.pairs, self._report))
                case MakePreviews():
                    return PreviewsMade(make_previews(request.jobs, request.limit_bytes, request.side))
                case Close():
                    raise AssertionError("close is not answered here")

    def _open(self, request: Open) -> Ready:
        begin = time.perf_counter()
        self._report("importing the scorers", 0, 0)
        if not request.choice.allow_download:
            # The hub's libraries ask the network for what is cached, too; this is their one switch, read at import.
            os.environ["HF_HUB_OFFLINE"] = "1"
        from pytest_zimage.quality.opening import open_scoring

        import_s = time.perf_counter() - begin
        self._opened, ready = open_scoring(request, self._device, os.getpid(), import_s, self._report)
        return ready

    def _scoring(self) -> Scoring:
        if self._opened is None:
            raise EngineError("no scorer is open", mend="send Open first")
        return self._opened


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
