"""What could not be judged is skipped under its own name and letter, and fails with `--zimage-strict`."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

SUITE = """
def test_cold_load(zimage):
    zimage.gate(zimage.cold_load())
"""
UNSURE = [{"rounds": [1.031]}, {"rounds": [1.029]}, {"rounds": [1.030]}]
WARM_CACHE = [{"rounds": [1.0], "cold": 4.0, "emptied": False}]


def no_baseline(script):
    script(default=[{"rounds": [1.0]}])


def inconclusive(script):
    script.record("nvfp4", script.QUIET)
    script(default=UNSURE)


def unfit(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    script(default=WARM_CACHE)


CASES = [
    (no_baseline, "NO BASELINE", "N", "without baseline", "no baselines in *"),
    (inconclusive, "INCONCLUSIVE", "I", "inconclusive", "The runs neither stay inside the band nor leave it *"),
    (unfit, "UNFIT", "U", "unfit", "the page cache was not emptied before the fresh runs and was before *"),
]


@pytest.mark.parametrize(("prepare", "word", "letter", "category", "why"), CASES)
def test_skipped_loudly_by_default(script, results, prepare, word, letter, category, why):
    prepare(script)
    done = script.run("nvfp4", "--junitxml=out.xml")
    assert done.ret == 0
    done.stdout.fnmatch_lines([f"test_suite.py {letter} *", f"[?] nvfp4 * {word} *", f"=* 1 {category} in *"])
    assert "passed" not in done.stdout.lines[-1]
    assert [verdict["verdict"] for verdict in results()["verdicts"]] == [word]
    suite = ET.parse(script.project.path / "out.xml").getroot()[0]
    assert (suite.get("skipped"), suite.get("failures"), suite.get("errors")) == ("1", "0", "0")
    assert f"zimage {word}: nvfp4" in suite.find("testcase/skipped").get("message")


@pytest.mark.parametrize(("prepare", "word", "letter", "category", "why"), CASES)
def test_strict_fails_it_and_says_why(script, prepare, word, letter, category, why):
    prepare(script)
    done = script.run("nvfp4", "--zimage-strict")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([f"nvfp4 *: {word} *", f"*{why}", "*next *pytest *"])


def test_the_ini_value_does_too(script):
    no_baseline(script)
    with (script.project.path / "tox.ini").open("a") as ini:
        ini.write("\nzimage_strict = true\n")
    script.run("nvfp4").assert_outcomes(failed=1)


@pytest.mark.parametrize("prepare", [case[0] for case in CASES])
def test_verbose_has_the_whole_word(script, prepare):
    prepare(script)
    word = next(case[1] for case in CASES if case[0] is prepare)
    script.run("nvfp4", "-v").stdout.fnmatch_lines([f"test_suite.py::*nvfp4* {word} *"])


def test_strict_leaves_a_pass_alone(script):
    script.record("nvfp4", script.QUIET)
    script(default=script.QUIET)
    script.run("nvfp4", "--zimage-strict").assert_outcomes(passed=1)


def test_a_part_of_a_gate_that_cannot_be_judged_is_not_green(script):
    """Two metrics, one passes and one is unfit: not a pass."""
    script.project.makepyfile(
        test_suite="""
        def test_both(zimage):
            zimage.gate(zimage.warm_latency(), zimage.cold_load())
        """
    )
    script.record("nvfp4", script.QUIET)
    script(default=WARM_CACHE)
    done = script.run("nvfp4")
    done.assert_outcomes(passed=0)
    done.stdout.fnmatch_lines(["=* 1 unfit in *"])
    script.run("nvfp4", "--zimage-strict").assert_outcomes(failed=1)
