"""The delta report: what a person reads whose change failed the gate."""

from __future__ import annotations

import shlex

import pytest
from verdicts import SLOWER, but

from pytest_zimage.reports import commands, units
from pytest_zimage.reports.delta import delta_text, headline
from pytest_zimage.verdict.model import Verdict

EXACT = Verdict(
    test="suites/test_memory.py::test_weight_bytes[nvfp4]",
    variant="nvfp4",
    metric="weight_bytes",
    unit="bytes",
    verdict="CHANGED",
    outcome="changed",
    value={"bfloat16": 1 << 30, "nvfp4": 4096, "int8": 7},
    baseline={"bfloat16": 1 << 30, "nvfp4": 8192, "float8_e4m3fn": 100},
)


def command(text: str, label: str) -> list[str]:
    """The command after `label`, split as a shell would."""
    (line,) = [line for line in text.splitlines() if label in line]
    return shlex.split(line.partition(label)[2])


def test_headline_is_the_whole_story_in_one_line():
    assert headline(SLOWER, "warm latency") == (
        "nvfp4 warm latency: SLOWER  5.50 s -> 6.61 s  +20.1 % (95 % interval +18.9 .. +21.4 %)"
    )


def test_regression_says_what_was_expected_seen_how_sure_and_why():
    text = delta_text(SLOWER)
    for expected in (
        "band        +/-3.0 %, that is 5.33 s .. 5.67 s",
        "run-to-run noise 0.70 %",
        "8 times out of 10: 3.1 %",
        "5 in the baseline, 2 new",
        "new run 1: median 6.61 s of 3, 6.60 s .. 6.63 s",
        "new run 2: median 6.64 s of 2, 6.58 s .. 6.70 s",
        "torch: 2.10.0 -> 2.11.0",
        "not recorded with the baseline: bios",
        "a fresh run was taken to confirm",
    ):
        assert expected in text
    assert "bios: (not recorded)" not in text


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"baseline": 0.9965, "band": 0.02, "limits": (-1.0, 1.0)}, "+/-0.0200, that is 0.9765 .. 1.0000"),
        ({"baseline": 0.0, "band": 0.05, "limits": (0.0, None)}, "+/-0.0500, that is 0.0000 .. 0.0500"),
        ({"baseline": 0.3, "band": 0.05, "limits": (None, None)}, "+/-0.0500, that is 0.2500 .. 0.3500"),
        ({"baseline": -0.01, "band": 0.02}, "+/-0.0200, that is -0.0300 .. 0.0100"),
        ({"baseline": 32 << 20, "band": 2.0, "scale": "relative", "unit": "bytes"}, "that is 0 B .. 96.0 MiB"),
    ],
)
def test_the_band_ends_where_the_metric_does(figures, told):
    assert told in delta_text(but(**{"scale": "absolute", "unit": "score", **figures}))


def test_few_of_many_keys_that_were_not_recorded_are_named():
    unknown = dict.fromkeys("fedcba", ("(not recorded)", "1"))
    text = delta_text(but(SLOWER, environment_changed=unknown))
    assert "  environment not recorded with the baseline: a, b, c, d and 2 more\n" in text


def test_a_number_and_its_percent_sign_stay_on_one_line():
    drifted = delta_text(but(SLOWER, scale="absolute"))
    assert "(99.9 %)" in drifted
    assert "\N{NO-BREAK SPACE}" not in drifted


def test_phases_that_moved_most_come_first_with_their_share():
    lines = delta_text(SLOWER).splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("  phases"))
    assert lines[at].endswith("steps 1-8: 5.20 s -> 6.24 s  +20.0 %, 94 % of the change")
    assert lines[at + 1].endswith("vae_decode: 200 ms -> 260 ms  +30.0 %, 5 % of the change")
    assert lines[at + 2].endswith("text_encode: 100 ms -> 100 ms  +0.00 %, 0 % of the change")


def test_one_step_that_explains_the_steps_is_named():
    phases = {f"step_{number}": (0.5, 0.5) for number in range(1, 9)} | {"step_1": (0.5, 1.6), "to_image": (0.1, 0.1)}
    assert "steps 1-8: 4.00 s -> 5.10 s  +27.5 %, 99 % of the change, mostly step_1" in delta_text(but(phases=phases))
    assert "mostly" not in delta_text(SLOWER)


def test_phases_against_each_other_show_no_share():
    text = delta_text(but(value=5.51, phases={"read": (1.0, 2.0), "build": (2.0, 1.0)}))
    assert "read: 1.00 s -> 2.00 s  +100.0 %" in text
    assert "of the change" not in text


def test_phases_without_a_baseline():
    text = delta_text(but(phases={"read": (None, 2.0), "build": (None, 0.5)}))
    assert "the baseline has none; measured read 2.00 s, build 500 ms" in text
    assert "new, without a baseline: build 500 ms" in delta_text(but(phases={"read": (1.0, 2.0), "build": (None, 0.5)}))


def test_commands_can_be_run_as_they_stand():
    text = delta_text(SLOWER, options=["--zimage-models", "/my models"])
    accept, closer = command(text, "to accept it:"), command(text, "to look closer:")
    assert accept[:6] == ["pytest", "suites", "--zimage-config", "nvfp4", "--zimage-models", "/my models"]
    assert accept[6:8] == ["--update-baselines", "--update-reason"]
    assert len(accept) == 9
    assert accept[8].strip()
    assert closer == [
        *("pytest", "suites", "-k", "test_warm_latency", "--zimage-config", "nvfp4"),
        *("--zimage-models", "/my models", "--zimage-runs", "3"),
    ]


