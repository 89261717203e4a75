"""`--zimage-config`: which variants run."""

from __future__ import annotations

import msgspec
import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import CatalogError

ALL = ["bf16", "fp8-cast", "fp8-cast-fast", "fp8-scaled", "nvfp4", "nvfp4-fp8e"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], ALL),
        (["nvfp4"], ["nvfp4"]),
        (["nvfp4", "bf16"], ["bf16", "nvfp4"]),
        (["*"], [variant.name for variant in load_catalog().variants.values()]),
        (["fp8-*"], ["fp8-cast", "fp8-cast-fast", "fp8-scaled"]),
        (["@part1", "bf16-compile"], [*ALL, "bf16-compile"]),
        (["*fp8e*", "fp8-cast"], ["fp8-cast", "nvfp4-fp8e"]),
        (
            ["modelopt-f*[!e]", "online-fp8"],
            ["modelopt-full", *(f"modelopt-ffn-{n}" for n in ("only", "attn-qkv", "attn-out")), "online-fp8"],
        ),
        (
            ["*", "!@vllm-omni", "!bf16-*", "!@fp8", "!@nvfp4", "!*gguf*"],
            ["bf16", "mxfp8", "int8-convrot", "svdquant-w4a4"],
        ),
        (["!fp8-*", "!bf16"], ["nvfp4", "nvfp4-fp8e"]),
        (["!nvfp4*", "@part1"], ALL[:4]),
        (["online-*", "bf16-*"], ["bf16-float32", "bf16-compile", "online-fp8", "bf16-sage", "online-fp8-sage"]),
    ],
)
def test_selection_keeps_catalogue_order(patterns, names):
    assert [variant.name for variant in load_catalog().select(patterns)] == names


def test_close_matches_are_offered():
    with pytest.raises(CatalogError, match="unknown variant 'nvpf4'; did you mean 'nvfp4'"):
        load_catalog().select(["nvpf4"])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["!nvpf4"], "unknown variant 'nvpf4'; did you mean 'nvfp4'"),
        (["nvfp4", "!@nvpf4"], "no variant has the tag @nvpf4"),
        (["nvfp4", "!@nvfp4", "!bf16"], "!@nvfp4, !bf16 leaves out every variant that was asked for"),
    ],
)
def test_leaving_out_what_is_not_there_or_everything_is_an_error(patterns, message):
    with pytest.raises(CatalogError) as caught:
        load_catalog().select(patterns)
    assert message in str(caught.value)


@pytest.mark.parametrize("pattern", ["zz*", "nvf?", "[z]*", "!zz*"])
def test_a_pattern_that_matches_nothing_is_not_taken_for_a_name(pattern):
    with pytest.raises(CatalogError) as caught:
        load_catalog().select(["nvfp4", pattern])
    assert str(caught.value) == f"no variant matches '{pattern.lstrip('!')}'\n  mend: --zimage-list shows them all"


def test_unknown_tag_lists_the_known():
    with pytest.raises(CatalogError, match=r"no variant has the tag @nvpf4\n  mend: known tags: bf16, .*fp8, .*nvfp4"):
        load_catalog().select(["@nvpf4"])


def test_the_default_ones_are_those_of_the_catalogue_and_a_users_own():
    catalog = load_catalog()
    assert [name for name, variant in catalog.variants.items() if variant.default] == ALL
    row = catalog.variants["bf16"]
    mine = msgspec.structs.replace(row, name="mine")
    hidden = msgspec.structs.replace(row, name="hidden", default=False)
    users = msgspec.structs.replace(catalog, variants={"mine": mine, "hidden": hidden})
    assert users.select([]) == [mine]
    assert users.select(["@bf16"]) == users.select(["*"]) == [mine, hidden]


def test_a_session_draws_the_default_ones_and_others_when_asked(script):
    script(default=[{"rounds": [1.0]}])
    script.project.runpytest_subprocess()
    assert script.ran == [f"{name}-1" for name in ALL]
    script.project.runpytest_subprocess("--zimage-config", "online-fp8")
    assert script.ran[len(ALL) :] == ["online-fp8-1"]


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
    assert script.ran == [f"{name}-1" for name in ALL]


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
    script.project.runpytest_subprocess("--zimage-config=@part1")
    assert script.ran == [f"{name}-1" for name in ALL]


@pytest.mark.parametrize("asked", ["nvfp4,bf16-comp*", "nvfp4,@compile"])
def test_a_variant_of_other_lanes_is_not_left_out_without_a_word(script, asked):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-config", asked)
    assert script.ran == ["nvfp4-1"]
    result.stdout.fnmatch_lines(["NOTE: bf16-compile was asked for and does not run on cpu: its lanes are gb10, *"])


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_one_that_was_named_and_does_not_run_here_is_an_error(script, workers):
    """The rest would pass, and look like all that was asked for."""
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-config", "nvfp4,bf16-compile", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: bf16-compile does not run on cpu: its lanes are gb10, *"])
    assert script.ran == []


def test_what_nobody_asked_for_by_name_is_no_note(script):
    script(default=[{"rounds": [1.0]}])
    assert "does not run on" not in script.project.runpytest_subprocess().stdout.str()
