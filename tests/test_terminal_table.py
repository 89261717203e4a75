"""The tables of the terminal summary."""

from __future__ import annotations

import shlex

import pytest
from msgspec import structs
from verdicts import SLOWER as LATENCY
from verdicts import but

from pytest_zimage.baselines.update import UpdateResult
from pytest_zimage.reports.table import counts_line, update_table, verdict_table
from pytest_zimage.verdict.model import Verdict

PASS = but(
    LATENCY,
    test="suites/test_warm_latency.py::test_warm_latency[bf16]",
    variant="bf16",
    verdict="PASS",
    outcome="pass",
    value=5.51,
    change=0.0018,
    interval=(-0.01, 0.013),
)
SLOWER = but(PASS, variant="nvfp4-fp8e", verdict="SLOWER", outcome="regression", value=6.61, change=0.2014)
MISSING = but(
    PASS,
    metric="rss_peak",
    unit="bytes",
    verdict="NO BASELINE",
    outcome="no-baseline",
    value=6.6e9,
    baseline=None,
    change=None,
)
CHANGED = but(
    PASS,
    metric="weight_bytes",
    unit="bytes",
    verdict="CHANGED",
    outcome="changed",
    value={"nvfp4": 4096, "bfloat16": 1 << 30},
    baseline={"nvfp4": 8192, "float8": 100, "bfloat16": 1 << 30},
    change=None,
)
ALL = [PASS, SLOWER, MISSING, CHANGED]


def columns(table: str) -> list[str]:
    """Header names, in order."""
    return [name.strip() for name in table.splitlines()[0].split("  ") if name.strip()]


def test_one_row_per_verdict_in_suite_order_and_marked():
    rows = verdict_table(ALL, width=200).splitlines()[1:5]
    assert [row[:2] for row in rows] == ["  ", "! ", "? ", "! "]
    assert [row[2:].split()[0] for row in rows] == ["bf16", "nvfp4-fp8e", "bf16", "bf16"]
    assert "6.61 s   +20.1 %" in rows[1]
    assert "3 differ" not in rows[3]
    assert "2 differ" in rows[3]


def test_columns_line_up():
    header, *rows = verdict_table(ALL, width=200).splitlines()[:5]
    for name in ("verdict", "metric"):
        at = header.index(name)
        assert all(row[at - 1] == " " and row[at] != " " for row in rows)
    end = header.index("measured") + len("measured")
    assert all(row[end - 1] != " " and row[end] == " " for row in rows)


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (200, []),
        (106, ["noise"]),
        (98, ["noise", "finds"]),
        (91, ["noise", "finds", "95 % interval"]),
    ],
)
def test_columns_go_in_the_stated_order(width, gone):
    every = [
        "variant",
        "metric",
        "verdict",
        "baseline",
        "measured",
        "change",
        "95 % interval",
        "band",
        "noise",
        "finds",
    ]
    table = verdict_table(ALL, width=width)
    assert columns(table) == [name for name in every if name not in gone]
    assert all(len(line) <= width for line in table.splitlines()[:5])


@pytest.mark.parametrize("width", [1, 40, 80, 97, 120])
def test_never_wider_than_the_terminal_and_eighty_is_the_least(width):
    long = but(SLOWER, variant="my-own-variant-with-a-name-that-says-everything-about-it", outcome="inconclusive")
    for line in verdict_table([*ALL, long], width=width).splitlines()[:6]:
        assert len(line) <= max(width, 80)
    assert {"variant", "metric", "verdict", "measured", "change"} <= set(columns(verdict_table([long], width=width)))


def test_counts_and_legend():
    lines = verdict_table([*ALL, but(PASS, injected=True)]).splitlines()
    assert lines[-2] == "5 verdicts: 2 pass, 1 no baseline, 1 changed, 1 regression"
    assert "! failed   ? not judged   * injected" in lines
    assert any("PASS*" in line for line in lines)
    assert verdict_table([PASS]).splitlines()[-2] == "1 verdict: 1 pass"


@pytest.mark.parametrize(
    ("outcome", "many"),
    [
        ("regression", "3 regressions"),
        ("improvement", "3 improvements"),
        ("error", "3 errors"),
        *((outcome, f"3 {outcome}") for outcome in ("pass", "seen", "changed", "inconclusive", "unfit")),
        ("no-baseline", "3 no baseline"),
    ],
)
def test_what_is_counted_stands_in_the_plural_where_english_has_one(outcome, many):
    assert counts_line([but(PASS, outcome=outcome)] * 3) == f"3 verdicts: {many}"
    assert counts_line([but(PASS, outcome=outcome)]) == f"1 verdict: 1 {outcome.replace('-', ' ')}"