@pytest.mark.parametrize(
    ("test", "suite", "function"),
    [
        ("suites/test_a.py::test_b[nvfp4]", "suites", "test_b"),
        ("tests/speed/test_a.py::TestX::test_b[a::b]", "tests/speed", "test_b"),
        ("test_a.py::test_b", "test_a.py", "test_b"),
        ("", "suites", ""),
    ],
)
def test_commands_name_the_users_own_suite(test, suite, function):
    assert commands.suite_of(test) == suite
    assert commands.function_of(test) == function


def test_pass_is_one_line():
    text = delta_text(but(outcome="pass", verdict="PASS", value=5.51, change=0.0018, interval=(-0.01, 0.013)))
    assert text.splitlines() == ["nvfp4 warm latency: PASS  5.50 s -> 5.51 s  +0.18 % (95 % interval -1.0 .. +1.3 %)"]


def test_improvement_asks_to_be_recorded():
    text = delta_text(but(outcome="improvement", verdict="FASTER", value=5.0, change=-0.0909, interval=(-0.1, -0.08)))
    assert "FASTER  5.50 s -> 5.00 s  -9.1 %" in text
    assert "record the new one" in " ".join(text.split())
    assert "--update-baselines" in command(text, "to accept it:")


def test_inconclusive_says_how_much_sensitivity_is_missing():
    text = delta_text(but(outcome="inconclusive", verdict="INCONCLUSIVE", change=0.01, interval=(-0.03, 0.05)))
    assert "must shrink from +/-4.0 % to +/-2.0 %" in " ".join(text.split())
    assert "not a pass" in text
    assert command(text, "to settle it:")[-2:] == ["--zimage-runs", "5"]
    assert "--update-baselines" not in text, "runs that may be slower must not creep into the baseline"


def test_inconclusive_beyond_the_band_asks_for_no_narrower_interval():
    text = delta_text(but(outcome="inconclusive", verdict="INCONCLUSIVE", change=0.05, interval=(-0.01, 0.11)))
    assert "beyond the band, but not in every run" in " ".join(text.split())
    assert "shrink" not in text


def test_no_baseline_shows_the_reference_and_the_command_that_records_one():
    text = delta_text(
        but(
            outcome="no-baseline",
            verdict="NO BASELINE",
            baseline=None,
            change=None,
            interval=None,
            reference="published: 5.50 s on a DGX Spark",
            environment_changed={},
        )
    )
    assert text.startswith("nvfp4 warm latency: NO BASELINE  measured 6.61 s\n")
    assert "not a pass" in text
    assert "published: 5.50 s on a DGX Spark" in text
    assert "--update-baselines" in command(text, "to record one:")
    assert "environment" not in text


def test_unfit_and_error_are_no_passes_either():
    text = delta_text(but(outcome="unfit", verdict="UNFIT", notes=("another process uses 80 % of the CPU",)))
    assert "not a pass" in text
    assert "another process uses 80 %" in text
    assert "--update-baselines" not in text
    error = delta_text(but(outcome="error", verdict="ERROR", value=None, baseline=None, samples=((),)))
    assert "no verdict" in error
    assert "new run 1: no rounds" in error


def test_changed_names_each_part_old_to_new():
    text = delta_text(EXACT)
    assert text.startswith("nvfp4 weight bytes: CHANGED  3 of its parts changed\n")
    assert "float8_e4m3fn: 100 B -> absent" in text
    assert "int8: absent -> 7 B" in text
    assert "nvfp4: 8,192 B (8.00 KiB) -> 4,096 B (4.00 KiB)" in text
    assert "bfloat16" not in text


def test_changed_scalar_shows_every_digit():
    text = headline(but(EXACT, metric="disk_bytes", value=12_309_866_401, baseline=12_309_866_400))
    assert "12,309,866,400 B (11.5 GiB) -> 12,309,866,401 B (11.5 GiB)" in text


def test_injected_is_marked_and_never_offers_to_become_a_baseline():
    for outcome in ("regression", "pass", "inconclusive"):
        text = delta_text(but(outcome=outcome, injected=True))
        assert "[INJECTED]" in text.splitlines()[0]
        assert "injected on purpose" in text
        assert "--update-baselines" not in text


def test_text_is_plain_ascii_without_colours():
    for verdict in (SLOWER, EXACT, but(injected=True), but(outcome="inconclusive")):
        text = delta_text(verdict)
        assert text.isascii()
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.seconds(5.5), "5.50 s"),
        (units.seconds(60.94), "60.9 s"),
        (units.seconds(0.5123), "512 ms"),
        (units.seconds(0.99999), "1.00 s"),
        (units.seconds(9.999), "10.0 s"),
        (units.seconds(1234.5), "1234 s"),
        (units.seconds(0.000_012_34), "12.3 us"),
        (units.seconds(0), "0 s"),
        (units.seconds(-0.25), "-250 ms"),
        (units.seconds(None), "-"),
        (units.size(512), "512 B"),
        (units.size(1536), "1.50 KiB"),
        (units.size(1_048_575), "1.00 MiB"),
        (units.size(12_309_866_400), "11.5 GiB"),
        (units.size(-(64 << 20)), "-64.0 MiB"),
        (units.size(2**41), "2.00 TiB"),
        (units.percent(0.2014), "+20.1 %"),
        (units.percent(-0.0035), "-0.35 %"),
        (units.percent(-0.000_001), "+0.00 %"),
        (units.percent(0.03, signed=False), "3.0 %"),
        (units.percent(None), "-"),
        (units.interval((-0.01, 0.013)), "-1.0 .. +1.3 %"),
        (units.value({"b": 2, "a": 1}, "count"), "a 1, b 2"),
        (units.value({}, "count"), "nothing"),
        (units.value(8, "count"), "8"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected
