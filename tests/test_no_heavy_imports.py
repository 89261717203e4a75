"""The pytest process stays light: nothing heavy at start-up, and no torch after a whole suite run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SUITES = Path(__file__).parents[1] / "suites"
HEAVY = ("torch", "diffusers", "transformers", "comfy_kitchen", "accelerate", "safetensors")
STARTUP = (*HEAVY, "numpy", "scipy", "msgspec", "pynvml", "psutil", "PIL")
CONFTEST = """
def pytest_unconfigure(config):
    import sys
    from pathlib import Path
    (Path(config.rootpath) / "modules.txt").write_text("\\n".join(sorted(sys.modules)))
"""


def imported(pytester) -> set[str]:
    modules = {line.partition(".")[0] for line in (pytester.path / "modules.txt").read_text().splitlines()}
    assert "pytest" in modules
    return modules


@pytest.mark.parametrize("arguments", [(), ("--collect-only",), ("-m", "cpu"), ("--markers",)])
def test_a_project_without_a_suite_pays_nothing(pytester, arguments):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_other(): pass")
    # Other plugins of this environment import what they like.
    pytester.runpytest_subprocess("-p", "no:benchmark", "-p", "no:xdist", "-p", "no:anyio", *arguments)
    assert imported(pytester).isdisjoint(STARTUP)
    assert not [name for name in (pytester.path / "modules.txt").read_text().split() if "zimage.session" in name]


def test_collecting_the_suite_needs_nothing_heavy(project):
    project.makeconftest(CONFTEST)
    done = project.runpytest_subprocess("--collect-only", "-q")
    done.stdout.fnmatch_lines(["*6 tests collected*"])
    assert imported(project).isdisjoint((*HEAVY, "numpy", "scipy"))


def test_a_whole_run_of_the_suite_leaves_no_torch(project):
    """With the real worker, which has imported all of it."""
    shutil.copytree(SUITES, project.mkdir("suites"), dirs_exist_ok=True)
    (project.path / "test_suite.py").unlink()
    project.makeconftest(CONFTEST)
    done = project.runpytest_subprocess("--zimage-config=nvfp4", "--zimage-rounds=1")
    assert done.ret == 0, done.stdout.str()
    done.stdout.fnmatch_lines(["[?] nvfp4 *forwards *NO BASELINE*"])
    assert imported(project).isdisjoint(HEAVY)
