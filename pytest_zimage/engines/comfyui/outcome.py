"""What the history says of a prompt that is over: its times, what the cache served, its image, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pytest_zimage.engines.comfyui.log import problem
from pytest_zimage.engines.comfyui.messages import Event, Finished, ImageFile, event_decoder, output_decoder
from pytest_zimage.engines.comfyui.workflow import Workflow
from pytest_zimage.engines.servers.session import Expected
from pytest_zimage.engines.servers.wording import last_words
from pytest_zimage.errors import EngineError, MeasurementError, MemoryShortageError, ZImageError

FOLDER = "pytest-zimage"
"""Below the server's output folder: where its images are saved."""
_TRACE_LINES = 6


@dataclass(frozen=True)
class Outcome:
    """A prompt that succeeded, by the server's own clock."""

    seconds: float
    """From the start of its execution to the end."""
    queue_s: float | None
    """From its arrival to the start; None: this version does not tell."""
    cached: frozenset[str]
    """Ids of the nodes that did not run."""


def outcome(what: str, finished: Finished, log: Callable[[], str]) -> Outcome:
    """Raises `EngineError` for a prompt that failed or was interrupted, and `MemoryShortageError` if that was why."""
    events = _events(what, finished)
    if error := events.get("execution_error"):
        raise _failed(what, error, log)
    if stopped := events.get("execution_interrupted"):
        raise EngineError(
            f"{what}: the prompt was interrupted at node {stopped.node_id} ({stopped.node_type})",
            mend="leave the server alone while it is measured, or let one be started: --zimage-comfyui-dir",
        )
    status = finished.status
    if status is None or not status.completed or status.status_str != "success":
        said = status.status_str if status else "no status"
        raise EngineError(
            f"{what}: the prompt ended without success: {said}{last_words(log())}", mend="see the server's log"
        )
    start, end = (_stamp(what, events, name) for name in ("execution_start", "execution_success"))
    if end < start:
        raise MeasurementError(
            f"{what}: its clock went back by {start - end} ms while it drew", mend="see what sets this machine's clock"
        )
    created = finished.prompt.extra_data.create_time
    return Outcome(
        seconds=(end - start) / 1000,
        queue_s=None if created is None else max(0.0, (start - created) / 1000),
        cached=frozenset(events.get("execution_cached", Event()).nodes),
    )


def refuse_logged(what: str, variant: str, log: str) -> None:
    """Raises `MeasurementError` if `log` says that what was drawn beside it is no image of the variant."""
    if why := problem(log):
        raise MeasurementError(
            f"{what}: a prompt of {variant} succeeded, but {why}",
            mend="its files may be damaged, or of another model; or this server cannot read them: see its log",
        )


def refuse_cached(what: str, workflow: Workflow, cached: frozenset[str], expected: Expected) -> None:
    """Raises `MeasurementError` for an image that was not drawn, or not from weights in the state it must measure."""
    if expected == "any":
        return
    if workflow.sampler in cached:
        raise MeasurementError(
            f"{what}: {workflow.told(workflow.sampler)} did not run: its result came from the cache",
            mend="the seed did not change: check that the workflow's seed is not linked to another node",
        )
    loaders = workflow.loaders
    if expected == "cold" and (kept := sorted(loaders & cached)):
        raise MeasurementError(
            f"{what}: a cold load was asked for, and {', '.join(map(workflow.told, kept))} had its weights already",
            mend="let a server be started for every run: --zimage-comfyui-dir",
        )
    if expected == "warm" and (again := sorted(loaders - cached)):
        raise MeasurementError(
            f"{what}: a warm image was asked for, and {', '.join(map(workflow.told, again))} loaded its weights again",
            mend="memory may be short; or the server runs with --cache-none: start it without",
        )


def saved_image(what: str, finished: Finished, node: str, prefix: str) -> ImageFile:
    """The one image that node `node` saved under `prefix` (`FOLDER/NAME`).

    Raises `EngineError` for anything else: what a server says is never taken for a path.
    """
    try:
        images = output_decoder.decode(finished.outputs.get(node, msgspec.Raw(b"{}"))).images
    except msgspec.MsgspecError as error:
        raise _no_image(what, f"a list that cannot be read: {error}") from error
    if len(images) != 1:
        raise _no_image(what, f"{len(images)} images")
    image = images[0]
    folder, _, name = prefix.rpartition("/")
    plain = image.filename.startswith(f"{name}_") and not {"/", "\\", "\0"} & set(image.filename)
    if not plain or ".." in image.filename or image.subfolder != folder or image.type != "output":
        raise _no_image(
            what, f"{image.filename!r} in {image.subfolder!r} ({image.type}), not a file {name}_* of {folder!r}"
        )
    return image


def _no_image(what: str, given: str) -> EngineError:
    return EngineError(
        f"{what}: instead of the one image that was asked for it names {given}",
        mend="check the node that saves in --zimage-comfyui-workflow, and what is between here and the server",
    )


def _events(what: str, finished: Finished) -> dict[str, Event]:
    try:
        return {
            name: event_decoder.decode(data) for name, data in (finished.status.messages if finished.status else [])
        }
    except msgspec.MsgspecError as error:
        raise EngineError(
            f"{what}: its history has messages that cannot be read: {error}",
            mend="its version may not be one that this was written for",
        ) from error


def _stamp(what: str, events: dict[str, Event], name: str) -> int:
    stamp = events[name].timestamp if name in events else None
    if stamp is None:
        raise EngineError(
            f"{what}: its history does not tell the time of {name}",
            mend="update ComfyUI: nothing can be judged without",
        )
    return stamp


def _failed(what: str, error: Event, log: Callable[[], str]) -> ZImageError:
    where = f"node {error.node_id} ({error.node_type})"
    said = f"{error.exception_type}: {error.exception_message.strip()}"
    if "outofmemory" in error.exception_type.lower().replace("_", "") or "out of memory" in said.lower():
        return MemoryShortageError(
            f"{what}: ran out of memory in {where}: {said}",
            mend="see who else holds memory, or choose a smaller variant",
        )
    trace = "".join(f"\n    {line.rstrip()}" for line in "".join(error.traceback).splitlines()[-_TRACE_LINES:])
    return EngineError(f"{what}: {where} failed: {said}{trace}{last_words(log())}", mend="see the server's log")
