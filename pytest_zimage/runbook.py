"""The runs of one session, in a folder that its xdist workers share.

A run is measured by whichever process needs it first and read by the others: so each variant is loaded once however
the tests are spread. Two locks see to it: one of the run, since workers may have a GPU each, and one of the device,
since two timed runs must never meet on one. A run that failed is kept as its error, which every test of the variant
then reports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct, json

from pytest_zimage import errors
from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.protocol import DrawnImage
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import EngineError, MeasurementError, ZImageError
from pytest_zimage.locks import OTHER_CACHE, held

_IMAGES = ".images.json"
_BEGUN = ".begun"
_WRITABLE = "make the project's folder writable"


class StoredError(Struct, frozen=True):
    """A run that failed, as the next reader will raise it."""

    kind: str
    message: str
    mend: str


class RunBook:
    """Runs by (variant, index); `folder` belongs to the session, `lock` to the device."""

    def __init__(self, folder: Path, lock: Path) -> None:
        self._folder = folder
        self._lock = lock
        with _on_disk(folder, _WRITABLE):
            folder.mkdir(parents=True, exist_ok=True)
        with _on_disk(lock, OTHER_CACHE):
            lock.parent.mkdir(parents=True, exist_ok=True)

    def get(self, variant: str, index: int, measure: Callable[[], RunRecord], progress: ReportProgress) -> RunRecord:
        """The run, measured now if nobody has yet. Raises the `ZImageError` the run ended with."""
        path = self._folder / f"{variant}-{index + 1}.json"
        what = f"run {index + 1} of {variant}"
        return RunRecord.from_json(self._made(path, what, lambda: measure().to_json(), progress))

    def images(
        self, name: str, draw: Callable[[], tuple[DrawnImage, ...]], progress: ReportProgress
    ) -> tuple[DrawnImage, ...]:
        """Images drawn outside of any run, by whichever process needs them first; errors as for `get`."""
        path = self._folder / f"{name}{_IMAGES}"
        return json.decode(
            self._made(path, f"drawing {name}", lambda: json.encode(draw()), progress), type=tuple[DrawnImage, ...]
        )

    def _made(self, path: Path, what: str, make: Callable[[], bytes], progress: ReportProgress) -> bytes:
        failed = path.with_suffix(".error.json")
        if not path.exists() and not failed.exists():
            waiting = f"waiting for {what}, which another process makes"
            with held(path.with_suffix(".lock"), waiting, progress, mend=_WRITABLE):
                if not path.exists() and not failed.exists():
                    with self.device(progress), _begun(path, what):
                        _make(path, failed, what, make)
        if failed.exists():
            raise _read_error(failed)
        return path.read_bytes()

    def recorded(self, variant: str) -> list[RunRecord]:
        """The runs of `variant` that succeeded so far, in order."""
        runs: list[RunRecord] = []
        while (path := self._folder / f"{variant}-{len(runs) + 1}.json").exists():
            runs.append(RunRecord.from_json(path.read_bytes()))
        return runs

    @property
    def is_empty(self) -> bool:
        """Whether no run has ended yet."""
        return not any(self._folder.glob("*.json"))

    def all(self) -> list[RunRecord]:
        """Every run of the session that succeeded, in the order they were made."""
        return runs_in(self._folder)

    @contextmanager
    def device(self, progress: ReportProgress) -> Iterator[None]:
        """Hold the device: nothing is timed on it meanwhile."""
        with held(self._lock, "waiting for the device, which another process is timing on", progress):
            yield


def runs_in(folder: Path) -> list[RunRecord]:
    """Every run kept in `folder` that succeeded, in the order they were made."""
    paths = [path for path in folder.glob("*.json") if not path.name.endswith((".error.json", _IMAGES))]
    return [RunRecord.from_json(path.read_bytes()) for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns)]


def missing_from(folder: Path) -> list[str]:
    """What was begun in `folder` and never ended, because whoever made it was interrupted or is gone."""
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"*{_BEGUN}"))]


@contextmanager
def _begun(path: Path, what: str) -> Iterator[None]:
    """Leave a mark for as long as `what` is being made; it outlives a process that is killed and an interruption."""
    mark = path.with_suffix(_BEGUN)
    _write(mark, what.encode())
    try:
        yield
    except Exception:
        mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


def _make(path: Path, failed: Path, what: str, make: Callable[[], bytes]) -> None:
    try:
        _write(path, make())
    except ZImageError as error:
        _write(failed, json.encode(StoredError(type(error).__name__, error.message, error.mend)))
    except Exception as error:  # a fault of an engine's own code: told once with its traceback
        text = f"{what} ended with {type(error).__name__}: {error}"
        mend = "the first failing test of this variant has the traceback"
        _write(failed, json.encode(StoredError(EngineError.__name__, text, mend)))
        raise


def _read_error(path: Path) -> ZImageError:
    stored = json.decode(path.read_bytes(), type=StoredError)
    kind = getattr(errors, stored.kind, None)
    if isinstance(kind, type) and issubclass(kind, ZImageError):
        return kind(stored.message, mend=stored.mend)
    return EngineError(f"{stored.kind}: {stored.message}", mend=stored.mend)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with _on_disk(path, "free space there, or make the project's folder writable"):
        temporary.write_bytes(data)
        temporary.replace(path)


@contextmanager
def _on_disk(path: Path, mend: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be written: {error.strerror or error}", mend=mend) from error
