"""How variants are spread over several GPUs: the order in which xdist's workers are given them."""

from __future__ import annotations

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.folders import bytes_on_disk
from pytest_zimage.checkpoints.modelset import open_model_set
from pytest_zimage.scheduling import spread

BYTES = {"bf16": 20, "fp8-cast": 20, "fp8-cast-fast": 20, "fp8-scaled": 14, "nvfp4": 12, "nvfp4-fp8e": 10}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (1, ["bf16", "fp8-cast", "fp8-cast-fast", "fp8-scaled", "nvfp4", "nvfp4-fp8e"]),
        (2, ["bf16", "nvfp4-fp8e", "fp8-cast", "fp8-cast-fast", "fp8-scaled", "nvfp4"]),
        (4, ["bf16", "nvfp4-fp8e", "nvfp4", "fp8-scaled", "fp8-cast", "fp8-cast-fast"]),
        (9, ["bf16", "nvfp4-fp8e", "nvfp4", "fp8-scaled", "fp8-cast", "fp8-cast-fast"]),
    ],
)
def test_the_reference_then_the_lightest_then_the_heaviest(workers, expected):
    assert spread(list(BYTES), workers, BYTES.__getitem__) == expected


def test_without_sizes_the_order_stays():
    assert spread(list(BYTES), 3, lambda name: 0) == list(BYTES)
    assert spread([], 3, lambda name: 0) == []


def test_a_session_begins_with_the_reference_and_the_lightest(script, tiny):
    catalog = load_catalog()
    files = open_model_set("synthetic-tiny", catalog, cache=tiny.parent)
    sizes = {
        name: sum(map(bytes_on_disk, files.files(catalog.variant(name)).values())) for name in BYTES if name != "bf16"
    }
    lightest = min(sizes, key=sizes.__getitem__)
    assert lightest != "fp8-cast", "it would be the second without any weighing"
    script(default=[{"rounds": [1.0]}])
    script.project.makepyfile(
        test_suite="""
        def test_first(zimage):
            zimage.gate(zimage.warm_latency())

        def test_second(zimage):
            zimage.gate(zimage.rss_peak())
        """
    )
    done = script.project.runpytest_subprocess("-n", "2", "--dist", "loadgroup", "-v")
    started = [line.partition("@")[2].strip() for line in done.outlines if line.startswith("test_suite.py::test_first")]
    assert set(started[:2]) == {"bf16", lightest}
    assert sorted(started) == sorted(BYTES)


def test_groups_of_other_tests_keep_their_places(script):
    script(default=[{"rounds": [1.0]}])
    script.project.makepyfile(
        test_suite="""
        import pytest

        @pytest.mark.xdist_group("mine")
        @pytest.mark.parametrize("number", range(3))
        def test_of_mine(number):
            pass

        def test_times(zimage):
            zimage.gate(zimage.warm_latency())
        """
    )
    some = "--zimage-config=bf16,nvfp4,nvfp4-fp8e"
    done = script.project.runpytest_subprocess(some, "-n", "1", "--dist", "loadgroup", "-v")
    started = [line.partition("@")[0].strip() for line in done.outlines if line.startswith("test_suite.py::")]
    assert [line.partition("::")[2] for line in started] == [
        *(f"test_of_mine[{number}]" for number in range(3)),
        *(f"test_times[{variant}]" for variant in ("bf16", "nvfp4", "nvfp4-fp8e")),
    ]
