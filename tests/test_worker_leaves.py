"""A worker ends without taking the interpreter apart, and leaves nothing behind all the same."""

from __future__ import annotations

from tiny_files import load_request, silent

from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.forking import ForkServer


def test_the_compilers_folder_goes_with_the_worker_that_compiles(tmp_path, tiny, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    server = ForkServer(tmp_path / "forkserver.log")
    try:
        server.ready(300, silent)
        log = tmp_path / "worker.log"
        with WorkerClient("w", log, server.worker("cpu"), timeout_s=300, progress=silent) as worker:
            worker.receive("import")
            worker.ask(load_request("bf16-compile"), "load")
            assert [path.name[:15] for path in temporary.iterdir()] == ["zimage-compile-"]
            worker.close()
    finally:
        server.close()
    assert list(temporary.iterdir()) == []
