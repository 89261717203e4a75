"""A verdict is its test's own report: what failed, by how much, how sure that is, why, and what to do next."""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ET

import pytest

BEFORE = {"torch": "2.10.0", "driver": "570.1"}
NOW = {"torch": "2.11.0", "driver": "570.1"}


def phases(first: float, steps: float, decode: float) -> dict[str, object]:
    return {"phases": {"text_encode": first, "step_1": steps / 2, "step_2": steps / 2, "vae_decode": decode}}


@pytest.fixture
def recorded(script):
    script.record("bf16,nvfp4", [{**run, **phases(0.1, 0.7, 0.2), "environment": BEFORE} for run in script.QUIET])
    script(bf16=script.QUIET, nvfp4=[{"rounds": [1.2], **phases(0.1, 0.9, 0.2), "environment": NOW}])
    return script


def test_the_whole_delta_is_the_failing_tests_text(recorded):
    done = recorded.run("nvfp4", "--junitxml=out.xml")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    told = [
        "nvfp4 warm latency: SLOWER  1.00 s -> 1.20 s  +20.* % (95 % interval +1*.. +2* %)",
        "  Every fresh run and their mean lie beyond the band, and chance does not explain it (99.9 %).",
        "  band        +/-3.0 %, that is 970 ms .. 1.03 s",
        "  certainty   run-to-run noise 0.* %; smallest change it finds 8 times out of 10: 3.* %",
        "  runs        5 in the baseline, 2 new",
        "              new run 2: median 1.20 s of 10, 1.20 s .. 1.20 s",
        "  phases      steps 1-2: 700 ms -> 900 ms  +28.6 %, *",
        "  environment torch: 2.10.0 -> 2.11.0",
        "  next        to accept it:       pytest test_suite.py --zimage-config nvfp4 --update-baselines *",
        "              to look closer:     pytest test_suite.py -k test_warm_latency --zimage-config nvfp4 *",
    ]
    done.stdout.fnmatch_lines(told)
    assert "driver: " not in done.stdout.str(), "what did not change explains nothing"
    root = ET.parse(recorded.project.path / "out.xml").getroot()[0]
    assert (root.get("failures"), root.get("errors")) == ("1", "0")
    failure = root.find("testcase/failure").text
    pytest.LineMatcher(failure.splitlines()).fnmatch_lines(told)


def test_all_verdicts_stand_in_one_table(recorded):
    done = recorded.run("bf16,nvfp4")
    done.stdout.fnmatch_lines(
        [
            "=* zimage verdicts =*",
            "  variant  metric        verdict *baseline  measured *change *band*",
            "  bf16     warm_latency  PASS *1.00 s    1.00 s *",
            "! nvfp4    warm_latency  SLOWER *1.00 s    1.20 s *+20.* %*",
            "! failed",
            "2 verdicts: 1 pass, 1 regression",
            "next: pytest test_suite.py -k test_warm_latency --zimage-config nvfp4 *",
        ]
    )


def test_the_commands_repeat_what_chose_the_measurement(recorded, tiny):
    done = recorded.run("nvfp4", "--zimage-rounds=4", f"--zimage-tokenizer={tiny}/tokenizer", "-p", "no:randomly")
    for line in done.stdout.lines:
        if "to accept it:" in line or "to look closer:" in line:
            assert f"--zimage-tokenizer={tiny}/tokenizer" in line
            assert "--zimage-rounds=4" in line
    done.stdout.fnmatch_lines(["*to accept it:*"])


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_the_commands_repeat_ini_values_of_the_command_line(recorded, tiny, workers):
    """Those of the ini file are there again by themselves; an option outranks its ini value."""
    given = ["zimage_rounds=7", f"zimage_tokenizer={tiny}/tokenizer", "zimage_rounds=4", "zimage_lpips=alex"]
    others = ["zimage_strict=true", "console_output_style=classic"]
    overrides = [word for text in (*given, *others) for word in ("-o", text)]
    done = recorded.run("nvfp4", *overrides, "--zimage-lpips=tiny-alex", *workers)
    repeated = f"-o zimage_tokenizer={tiny}/tokenizer --zimage-lpips=tiny-alex -o zimage_rounds=4"
    told = [line for line in done.stdout.lines if "--zimage-config nvfp4 " in line]
    assert len(told) == 3
    for line in told:
        assert f"--zimage-config nvfp4 {repeated} --" in line
    again = shlex.split(told[-1].partition("next: pytest ")[2])
    recorded(default=recorded.QUIET)
    assert recorded.project.runpytest_subprocess(*again).ret == 0


def test_last_failed_runs_the_failure_again(recorded):
    ini = recorded.project.path / "tox.ini"
    ini.write_text(ini.read_text().replace("-p no:cacheprovider", ""))
    recorded.run("bf16,nvfp4").assert_outcomes(passed=1, failed=1)
    recorded(default=recorded.QUIET)
    again = recorded.run("bf16,nvfp4", "--lf")
    again.assert_outcomes(passed=1)
    assert recorded.ran[-1] == "nvfp4-1"


def test_a_change_of_the_whole_machine_is_told_as_such(recorded):
    slower = [{"rounds": [1.2]}, {"rounds": [1.21]}]
    recorded(bf16=slower, nvfp4=slower)
    done = recorded.run("bf16,nvfp4")
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(
        ["  notes       ratio to bf16 of this session: *; bf16 moved as much, so the machine or *"]
    )


def test_a_change_of_the_variant_alone_is_told_as_such(recorded):
    recorded(bf16=recorded.QUIET, nvfp4=[{"rounds": [1.2]}])
    done = recorded.run("bf16,nvfp4", "--zimage-runs=2")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*ratio to bf16 of this session: *; bf16 did not move as much, so the change is this *"])


def test_without_bf16_nothing_is_said_of_it(recorded):
    assert "ratio to bf16" not in recorded.run("nvfp4").stdout.str()


def test_what_must_be_equal_tells_each_difference(script):
    script.project.makepyfile(
        test_suite="""
        def test_weights(zimage):
            zimage.gate(zimage.weight_bytes())
        """
    )
    script.record("nvfp4", [{"rounds": [1.0], "weight_bytes": {"nvfp4": 4096, "bfloat16": 100}}])
    script(default=[{"rounds": [1.0], "weight_bytes": {"bfloat16": 16484}}])
    done = script.run("nvfp4")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "nvfp4 bytes held by weights, by storage type: CHANGED *",
            "  changed     bfloat16: 100 B -> 16,484 B (16.1 KiB)",
            "              nvfp4: 4,096 B (4.00 KiB) -> absent",
        ]
    )


def test_an_improvement_passes_and_asks_to_be_recorded(script, results):
    script.record("nvfp4", script.QUIET)
    script(default=[{"rounds": [0.8]}])
    done = script.run("nvfp4")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["[+] nvfp4    warm_latency  FASTER *", "next: pytest *--update-baselines *"])


def test_unsure_is_told_with_what_would_settle_it(script):
    script.record("nvfp4", script.QUIET)
    script(default=[{"rounds": [1.031]}, {"rounds": [1.029]}, {"rounds": [1.030]}])
    done = script.run("nvfp4", "--zimage-strict")
    done.stdout.fnmatch_lines(
        [
            "nvfp4 warm latency: INCONCLUSIVE  1.00 s -> 1.03 s  *",
            "  runs        5 in the baseline, 3 new",
            "  next        to settle it:       pytest * --zimage-runs 5",
        ]
    )
