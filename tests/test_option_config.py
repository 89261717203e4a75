"""`--zimage-config`: which variants run."""

from __future__ import annotations

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import CatalogError

ANYWHERE = ["bf16", "fp8-cast", "fp8-cast-fast", "fp8-scaled", "nvfp4", "nvfp4-fp8e"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], [*ANYWHERE, "bf16-compile"]),
        (["nvfp4"], ["nvfp4"]),
        (["nvfp4", "bf16"], ["bf16", "nvfp4"]),
        (["fp8-*"], ["fp8-cast", "fp8-cast-fast", "fp8-scaled"]),
        (["@nvfp4"], ["nvfp4", "nvfp4-fp8e"]),
        (["*fp8*", "fp8-cast"], ["fp8-cast", "fp8-cast-fast", "fp8-scaled", "nvfp4-fp8e"]),
    ],
)
def test_selection_keeps_catalogue_order(patterns, names):
    assert [variant.name for variant in load_catalog().select(patterns)] == names


def test_close_matches_are_offered():
    with pytest.raises(CatalogError, match="unknown variant 'nvpf4'; did you mean 'nvfp4'"):
        load_catalog().select(["nvpf4"])


def test_unknown_tag_lists_the_known():
    known = "bf16, compile, fp8, nvfp4"
    with pytest.raises(CatalogError, match=rf"no variant has the tag @int8\n  mend: known tags: {known}"):
        load_catalog().select(["@int8"])


@pytest.mark.parametrize(
    "arguments", [["--zimage-config", "nvfp4,bf16"], ["--zimage-config", "nvfp4", "--zimage-config", "bf16"]]
)
def test_commas_and_repetition(script, arguments):
    script(default=[{"rounds": [1.0]}])
    script.project.runpytest_subprocess(*arguments)
    assert script.ran == ["bf16-1", "nvfp4-1"]


def test_the_ini_value_serves_and_the_command_line_wins(script):
    script(default=[{"rounds": [1.0]}])
    with (script.project.path / "tox.ini").open("a") as ini:
        ini.write("\nzimage_config =\n    nvfp4\n    bf16\n")
    script.project.runpytest_subprocess()
    assert script.ran == ["bf16-1", "nvfp4-1"]
    script.project.runpytest_subprocess("--zimage-config", "fp8-cast")
    assert script.ran[2:] == ["fp8-cast-1"]


def test_a_variant_of_other_lanes_is_left_out(script):
    script(default=[{"rounds": [1.0]}])
    script.project.runpytest_subprocess()
    assert script.ran == [f"{name}-1" for name in ANYWHERE]


def test_nothing_but_variants_of_other_lanes_is_a_usage_error(script):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-config=@compile")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: none of bf16-compile runs on cpu*", "*--zimage-list*"])
    assert script.ran == []


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_an_unknown_name_is_a_usage_error(script, workers):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-config", "nvpf4", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown variant 'nvpf4'; did you mean 'nvfp4'*"])
    assert script.ran == []


def test_a_tag_is_given_with_an_equals_sign(script):
    """After a space pytest itself takes an `@` for a file of arguments."""
    script(default=[{"rounds": [1.0]}])
    script.project.runpytest_subprocess("--zimage-config=@nvfp4")
    assert script.ran == ["nvfp4-1", "nvfp4-fp8e-1"]
