"""The nightly's steps run anywhere as one script: what fails becomes a summary, and an issue with the delta."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from verdicts import SLOWER, results

from pytest_zimage.reports import results as results_file
from pytest_zimage.reports.results import ErrorRow
from pytest_zimage.verdict.model import Verdict

HERE = Path(__file__).parent.parent
SCRIPT = HERE / "tools" / "nightly.py"
WORKFLOWS = HERE / ".github" / "workflows"


@pytest.fixture
def nightly(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    import nightly as script

    return script


@pytest.fixture
def pretend(nightly, monkeypatch, tmp_path):
    """A night in which pytest would leave these results and this status."""

    def night(status, results=None, output="the report\n"):
        class Pytest:
            stdout = iter([output])

            def __init__(self, command, **more):
                self.command = command
                if results is not None:
                    results_file.write(Path(command[command.index("--zimage-results") + 1]), results)

            def wait(self):
                return status

        monkeypatch.setattr(nightly.subprocess, "Popen", Pytest)
        ended = nightly.main(["suite", "--lane", "gb10", "--out", str(tmp_path / "out")])
        return ended, tmp_path / "out"

    return night


def test_the_steps_run_end_to_end_on_the_tiny_model(tmp_path, tiny):
    summary = tmp_path / "step-summary.md"
    command = [sys.executable, str(SCRIPT), "suite", "--lane", "cpu", "--out", str(tmp_path / "out"), "--"]
    command += ["--zimage-config", "bf16", "--zimage-rounds", "1", "-k", "forwards or disk", "--zimage-device", "cpu"]
    command += ["--zimage-cache", str(tiny.parent)]
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": str(summary), "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"results.json", "report.txt", "junit.xml", "summary.md"}, "nothing failed, so there is no issue"
    assert summary.read_text().startswith("## cpu: passed")
    assert "2 verdicts: 2 pass" in summary.read_text()
    assert "2 passed" in (tmp_path / "out" / "report.txt").read_text()
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 1


def test_a_regression_becomes_an_issue_with_its_delta(pretend):
    ended, out = pretend(1, results(SLOWER))
    assert ended == 1
    body = (out / "issue.md").read_text()
    assert "nvfp4 warm latency: SLOWER  5.50 s -> 6.61 s  +20.1 % (95 % interval +18.9 .. +21.4 %)" in body
    assert "NVIDIA GB10: comfy-kitchen 0.3.0, torch 2.12" in body
    assert (out / "summary.md").read_text().startswith("## gb10: failed (pytest ended with 1)")


def test_what_was_not_judged_is_told_too(pretend):
    missing = Verdict(
        test="t", variant="bf16", metric="cold_load", unit="s", verdict="NO BASELINE", outcome="no-baseline"
    )
    error = ErrorRow(test="t", variant="mxfp8", kind="EngineError", message="was killed by SIGKILL", mend="memory")
    _, out = pretend(1, results(missing, errors=(error,)))
    body = (out / "issue.md").read_text()
    assert "bf16 cold_load: NO BASELINE" in body
    assert "EngineError: was killed by SIGKILL" in body


def test_a_session_without_results_shows_how_its_report_ends(pretend):
    ended, out = pretend(4, output="ERROR: this machine is 'cpu'\n")
    assert ended == 4
    assert "this machine is 'cpu'" in (out / "issue.md").read_text()
    assert "this machine is 'cpu'" in (out / "summary.md").read_text()


def test_a_fence_in_a_report_does_not_end_the_fence(pretend):
    _, out = pretend(4, output="~~~~\n# a heading\n")
    body = (out / "issue.md").read_text()
    assert re.findall(r"^~~~~$", body, re.MULTILINE) == ["~~~~", "~~~~"]


def test_an_issue_is_never_longer_than_github_takes(pretend, nightly):
    _, out = pretend(1, results(*[SLOWER] * 400))
    body = (out / "issue.md").read_text()
    assert nightly.MOST_CHARACTERS < len(body) < 65_536
    assert "the whole report is in the run's artifact" in body


def test_a_night_that_passes_removes_last_nights_issue(pretend):
    pretend(1, results(SLOWER))
    _, out = pretend(0, results())
    assert not (out / "issue.md").exists()


@pytest.fixture
def gh(tmp_path, monkeypatch):
    """A `gh` that notes what it is asked; `open_issue` is the number of the open one."""
    calls = tmp_path / "gh.log"

    def make(open_issue=""):
        program = tmp_path / "bin" / "gh"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$2" in list) echo "{open_issue}";; esac\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return make


def test_the_first_failure_opens_an_issue(nightly, gh, tmp_path):
    called = gh()
    (tmp_path / "issue.md").write_text("body")
    assert nightly.main(["issue", "--lane", "gb10", "--out", str(tmp_path)]) == 0
    listed, labelled, created = called()
    assert listed.startswith("issue list --label nightly --state open")
    assert labelled.startswith("label create nightly --force")
    assert created == (
        f"issue create --title nightly: the suite fails on gb10 --label nightly --body-file {tmp_path}/issue.md"
    )


def test_the_next_failure_adds_to_it(nightly, gh, tmp_path):
    called = gh(open_issue="17")
    (tmp_path / "issue.md").write_text("body")
    nightly.main(["issue", "--out", str(tmp_path)])
    assert called()[-1] == f"issue comment 17 --body-file {tmp_path}/issue.md"
    assert len(called()) == 2


def test_nothing_failed_opens_nothing(nightly, gh, tmp_path):
    called = gh()
    (tmp_path / "results.json").write_text("{}")
    nightly.main(["issue", "--out", str(tmp_path)])
    assert called() == []


def test_a_night_that_ended_before_it_measured_is_told(nightly, gh, tmp_path):
    called = gh()
    nightly.main(["issue", "--out", str(tmp_path / "out")])
    assert called()[-1].startswith("issue create")
    assert "before the suite had measured" in (tmp_path / "out" / "issue.md").read_text()


def test_telling_needs_nothing_installed():
    code = "import sys; sys.modules['pytest_zimage'] = None; sys.path.insert(0, sys.argv[1]); import nightly"
    subprocess.run([sys.executable, "-S", "-c", code, str(SCRIPT.parent)], check=True)


@pytest.mark.parametrize(
    ("options", "packages"),
    [
        ([], ["comfy-kitchen"]),
        (["--torch"], ["comfy-kitchen", "torch"]),
        (["--diffusers"], ["comfy-kitchen", "diffusers", "transformers"]),
    ],
)
def test_the_newest_packages(nightly, monkeypatch, options, packages):
    asked = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(nightly.subprocess, "run", lambda command, check: asked.append(command) or done)
    assert nightly.main(["install", *options]) == 0
    assert asked[0][asked[0].index("--upgrade") + 1 :] == packages


def test_every_action_is_pinned_by_a_whole_commit():
    used = [
        (path.name, line.strip())
        for path in WORKFLOWS.glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert len(used) >= 7
    for where, line in used:
        assert re.fullmatch(r"- uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), f"{where}: {line}"


def test_the_runner_is_never_lent_to_a_fork():
    text = (WORKFLOWS / "nightly.yml").read_text()
    events = text.partition("\non:\n")[2].partition("\npermissions:")[0]
    assert re.findall(r"^  (\w+):", events, re.MULTILINE) == ["schedule", "workflow_dispatch"]
    jobs = re.findall(r"^  (\w+):\n(?:    .*\n)*?    if: \$\{\{ (.*) \}\}$", text.partition("\njobs:")[2], re.MULTILINE)
    assert [name for name, _ in jobs] == ["suite", "tell"]
    assert all("!github.event.repository.fork" in condition for _, condition in jobs)
    assert "\npermissions: {}\n" in text
