"""`--zimage-cache`, and the other folders a session writes to: each says so where it cannot."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch

import pytest
from msgspec import structs

from pytest_zimage.checkpoints.synthetic.manifest import read_manifest, write_manifest


def test_the_default_is_the_users_cache_folder(script, tiny, monkeypatch):
    caches = script.project.mkdir("xdg")
    (caches / "pytest-zimage").mkdir()
    (caches / "pytest-zimage" / "synthetic-tiny").symlink_to(tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    ini = script.project.path / "tox.ini"
    ini.write_text("\n".join(line for line in ini.read_text().splitlines() if "zimage_cache" not in line))
    script(default=[{"rounds": [1.0]}])
    assert script.run("nvfp4").ret == 0
    assert (caches / "pytest-zimage" / "locks" / "cpu.lock").exists()


def test_a_set_that_another_writer_wrote_is_replaced_and_the_session_says_so(script, tiny, results):
    """Two checkouts that share a cache would otherwise write it in turns without a word."""
    cache = script.project.path / "shared"
    shutil.copytree(tiny, cache / "synthetic-tiny")
    record = read_manifest(tiny)
    write_manifest(cache / "synthetic-tiny", structs.replace(record, writer="of another checkout"), [])
    script(default=[{"rounds": [1.0]}])
    told = "synthetic-tiny: written anew: the writer changed; if another checkout uses *, give each its own *"
    script.run("nvfp4", f"--zimage-cache={cache}").stdout.fnmatch_lines([f"NOTE: {told}"])
    assert any(fnmatch(note, told) for note in results()["notes"])
    assert read_manifest(cache / "synthetic-tiny").writer == record.writer
    script.run("nvfp4", f"--zimage-cache={cache}").stdout.no_fnmatch_line("NOTE: *written anew*")


def test_a_cache_that_cannot_be_made(script, results):
    (script.project.path / "file").write_text("in the way")
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4", "--zimage-cache=file/below")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*/file/below/locks/cpu.lock: cannot be written: *", "  mend: *--zimage-cache DIR"])
    assert "Traceback" not in done.stdout.str()
    assert [error["kind"] for error in results()["errors"]] == ["MeasurementError"]


def test_a_project_whose_work_folder_cannot_be_made(script):
    (script.project.path / ".zimage").write_text("in the way")
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*/.zimage/sessions/*: cannot be written: *", "  mend: make the project's folder *"])
    assert "Traceback" not in done.stdout.str()
    assert "INTERNALERROR" not in done.stdout.str()


def test_a_disk_that_is_full_when_a_run_is_kept(script):
    script.project.makeconftest(
        """
        import errno, os
        from pathlib import Path
        from scripted import ScriptedEngine

        write_bytes = Path.write_bytes

        def full(path, data):
            if "runs" in path.parts:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(path, data)

        Path.write_bytes = full

        def pytest_zimage_engines(config):
            return {"diffusers": lambda: ScriptedEngine(config.rootpath)}
        """
    )
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*/runs/nvfp4-1*: cannot be written: No space left on device", "  mend: free *"])
    assert "Traceback" not in done.stdout.str()
