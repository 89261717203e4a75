"""`--zimage-parity`: another engine must draw the same picture, and where it does not, that is told by its own word."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.judging.parity import precision_of
from pytest_zimage.quality.limits import load_limits

HERE = Path(__file__).parent
SUITE = HERE.parent / "suites" / "test_parity.py"
EXACT = """
[variants.exact]
title = "bf16 weights, computed in float32"
transformer = "z_image_turbo_bf16.safetensors"
text_encoder = "qwen_3_4b.safetensors"
compute_dtype = "float32"
vae_dtype = "float32"

[variants.plain]
title = "bf16 by diffusers' own modules"
transformer = "z_image_turbo_bf16.safetensors"
text_encoder = "qwen_3_4b.safetensors"
kernels = "plain"
"""
REAL = """
from parity_engines import Other

def pytest_zimage_engines(config):
    return {{"other": lambda: Other("{fault}")}}
"""
PAINTED = """
from parity_engines import Painter

def pytest_zimage_engines(config):
    return {{"diffusers": lambda: Painter("{own}"), "other": lambda: Painter("{fault}")}}
"""


@pytest.fixture
def suite(project, monkeypatch):
    """A project with the suite of parity and two variants more; `suite(conftest, ...)` is a session."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    (project.path / "test_suite.py").unlink()
    (project.path / "mine.toml").write_text(EXACT)
    shutil.copy(SUITE, project.mkdir("suites"))

    def run(conftest, *arguments, config="exact"):
        project.makeconftest(conftest)
        return project.runpytest_subprocess(
            "suites", "--zimage-catalog=mine.toml", f"--zimage-config={config}", *arguments
        )

    return run


@pytest.fixture
def draws(suite):
    """The real engine against itself with `fault`."""
    return lambda fault, *arguments, **more: suite(
        REAL.format(fault=fault), "--zimage-parity=other", *arguments, **more
    )


@pytest.fixture
def paints(suite):
    """Two engines without a model that call themselves the same, the other with `fault`."""
    return lambda fault, *arguments, own="none": suite(
        PAINTED.format(own=own, fault=fault), "--zimage-parity=other", *arguments
    )


# ---- the same picture --------------------------------------------------------


def test_truncating_where_the_other_rounds_is_the_same_picture(draws, results):
    """51.1 dB is what truncation alone takes from equal floats."""
    draws("truncating").assert_outcomes(passed=1)
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["metric"], row["unit"], row["k_new"]) == ("PASS", "parity", "dB", 2)
    assert 50.9 < row["value"] < 51.6
    assert row["notes"][0].startswith("diffusers and other draw the same picture: PSNR photo_woman/42 51.")
    assert row["notes"][0].endswith("; 50.00 dB is the least in float32")
    assert results()["runs"] == [], "nothing is timed for it"


def test_the_same_engine_twice_is_equal_in_every_precision(draws, results):
    draws("none", config="exact,bf16").assert_outcomes(passed=2)
    assert {row["variant"]: row["value"] for row in results()["verdicts"]} == {"bf16": 60.0, "exact": 60.0}
    assert any("44.00 dB is the least in bfloat16" in row["notes"][0] for row in results()["verdicts"])


# ---- another one ---------------------------------------------------------------


def test_another_sampler_is_told_with_all_that_differs(draws, results):
    done = draws("sampler")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "exact parity: ENGINES DIFFER  measured * dB",
            "  notes       diffusers and other draw different pictures: PSNR photo_woman/42 * dB, photo_machine/42 *",
            "* of its pixels differ, by up to * of 255",
            "*exact-parity-diffusers/photo_woman-42.png and *exact-parity-other/photo_woman-42.png",
            "*this is about two engines; whether exact regressed in one is for its own baselines to say",
            "*torch: * in diffusers, 9.9 in other",
            "*only other says: other_flags --fast",
            "  next *--zimage-parity=other*",
        ]
    )
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["outcome"]) == ("ENGINES DIFFER", "error")
    assert 25 < row["value"] < 35


def test_another_seed_is_another_picture_even_if_nobody_can_be_asked(paints, results):
    paints("seed").assert_outcomes(failed=1)
    (row,) = results()["verdicts"]
    assert row["value"] < 15
    assert row["notes"][-1] == "what the two run with could not be asked: the server of none is gone"


def test_a_fault_is_put_into_one_side_only(draws, results):
    draws("none", "--zimage-inject=quality=noise:0.02").assert_outcomes(failed=1)
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["injected"]) == ("ENGINES DIFFER", True)
    assert any(note.startswith("probable cause: noise lies over 2 of 2 images") for note in row["notes"])


# ---- no picture ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("size", "*photo_woman-42.png: *64x64*"),
        (
            "order",
            "other drew photo_machine/42, photo_woman/42 where photo_woman/42, photo_machine/42 were asked for",
        ),
        ("fewer", "other drew photo_woman/42 where photo_woman/42, photo_machine/42 were asked for"),
        ("dead", "the other server is gone"),
    ],
)
def test_what_was_not_drawn_as_asked_is_an_error(paints, results, fault, says):
    done = paints(fault)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([says])
    assert "Traceback" not in done.stdout.str()
    assert results()["verdicts"] == []


def test_two_black_images_are_not_the_same_picture(paints, results):
    done = paints("black", own="black")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["diffusers drew no pictures that could be equal to another's: photo_woman/42: *"])
    assert results()["verdicts"] == []


# ---- the option ----------------------------------------------------------------


def test_without_it_nothing_is_drawn_and_the_option_is_named(suite, project):
    done = suite(PAINTED.format(own="dead", fault="dead"), "--zimage-strict", "-rs", config="exact,bf16")
    done.assert_outcomes(skipped=2)
    assert done.ret == 0
    done.stdout.fnmatch_lines(["*zimage parity: no other engine is named: --zimage-parity ENGINE"])
    assert not (project.path / ".zimage" / "results").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("comfy", "ERROR: unknown engine 'comfy'"),
        ("diffusers", "ERROR: --zimage-parity diffusers is the engine itself"),
    ],
)
def test_an_engine_that_cannot_be_the_other_is_a_usage_error(paints, name, says):
    done = paints("none", f"--zimage-parity={name}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([says])


def test_the_ini_value_names_it_too(suite, project, results):
    with (project.path / "tox.ini").open("a") as ini:
        ini.write("\nzimage_parity = other\n")
    suite(PAINTED.format(own="none", fault="none")).assert_outcomes(passed=1)


# ---- the limits ----------------------------------------------------------------


def test_the_coarsest_type_decides_the_limit(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(EXACT)
    catalog = load_catalog([path])
    assert precision_of(catalog.variant("exact")) == "float32"
    assert {precision_of(catalog.variant(name)) for name in ("bf16", "plain", "nvfp4")} == {"bfloat16"}


def test_the_limit_of_float32_lies_below_what_truncation_takes():
    """Truncation is off by up to one step, evenly: a mean square of 1/3 at most, or 0.5 once the other side rounds."""
    limits = load_limits().parity
    assert limits.bfloat16 < limits.float32 < 51.1
