"""Where torch's compiler keeps its files while one worker runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory


@contextmanager
def compile_cache(wanted: bool) -> Iterator[Mapping[str, str]]:
    """The environment of a worker that compiles, if `wanted`: a folder for it, empty now and gone at the end.

    What an earlier run has compiled would make a run's cold load another quantity. The test process owns the folder,
    since a worker that is killed cannot remove it. Leave this once the worker and all it started have ended: any
    process of the compiler that still lived would make the folder again.
    """
    if not wanted:
        yield {}
        return
    with TemporaryDirectory(prefix="zimage-compile-", ignore_cleanup_errors=True) as folder:
        yield {"TORCHINDUCTOR_CACHE_DIR": folder}