def next_command(*verdicts: Verdict, options: list[str] | None = None) -> list[str]:
    last = verdict_table(verdicts, options=options or []).splitlines()[-1]
    assert last.startswith("next: ")
    return shlex.split(last.removeprefix("next: "))


def test_last_line_names_the_command_that_helps_most():
    assert next_command(PASS, MISSING, SLOWER)[:6] == [
        *("pytest", "suites", "-k", "test_warm_latency", "--zimage-config", "nvfp4-fp8e")
    ]
    record = next_command(
        PASS, MISSING, but(MISSING, variant="nvfp4"), but(MISSING), options=["--zimage-device", "cpu"]
    )
    assert record[2:6] == ["--zimage-config", "bf16,nvfp4", "--zimage-device", "cpu"]
    assert record[6:9] == ["--update-baselines", "--update-mode", "new"]
    assert "--update-baselines" in next_command(PASS, but(PASS, outcome="improvement", verdict="FASTER"))
    assert "--update-baselines" not in next_command(but(PASS, outcome="inconclusive"), MISSING)
    assert verdict_table([PASS]).splitlines()[-1] == "next: nothing to do, all that was judged is a pass"


def test_claims_of_another_machine_have_lines_instead_of_rows():
    order = " < ".join(f"policy-with-a-long-name-{number} {number}.00 s" for number in range(1, 8))
    seen = but(PASS, outcome="seen", verdict="SEEN", metric="order", claim="x", claim_of="gb10", notes=(order,))
    other = but(seen, metric="speedup", notes=("nvfp4 / bf16 = 0.7; as claimed", "a note"))
    lines = verdict_table([seen, other], width=80).splitlines()
    assert lines[0] == "  claims of gb10"
    assert [line.split()[0] for line in lines[1:4]] == ["order", "policy-with-a-long-name-5", "speedup"]
    assert max(map(len, lines)) <= 160
    assert lines[-1].startswith("next: nothing to do: claims of another machine")
    both = verdict_table([PASS, seen]).splitlines()
    assert [line.split()[0] for line in both[:2]] == ["variant", "bf16"]
    assert both[-2:] == ["2 verdicts: 1 pass, 1 seen", "next: nothing to do, all that was judged is a pass"]


def test_nothing_measured_is_not_an_empty_success():
    assert verdict_table([]) == "no verdicts: nothing was measured"
    assert "nothing was measured" in update_table([])


def test_tables_survive_any_terminal_encoding():
    for table in (verdict_table(ALL, width=200), update_table(UPDATES)):
        assert table.encode("ascii").decode() == table
        assert "\x1b" not in table


UPDATES = [
    UpdateResult(variant="bf16", metric="warm_latency", unit="s", action="recorded", old=7.55, new=7.20),
    UpdateResult(
        variant="bf16",
        metric="linears",
        unit="count",
        action="recorded",
        old={"plain": 3, "cast": 1},
        new={"plain": 4},
    ),
    UpdateResult(variant="nvfp4-fp8e", metric="rss_peak", unit="bytes", action="recorded", old=None, new=3e9),
    UpdateResult(
        variant="nvfp4",
        metric="rss_peak",
        unit="bytes",
        action="refused",
        old=2e9,
        new=3e9,
        reason="the measurement was injected",
    ),
]


def test_update_table_shows_old_to_new_and_every_refusal():
    lines = update_table(UPDATES).splitlines()
    assert "7.55 s    7.20 s  -4.6 %" in lines[1]
    assert "cast: 1 -> absent; plain: 3 -> 4" in lines[2]
    assert lines[3].endswith("2.79 GiB  first")
    assert lines[4].startswith("! nvfp4 ")
    assert lines[4].endswith("refused: the measurement was injected")
    assert lines[-1] == "3 recorded, 1 refused"


def test_update_table_tells_once_why_most_of_it_stayed():
    new = UpdateResult(variant="bf16", metric="ssim", unit="score", action="recorded", old=None, new=0.99)
    there = structs.replace(new, action="kept", old=0.99, reason="has a baseline already")
    silent = structs.replace(there, new=None, reason="not measured: the driver tells nothing")
    equal = structs.replace(there, action="unchanged", reason="")
    lines = update_table([new, there, there, silent, equal, equal], width=200).splitlines()
    ends = ["first", "kept", "kept", "kept: not measured: the driver tells nothing", "unchanged", "unchanged"]
    assert [line.rpartition("  ")[2] for line in lines[1:7]] == ends
    assert lines[7:] == ["kept: has a baseline already", "", "1 recorded, 3 kept, 2 unchanged"]
    assert update_table([new, there]).splitlines()[2].endswith("kept: has a baseline already")


def test_update_table_never_cuts_a_reason():
    row = structs.replace(UPDATES[3], reason="because " * 30 + "so")
    assert update_table([row]).splitlines()[1].endswith("so")
