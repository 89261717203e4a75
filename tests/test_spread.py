"""How variants are spread over several GPUs: the order in which xdist's workers are given them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.folders import bytes_on_disk
from pytest_zimage.checkpoints.modelset import open_model_set
from pytest_zimage.foreseen import Weight
from pytest_zimage.groups import group_of, judges_images
from pytest_zimage.scheduling import GroupScheduling, spread

WEIGHTS = {
    "bf16": Weight(20, 42.0),
    "fp8-cast": Weight(20, 47.0),
    "fp8-cast-fast": Weight(20, 37.0),
    "fp8-scaled": Weight(14, 39.0),
    "nvfp4": Weight(12, 41.0),
    "nvfp4-fp8e": Weight(10, 40.0),
}
BOTH = """
import pytest

def test_first(zimage):
    zimage.gate(zimage.warm_latency())

def test_second(zimage):
    zimage.gate(zimage.rss_peak())

def test_third(zimage):
    zimage.gate(zimage.tensors())

@pytest.mark.zimage_images
def test_images(zimage):
    zimage.gate(zimage.device_peak())
"""


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (1, ["bf16", "fp8-cast", "nvfp4", "nvfp4-fp8e", "fp8-scaled", "fp8-cast-fast"]),
        (2, ["nvfp4-fp8e", "bf16", "fp8-cast", "nvfp4", "fp8-scaled", "fp8-cast-fast"]),
        (4, ["nvfp4-fp8e", "nvfp4", "fp8-scaled", "bf16", "fp8-cast", "fp8-cast-fast"]),
        (9, ["nvfp4-fp8e", "nvfp4", "fp8-scaled", "bf16", "fp8-cast", "fp8-cast-fast"]),
    ],
)
def test_the_lightest_open_with_the_reference_and_the_longest_follow(workers, expected):
    assert spread(list(WEIGHTS), workers, WEIGHTS.__getitem__) == expected


def test_without_times_the_rest_goes_by_size():
    sizes = {name: Weight(weight.load_bytes) for name, weight in WEIGHTS.items()}
    expected = ["nvfp4-fp8e", "bf16", "fp8-cast", "fp8-cast-fast", "fp8-scaled", "nvfp4"]
    assert spread(list(sizes), 2, sizes.__getitem__) == expected


def test_where_nothing_is_known_the_order_stays():
    assert spread(list(WEIGHTS), 3, lambda name: Weight()) == list(WEIGHTS)
    assert spread([], 3, lambda name: Weight()) == []


class Scheduled:
    """The scheduler with scripted workers: `hosts` says where each runs, and `finish` that one is through."""

    def __init__(self, pytestconfig, variants, hosts=("", ""), images=True, runs=True):
        self.tests = [f"t.py::test_{number}[{name}]@{name}" for name in variants for number in range(4) if runs]
        groups = [group_of(name, images=True) for name in variants if images]
        self.tests += [f"t.py::test_i{n}[{group.partition('/')[0]}]@{group}" for group in groups for n in range(3)]
        config = SimpleNamespace(
            option=SimpleNamespace(loadscopereorder=True),
            getvalue={"tx": ["popen"] * len(hosts), "maxprocesses": None}.get,
            getoption=lambda name, *default: False,
        )
        self.scheduler = GroupScheduling(config, None, lambda name, images: WEIGHTS[name])
        self.nodes = [Node(number, host) for number, host in enumerate(hosts)]
        for node in self.nodes:
            self.scheduler.add_node(node)
            self.scheduler.add_node_collection(node, self.tests)
        self.scheduler.schedule()

    def given(self, node):
        """Groups in the order that `node` got them."""
        return list(dict.fromkeys(self.tests[index].partition("@")[2] for index in self.nodes[node].sent))

    def finish(self, node, count=1):
        """`node` ends the next `count` of its groups."""
        for group in [g for g in self.given(node) if g not in self.nodes[node].finished][:count]:
            self.nodes[node].finished.append(group)
            for index in [i for i in self.nodes[node].sent if self.tests[i].endswith(f"@{group}")]:
                self.scheduler.mark_test_complete(self.nodes[node], index)


class Node:
    def __init__(self, number, host):
        spec = SimpleNamespace(ssh=host or None, chdir=None)
        self.gateway = SimpleNamespace(id=f"gw{number}", spec=spec)
        self.sent: list[int] = []
        self.finished: list[str] = []
        self.shutting_down = False

    def send_runtest_some(self, indices):
        self.sent += indices

    def shutdown(self):
        self.shutting_down = True


def test_images_are_judged_when_all_runs_are_under_way_and_by_whoever_drew_them(pytestconfig):
    one = Scheduled(pytestconfig, ["bf16", "nvfp4", "fp8-cast"])
    assert (one.given(0), one.given(1)) == (["nvfp4"], ["bf16"])
    one.finish(0)
    assert one.given(0) == ["nvfp4", "fp8-cast"]
    one.finish(1)
    assert one.given(1) == ["bf16", "bf16/images"], "not those of the others, which its judge has not seen"
    one.finish(1)
    assert one.given(1) == ["bf16", "bf16/images", "nvfp4/images"], "rather than nothing at all"
    one.finish(1)
    assert one.nodes[1].shutting_down
    one.finish(0)
    assert one.given(0) == ["nvfp4", "fp8-cast", "fp8-cast/images"], "whose run was going on until now"
    one.finish(0)
    assert one.nodes[0].shutting_down
    assert one.scheduler.tests_finished


def test_images_are_judged_on_the_host_that_drew_them(pytestconfig):
    one = Scheduled(pytestconfig, ["bf16", "nvfp4"], hosts=("here", "there"))
    assert (one.given(0), one.given(1)) == (["nvfp4"], ["bf16"])
    one.finish(0)
    one.finish(0)
    assert one.nodes[0].shutting_down
    assert one.given(0) == ["nvfp4", "nvfp4/images"], "those of bf16 lie on the other host"
    one.finish(1)
    assert one.given(1) == ["bf16", "bf16/images"]


def test_images_of_a_host_that_vanished_are_drawn_and_judged_by_another(pytestconfig):
    one = Scheduled(pytestconfig, ["bf16", "nvfp4", "fp8-cast"], hosts=("here", "there"))
    assert (one.given(0), one.given(1)) == (["nvfp4"], ["bf16"])
    one.scheduler.remove_node(one.nodes[1])
    for _ in range(9):
        one.finish(0)
    assert set(one.given(0)) >= {"bf16", "bf16/images", "nvfp4/images", "fp8-cast/images"}


def test_a_session_about_images_alone_spreads_them_as_runs(pytestconfig):
    one = Scheduled(pytestconfig, list(WEIGHTS), runs=False)
    assert (one.given(0)[0], one.given(1)[0]) == ("nvfp4-fp8e/images", "bf16/images")


def test_a_session_begins_with_the_reference_and_the_lightest(script, tiny):
    catalog = load_catalog()
    files = open_model_set("synthetic-tiny", catalog, cache=tiny.parent)
    sizes = {
        name: sum(map(bytes_on_disk, files.files(catalog.variant(name)).values())) for name in WEIGHTS if name != "bf16"
    }
    lightest = min(sizes, key=sizes.__getitem__)
    assert lightest != "fp8-cast", "it would be the second without any weighing"
    script(default=[{"rounds": [1.0]}])
    script.project.makepyfile(test_suite=BOTH)
    done = script.project.runpytest_subprocess("-n", "2", "--dist", "loadgroup", "-v")
    started = [line.partition("@")[2].strip() for line in done.outlines if line.startswith("test_suite.py::")]
    firsts = list(dict.fromkeys(started))
    assert set(firsts[:2]) == {"bf16", lightest}
    assert sorted(firsts) == sorted(group_of(name, images=images) for name in WEIGHTS for images in (False, True))
    assert not any(judges_images(name) for name in firsts[:5]), "the sixth may still be under way"


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
    names = [line.partition("::")[2] for line in started]
    assert names[:3] == [f"test_of_mine[{number}]" for number in range(3)]
    assert re.fullmatch(r"test_times\[bf16\]", names[3])
    assert sorted(names[4:]) == ["test_times[nvfp4-fp8e]", "test_times[nvfp4]"]
