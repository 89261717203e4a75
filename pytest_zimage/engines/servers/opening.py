"""The cold load of a server: opened, looked at while idle, its files out of the page cache, and one image drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from pytest_zimage.engines.base import ReportProgress, RunPlan
from pytest_zimage.engines.record import ColdLoad
from pytest_zimage.engines.servers.asking import Asking
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.memory import TreeMemory
from pytest_zimage.engines.servers.pictures import Pictures
from pytest_zimage.engines.servers.session import ServerSession
from pytest_zimage.engines.servers.spoiling import held
from pytest_zimage.errors import UnsupportedError
from pytest_zimage.probes import pagecache
from pytest_zimage.probes.pagecache import CacheState

Open = Callable[[], AbstractContextManager[ServerSession]]


@dataclass(frozen=True)
class Opened:
    """A server that has drawn its first image, and what that took."""

    session: ServerSession
    memory: TreeMemory
    """Still looking."""
    cold: ColdLoad
    started_here: bool
    """Whether its process began with the run, so that what the kernel says of it is of the run."""
    reads_them: bool = True
    """Whether the run's files may be those that it reads: of a server that ran already the names tell, no more."""


@contextmanager
def opened(
    plan: RunPlan,
    files: Sequence[Path],
    open_session: Open,
    *,
    loads_at_start: bool,
    asking: Asking,
    pictures: Pictures,
    progress: ReportProgress,
) -> Iterator[Opened]:
    """A server after its first image; where a request for that fails, another server: the first may have loaded."""
    while True:
        with ExitStack() as stack:
            try:
                found = _cold(plan, files, open_session, loads_at_start, asking, pictures, stack, progress)
            except RequestFault as fault:
                asking.failed(fault)
                continue
            asking.succeeded()
            yield found
            return


def _cold(
    plan: RunPlan,
    files: Sequence[Path],
    open_session: Open,
    loads_at_start: bool,
    asking: Asking,
    pictures: Pictures,
    stack: ExitStack,
    progress: ReportProgress,
) -> Opened:
    with ExitStack() as reading:
        if loads_at_start:
            reading.enter_context(plan.reading(progress))
            cache = _emptied(files)
        session = stack.enter_context(open_session())
        asking.count(session.faults)
        memory = stack.enter_context(TreeMemory(session.pid, plan.gpu))
        started_here = session.started_s > 0
        notes, unavailable = ((), "") if started_here else _forgotten(session)
        if not loads_at_start:
            memory.mark_idle()
            reading.enter_context(plan.reading(progress))
            cache = _emptied(files)
        progress("first image", 0, 0)
        served = session.draw(plan.workload, "any" if unavailable else "cold")
    cache, reads_them = (cache, True) if started_here else _believed(cache, files)
    pictures.checked(served, plan.workload)
    phases_s = {"server_start": session.started_s} if started_here else {}
    total_s = served.seconds + (session.started_s if loads_at_start else 0.0)
    waited_s = held(total_s, plan.inject.cold_load)
    cold = ColdLoad(
        total_s=total_s + waited_s,
        phases_s={**phases_s, "first_image": served.seconds + waited_s},
        residency=cache.residency,
        emptied=cache.emptied,
        notes=(*cache.notes, *notes),
        unavailable=unavailable,
    )
    return Opened(session, memory, cold, started_here, reads_them)


def _forgotten(session: ServerSession) -> tuple[tuple[str, ...], str]:
    """Notes of what a server that ran already cannot undo, or why it cannot forget at all."""
    try:
        return session.forget(), ""
    except UnsupportedError as error:
        return (), error.message


def _believed(cache: CacheState, files: Sequence[Path]) -> tuple[CacheState, bool]:
    """What may be said of the page cache of a server that ran already, and whether it can have read `files`.

    It names its files, and nobody knows from where it reads them. What was out of the cache and still is was not read.
    """
    left = {path.name: pagecache.residency([path]).residency for path in files} if cache.emptied else {}
    unread = [name for name, share in left.items() if share is not None and share < pagecache.EMPTY_BELOW]
    if unread:
        why = f"the server drew without reading {', '.join(unread)} here: it reads others of these names, cached or not"
        return CacheState(residency=None, emptied=False, notes=(*cache.notes, why)), False
    if files and not left:
        taken = "that the server reads the files here, and not others of these names, is taken from you"
        return structs.replace(cache, notes=(*cache.notes, taken)), True
    return cache, True


def _emptied(files: Sequence[Path]) -> CacheState:
    if not files:
        return CacheState(
            residency=None, emptied=False, notes=("the server reads files of its own keeping, cached or not",)
        )
    return pagecache.empty(files)
