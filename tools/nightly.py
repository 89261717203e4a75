"""The steps of the nightly workflow, which also run by hand:

    python tools/nightly.py install --diffusers --torch     # the newest comfy-kitchen, and what else is named
    python tools/nightly.py suite --lane gb10 --out nightly # measure and judge; writes results, report, summary, issue
    python tools/nightly.py issue --out nightly             # open an issue with the failing deltas, or add to it

`suite` ends as pytest does. What stands behind `--` goes to pytest as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_zimage.reports.results import Results

ROOT = Path(__file__).resolve().parent.parent
LABEL = "nightly"
MOST_CHARACTERS = 60_000
"""GitHub takes 65 536 in one text."""
_FAILED = ("regression", "changed", "error")
_OPEN = ("no-baseline", "inconclusive", "unfit")
_PACKAGES = ("comfy-kitchen", "torch", "diffusers", "transformers", "driver", "pytest-zimage", "commit")


def install(torch: bool, diffusers: bool) -> int:
    """Upgrade this environment; comfy-kitchen always, since that is what a nightly watches."""
    wanted = ["comfy-kitchen", *(["torch"] if torch else []), *(["diffusers", "transformers"] if diffusers else [])]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--upgrade", *wanted]
    return subprocess.run(command, check=False).returncode


def suite(lane: str, out: Path, arguments: Sequence[str]) -> int:
    """Run the suite of `lane`, strictly: a nightly that has nothing to compare with must not look green."""
    out.mkdir(parents=True, exist_ok=True)
    for old in ("results.json", "report.txt", "junit.xml", "summary.md", "issue.md"):
        (out / old).unlink(missing_ok=True)
    results = ("--zimage-results", str(out / "results.json"), f"--junitxml={out / 'junit.xml'}")
    command = [sys.executable, "-m", "pytest", "suites", "-m", lane, "--zimage-strict", *results, *arguments]
    with (out / "report.txt").open("w", encoding="utf-8") as report:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            report.write(line)
    status = process.wait()
    text = "\n".join(_summary(lane, out, status)) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(target).open("a", encoding="utf-8") as summary:
            summary.write(text)
    if status:
        body = "\n".join(_issue(lane, out, status))
        cut = f"\n~~~~\n\ncut at {MOST_CHARACTERS:,} characters; the whole report is in the run's artifact\n"
        (out / "issue.md").write_text(
            body if len(body) <= MOST_CHARACTERS else body[:MOST_CHARACTERS] + cut, encoding="utf-8"
        )
    return status


def issue(out: Path, lane: str) -> int:
    """Tell the project, by GitHub's `gh`. Needs nothing installed: it runs apart from what measures."""
    body = out / "issue.md"
    if not body.is_file():
        if (out / "results.json").is_file():
            print("nothing failed: no issue")
            return 0
        out.mkdir(parents=True, exist_ok=True)
        body.write_text("\n".join([_run_link(), "It ended before the suite had measured anything."]), encoding="utf-8")
    title = f"nightly: the suite fails on {lane}"
    query = ("--label", LABEL, "--state", "open", "--json", "number,title")
    asked = ("--jq", f'map(select(.title == "{title}")) | .[0].number // empty')
    found = _gh("issue", "list", *query, *asked).strip()
    if found:
        print(_gh("issue", "comment", found, "--body-file", str(body)))
        return 0
    _gh("label", "create", LABEL, "--force", "--description", "the nightly suite", "--color", "B60205")
    print(_gh("issue", "create", "--title", title, "--label", LABEL, "--body-file", str(body)))
    return 0


def _gh(*arguments: str) -> str:
    return subprocess.run(("gh", *arguments), check=True, stdout=subprocess.PIPE, text=True).stdout


def _run_link() -> str:
    server, repository, run = (os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID"))
    at = f": {server}/{repository}/actions/runs/{run}" if server and repository and run else ", in the artifact"
    return f"Report, results and JUnit of this nightly{at}"


def _summary(lane: str, out: Path, status: int) -> Iterator[str]:
    from pytest_zimage.reports.table import counts_line, verdict_table

    yield f"## {lane}: {'passed' if status == 0 else f'failed (pytest ended with {status})'}"
    found = _read(out)
    if found is None:
        yield from ("", "No results were written. The report ends with:", "", *_fenced(_last_lines(out)))
        return
    yield from ("", counts_line(found.verdicts) if found.verdicts else "no verdicts", "")
    yield from (f"* {error.test}: {error.kind}: {error.message}" for error in found.errors)
    yield from (f"* {note}" for note in found.notes)
    yield from ("", "<details><summary>every verdict</summary>", "")
    yield from _fenced(verdict_table(found.verdicts, width=160).splitlines())
    yield from ("", "</details>", "", *_environment(found))


def _issue(lane: str, out: Path, status: int) -> Iterator[str]:
    from pytest_zimage.reports.delta import delta_text

    yield from (f"`pytest suites -m {lane}` ended with {status}.", _run_link())
    found = _read(out)
    if found is None:
        yield from ("", "No results were written. The report ends with:", "", *_fenced(_last_lines(out)))
        return
    failing = [verdict for verdict in found.verdicts if verdict.outcome in _FAILED]
    yield from ("", *_environment(found), "")
    yield from (line for verdict in failing for line in (*_fenced(delta_text(verdict).splitlines()), ""))
    for error in found.errors:
        yield from (*_fenced([f"{error.test}: {error.kind}: {error.message}", f"  mend: {error.mend}"]), "")
    unjudged = [f"{v.variant} {v.metric}: {v.verdict}" for v in found.verdicts if v.outcome in _OPEN]
    if unjudged:
        yield from ("not judged, which a nightly does not let pass:", "", *_fenced(unjudged))
    if not (failing or found.errors or unjudged):
        yield from ("The report ends with:", "", *_fenced(_last_lines(out)))


def _environment(found: Results) -> Iterator[str]:
    told = [f"{name} {found.environment[name]}" for name in _PACKAGES if name in found.environment]
    yield f"{found.environment.get('device', 'unknown device')}: {', '.join(told)}"


def _read(out: Path) -> Results | None:
    from pytest_zimage.errors import ZImageError
    from pytest_zimage.reports import results as results_file

    path = out / "results.json"
    try:
        return results_file.from_json(path.read_bytes()) if path.is_file() else None
    except ZImageError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return None


def _last_lines(out: Path) -> list[str]:
    return (out / "report.txt").read_text(encoding="utf-8").splitlines()[-60:]


def _fenced(lines: Sequence[str]) -> list[str]:
    return ["~~~~", *(line.replace("~~~~", "~~~") for line in lines), "~~~~"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    installing = steps.add_parser("install")
    installing.add_argument("--torch", action="store_true", help="the newest torch too")
    installing.add_argument("--diffusers", action="store_true", help="the newest diffusers and transformers too")
    measuring, telling = steps.add_parser("suite"), steps.add_parser("issue")
    for step in (measuring, telling):
        step.add_argument("--lane", default="gb10")
        step.add_argument("--out", type=Path, default=ROOT / "nightly")
    ours, _, theirs = (list(part) for part in _split(arguments))
    options = parser.parse_args(ours)
    if options.step == "install":
        return install(options.torch, options.diffusers)
    if options.step == "issue":
        return issue(options.out, options.lane)
    return suite(options.lane, options.out.resolve(), theirs)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at : at + 1], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
