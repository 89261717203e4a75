"""Where an engine does not trace, a variant's images must differ from those of the twin that multiplies unquantised."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import PORTABLE

SUITES = Path(__file__).parents[1] / "suites"
ROUNDS = "--zimage-rounds=3"
CAST = ["a", "b", "c"]


def run(pixels=CAST, seeds=(1, 2, 3), **changes):
    return {"rounds": [1.0], "dispatch": None, "pixels": list(pixels), "seeds": list(seeds), **changes}


@pytest.fixture
def suite(script):
    shutil.copy(SUITES / "test_dispatch.py", script.project.path / "test_suite.py")
    return script


def judged(suite, fast, cast, *arguments, names="fp8-cast-fast"):
    suite(fp8_cast_fast=[fast], fp8_cast=[cast])
    return suite.run(names, ROUNDS, "-k", "quantised_layers", *arguments)


def test_a_fast_path_that_is_the_cast_fails_by_name(suite, results):
    done = judged(suite, run(emulated=["nvfp4", "mxfp8"], unquantised=["it casts, without a word"]), run())
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "fp8-cast-fast quantised_layers: NOT QUANTISED  measured 3",
            "  notes       each of 3 images is to the last bit that of the twin fp8-cast, which multiplies unquantised",
            "              it casts, without a word",
            "              diffusers says that it emulates nvfp4, mxfp8 on cpu, by dequantising",
        ]
    )
    assert suite.ran == ["fp8-cast-fast-1", "fp8-cast-1"], "the twin is measured, though nobody asked for it"
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["outcome"], row["value"]) == ("NOT QUANTISED", "error", 3.0)


def test_images_of_its_own_pass_and_say_how_many(suite, results):
    judged(suite, run(["x", "y", "c"], unquantised=["it casts"]), run()).assert_outcomes(passed=1)
    (row,) = results()["verdicts"]
    assert row["notes"] == ["images differ from those of its twin fp8-cast: 2 of 3"]


def test_a_twin_that_ran_in_this_session_is_not_run_again(suite):
    done = judged(suite, run(["x", "y", "z"]), run(), names="fp8-cast,fp8-cast-fast")
    done.assert_outcomes(passed=1, skipped=1)
    assert sorted(suite.ran) == ["fp8-cast-1", "fp8-cast-fast-1"]


def test_rounds_are_paired_by_seed_and_not_by_their_place(suite):
    """One round of each was made anew from another seed; the others are equal, and in another order."""
    done = judged(suite, run(["c", "q", "b"], [3, 1001, 2]), run(["a", "b", "c"], [1, 2, 3]))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*NOT QUANTISED*", "*each of 2 images is to the last bit that of the twin*"])


def test_rounds_that_name_no_seed_are_of_the_workloads(suite):
    done = judged(suite, run(["a"] * 3, [None] * 3), run(["a"] * 3, [None] * 3))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*the one image that both drew is to the last bit that of the twin fp8-cast*"])
    judged(suite, run(["x"] * 3, [None] * 3), run(["a"] * 3, [None] * 3)).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("fast", "cast", "says"),
    [
        (run(), run(seeds=[7, 8, 9]), "*its twin fp8-cast drew no round from the same seed*"),
        (run(["a"] * 3, [None] * 3), run(), "*its twin fp8-cast drew no round from the same seed*"),
        (run(["a", "x", "c"], [1, 1, 3]), run(), "fp8-cast-fast: diffusers drew two images from seed 1*"),
        (run(), run(["a", "x", "x"], [None] * 3), "fp8-cast: diffusers drew two images from the workload's seed*"),
        (
            run(environment={"weights.transformer": "1111"}),
            run(environment={"weights.transformer": "2222"}),
            "*were not drawn from the same weights.transformer: 1111 and 2222",
        ),
        (run(), {"error": "EngineError", "message": "the twin's server died"}, "*the twin's server died"),
    ],
)
def test_what_cannot_be_compared_is_an_error_and_no_pass(suite, fast, cast, says):
    done = judged(suite, fast, cast)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([says])
    assert "Traceback" not in done.stdout.str()


def test_a_twin_that_differs_in_more_than_its_products_is_refused(suite):
    (suite.project.path / "mine.toml").write_text(
        """
        [variants.mine]
        title = "another text encoder beside"
        transformer = "z_image_turbo_bf16.safetensors"
        text_encoder = "qwen_3_4b_fp8_mixed.safetensors"
        weight_dtype = "fp8_e4m3fn_fast"
        attention = "flash"
        twin = "fp8-cast"
        """
    )
    suite(mine=[run(["x", "y", "z"])], fp8_cast=[run()])
    done = suite.run("mine", ROUNDS, "-k", "quantised_layers", "--zimage-catalog=mine.toml")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        ["fp8-cast is no twin of mine: they differ in text_encoder, attention, which changes images too"]
    )


def test_without_a_twin_it_is_a_skip_that_says_what_the_engine_does(suite):
    suite(nvfp4=[run(emulated=["nvfp4"])])
    done = suite.run("nvfp4", ROUNDS, "-rs", "-k", "quantised_layers")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(
        [
            "*zimage dispatch: diffusers does not report dispatch; nvfp4 names no twin; diffusers says that it emulates"
            " nvfp4 on cpu, by dequantising"
        ]
    )


def test_a_trace_is_believed_and_no_twin_is_run(suite):
    compute = {"plain": 8, "quantised-activations": 30}
    linears = {"linear: plain": 64, "linear: quantised-activations": 240}
    done = judged(suite, run(dispatch=linears, compute=compute), run())
    done.assert_outcomes(passed=1)
    assert suite.ran == ["fp8-cast-fast-1"]


def test_recording_fails_too(suite):
    """The map cannot be recorded where nothing traces; the check is made all the same."""
    done = judged(suite, run(), run(), "--update-baselines", "--update-reason=no", "--zimage-runs=1")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*NOT QUANTISED*"])
    assert not (suite.project.path / PORTABLE).exists()
