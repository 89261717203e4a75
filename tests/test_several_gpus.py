"""Several GPUs through pytest-xdist: each worker has one, no two are timed on one, and all of it is one session."""

from __future__ import annotations

import os
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted_nvml import Gpu, ScriptedNvml

from pytest_zimage.catalog import FitnessLimits, load_catalog
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.fit import FitPlan
from pytest_zimage.engines.protocol import DrawImages, Hello, Injection, Loaded
from pytest_zimage.errors import EngineError, UnsupportedError
from pytest_zimage.locks import disks
from pytest_zimage.planning import turn_s
from pytest_zimage.probes import pagecache
from pytest_zimage.probes.device import detect
from pytest_zimage.runbook import RunBook, missing_from

H200 = "'NVIDIA H200', (9, 0), 139.8"
H100 = "'NVIDIA H100 80GB HBM3', (9, 0), 79.6"
NAMES = "bf16,nvfp4,fp8-cast,fp8-scaled"
SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())

def test_memory(zimage):
    zimage.gate(zimage.rss_peak())
"""
ENGINE = """
import fcntl, os
from scripted import ScriptedEngine

class OnGpus(ScriptedEngine):
    def run(self, plan, progress):
        with (self._root / f"busy-{plan.gpu}").open("w") as busy:
            # Whoever meets another run on the same GPU fails.
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (self._root / "gpus.log").open("a") as log:
                log.write(f"{plan.variant.name} {plan.gpu} {plan.index}\\n")
            once = self._root / f"{plan.variant.name}-dies-once"
            if once.exists():
                once.unlink()
                os._exit(9)
            return super().run(plan, progress)

def pytest_zimage_engines(config):
    return {"diffusers": lambda: OnGpus(config.rootpath)}
"""
QUIET = [{"rounds": [x], "device_peak": 1 << 30} for x in (1.000, 1.004, 0.997, 1.002, 0.999)]


class Host:
    """A project on a host with scripted GPUs."""

    def __init__(self, script, monkeypatch):
        self.script, self._monkeypatch = script, monkeypatch
        script.project.makepyfile(test_suite=SUITE)
        script.project.makeconftest(ENGINE)
        ini = script.project.path / "tox.ini"
        ini.write_text(ini.read_text().replace("zimage_device = cpu\n", ""))
        script(default=QUIET)

    def gpus(self, *gpus, visible=None):
        made = ", ".join(f"Gpu({gpu}, uuid='GPU-{number}')" for number, gpu in enumerate(gpus))
        fake = self.script.project.mkdir("nvml")
        (fake / "pynvml.py").write_text(
            "from scripted_nvml import Gpu, ScriptedNvml\n"
            f"_nvml = ScriptedNvml({made})\n"
            "def __getattr__(name):\n    return getattr(_nvml, name)\n"
        )
        self._monkeypatch.setenv("PYTHONPATH", str(fake), prepend=":")
        if visible is None:
            self._monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            self._monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def run(self, *arguments):
        return self.script.run(NAMES, *arguments)

    @property
    def used(self):
        """GPU of each run that was made, by variant and index."""
        lines = (self.script.project.path / "gpus.log").read_text().splitlines()
        rows = [line.split() for line in lines]
        assert len({(name, index) for name, _, index in rows}) == len(rows), "a run was made twice"
        return {f"{name}-{index}": gpu for name, gpu, index in rows}


@pytest.fixture
def host(script, monkeypatch):
    return Host(script, monkeypatch)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, {"GPU-0", "GPU-1"}),
        ("3,1", {"GPU-3", "GPU-1"}),
        ("GPU-2,GPU-0", {"GPU-2", "GPU-0"}),
    ],
)
def test_each_worker_has_one_of_the_visible_gpus(host, results, visible, expected):
    host.gpus(*[H200] * 4, visible=visible)
    done = host.run("-n", "2", "--dist", "loadgroup", "-v")
    assert set(host.used.values()) == expected
    judged = set(re.findall(r"^\[(gw\d)\].* NO BASELINE \S+\[(\S+)\] *$", done.stdout.str(), re.MULTILINE))
    assert sorted(variant for _, variant in judged) == sorted(NAMES.split(",")), "a variant's tests stay on one worker"
    assert len(host.used) == 4
    data = results()
    assert sorted(run["variant"] for run in data["runs"]) == sorted(NAMES.split(","))
    assert len(data["verdicts"]) == 8
    assert all(row["test"].endswith(f"[{row['variant']}]") for row in data["verdicts"])
    assert done.stdout.str().count("zimage verdicts") == 1


def test_more_workers_than_gpus_wait_for_each_other(host, results):
    host.gpus(H200, H200)
    done = host.run("-n", "3", "--dist", "loadgroup")
    assert done.ret == 0
    assert set(host.used.values()) <= {"GPU-0", "GPU-1"}
    assert "3 workers share 2 GPUs and wait for each other: -n 2 is as fast" in results()["notes"]
    done.stdout.fnmatch_lines(["*NOTE: 3 workers share 2 GPUs*"])


def test_gpus_of_different_kinds_are_refused_by_name(host):
    host.gpus(H200, H100, H200)
    done = host.run("-n", "2", "--dist", "loadgroup")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    told = done.stderr.str()
    assert "different kinds: GPU 0 is NVIDIA H200, GPU 1 is NVIDIA H100 80GB HBM3" in told
    assert "CUDA_VISIBLE_DEVICES=GPU-0" in told


def test_the_gpus_that_are_used_decide_whether_they_are_of_one_kind(host):
    host.gpus(H200, H100, H200, visible="0,2,1")
    assert host.run("-n", "2", "--dist", "loadgroup").ret == 0
    assert set(host.used.values()) == {"GPU-0", "GPU-2"}


def test_one_worker_of_its_own_choice_on_mixed_gpus(host):
    host.gpus(H200, H100)
    assert host.run("-n", "2", "--zimage-device", "cuda:1").ret == 0
    assert set(host.used.values()) == {"GPU-1"}


def test_baselines_are_recorded_from_all_gpus(host, results):
    host.gpus(H200, H200)
    update = ("--update-baselines", "--update-reason", "first")
    assert host.run("-n", "2", "--dist", "loadgroup", *update).ret == 0
    assert len(host.used) == 4 * 5
    (host.script.project.path / "gpus.log").unlink()
    spread = host.run("-n", "2", "--dist", "loadgroup")
    spread.assert_outcomes(passed=8)
    together = {(row["test"], row["verdict"], row["change"]) for row in results()["verdicts"]}
    host.run().assert_outcomes(passed=8)
    assert {(row["test"], row["verdict"], row["change"]) for row in results()["verdicts"]} == together


def test_a_worker_that_vanishes_loses_nothing_but_its_run(host, results):
    host.gpus(H200, H200)
    host.script(default=QUIET, nvfp4=[{"die": 9}])
    done = host.run("-n", "2", "--dist", "loadgroup", "--max-worker-restart", "1")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    data = results()
    assert any(re.match(r"xdist's worker gw\d vanished \(", note) for note in data["notes"])
    assert "run 1 of nvfp4 is missing: it was broken off" in data["notes"]
    assert {run["variant"] for run in data["runs"]} == {"bf16", "fp8-cast", "fp8-scaled"}
    done.stdout.fnmatch_lines_random(
        ["*worker 'gw*' crashed while running*nvfp4*", "*NOTE: run 1 of nvfp4 is missing*"]
    )


def test_the_rest_of_its_variant_is_judged_by_the_one_that_takes_its_place(host, results):
    host.gpus(H200, H200)
    (host.script.project.path / "nvfp4-dies-once").touch()
    done = host.run("-n", "2", "--dist", "loadgroup")
    done.assert_outcomes(failed=1)
    data = results()
    assert {run["variant"] for run in data["runs"]} == set(NAMES.split(","))
    assert [row["metric"] for row in data["verdicts"] if row["variant"] == "nvfp4"] == ["rss_peak"]
    assert not any("missing" in note for note in data["notes"]), "it was made again"
    lines = (host.script.project.path / "gpus.log").read_text().splitlines()
    assert len(lines) == 5
    assert {line.split()[1] for line in lines} == {"GPU-0", "GPU-1"}


def test_what_a_vanished_worker_had_found_is_kept(host, results):
    host.gpus(H200)
    dies = "import os\n\ndef test_zz_last(zimage):\n    zimage.record\n    os._exit(9)\n"
    host.script.project.makepyfile(test_suite=SUITE + dies)
    host.script.run("nvfp4", "-n", "1", "--max-worker-restart", "0")
    data = results()
    assert {row["metric"] for row in data["verdicts"]} == {"warm_latency", "rss_peak"}
    assert [run["variant"] for run in data["runs"]] == ["nvfp4"]
    assert not any("missing" in note for note in data["notes"])


def test_a_worker_of_another_folder_sends_its_runs(host, results):
    """What remote workers do: the controller cannot read where they write."""
    host.gpus(H200, H200)
    there = host.script.project.mkdir("there")
    for name in ("test_suite.py", "conftest.py", "tox.ini", "script.json"):
        (there / name).write_text((host.script.project.path / name).read_text())
    (host.script.project.path / "test_suite.py").unlink()
    done = host.run("--dist", "loadgroup", "--tx", f"2*popen//chdir={there}", "test_suite.py")
    assert done.ret == 0, done.stdout.str()
    assert sorted(run["variant"] for run in results()["runs"]) == sorted(NAMES.split(","))
    assert {line.split()[1] for line in (there / "gpus.log").read_text().splitlines()} == {"GPU-0", "GPU-1"}


def detected(worker, *gpus, visible=None, choice="auto"):
    nvml = ScriptedNvml(*(Gpu(name, (9, 0), gib, uuid=f"GPU-{i}") for i, (name, gib) in enumerate(gpus)))
    return detect(load_catalog(), visible, choice=choice, nvml=nvml, worker=worker)


TWO = (("NVIDIA H200", 139.8), ("NVIDIA H200", 139.8))


@pytest.mark.parametrize(("worker", "uuid"), [((0, 2), "GPU-0"), ((1, 2), "GPU-1"), ((2, 3), "GPU-0"), (None, "GPU-0")])
def test_the_gpu_of_a_worker(worker, uuid):
    found = detected(worker, *TWO)
    assert (found.uuid, found.visible) == (uuid, 2)
    assert found.torch_device == f"cuda:{uuid[-1]}"


def test_a_worker_of_a_hidden_gpu():
    assert detected((1, 2), *TWO, visible="1").uuid == "GPU-1"
    assert detected((1, 2), *TWO, choice="cpu").torch_device == "cpu"
    with pytest.raises(UnsupportedError, match="different kinds"):
        detected((0, 2), TWO[0], ("NVIDIA H100 80GB HBM3", 79.6))


def test_a_run_is_made_once_by_workers_with_a_device_each(tmp_path):
    """One reference set of images for all: the second worker waits for the first one's, though its own GPU is idle."""
    books = [RunBook(tmp_path / "runs", tmp_path / f"gpu-{i}.lock") for i in range(2)]
    began, go, made = threading.Event(), threading.Event(), []

    def draw():
        made.append(threading.current_thread().name)
        began.set()
        assert go.wait(10)
        return ()

    waits = threading.Event()
    first = threading.Thread(target=lambda: books[0].images("bf16-reference-0", draw, lambda *_: None))
    second = threading.Thread(target=lambda: books[1].images("bf16-reference-0", draw, lambda *_: waits.set()))
    first.start()
    assert began.wait(10)
    assert missing_from(tmp_path / "runs") == ["drawing bf16-reference-0"]
    second.start()
    assert waits.wait(10)
    go.set()
    first.join(10)
    second.join(10)
    assert len(made) == 1
    assert missing_from(tmp_path / "runs") == []


def test_two_do_not_load_from_one_disk_at_once(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"0")
    said, done = threading.Event(), threading.Event()

    def load():
        with disks(tmp_path / "locks", [file], lambda *_: said.set()):
            done.set()

    with disks(tmp_path / "locks", [file, file], lambda *_: None):
        other = threading.Thread(target=load)
        other.start()
        assert said.wait(10)
        assert not done.is_set()
    other.join(10)
    assert done.is_set()
    assert len(list((tmp_path / "locks").iterdir())) == 1


def test_at_the_start_the_disk_is_asked_for_in_the_order_of_the_slots(monkeypatch, tmp_path):
    """Who has the least to load has the first slot; later nobody has to let another go first."""
    book = RunBook(tmp_path / "runs", tmp_path / "device.lock")
    pauses = []
    monkeypatch.setattr("pytest_zimage.locks.time", SimpleNamespace(sleep=pauses.append))

    def asks(**given):
        config = SimpleNamespace(**({"workerinput": {"workerid": "gw", "zimage": given}} if given else {}))
        after_s = turn_s(SimpleNamespace(config=config, book=book))
        with disks(tmp_path / "locks", [tmp_path], lambda *_: None, after_s=after_s):
            return pauses.pop()

    place = {"workers": 3, "apart": False, "folder": ""}
    first, second, third = (asks(slot=slot, **place) for slot in range(3))
    assert 0 == first < second < third
    assert asks() == 0, "one process alone waits for nobody"
    (tmp_path / "runs" / "bf16-1.json").touch()
    assert asks(slot=2, **place) == 0


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("run", ["importing", "held", "imported", "forked", "started", "load", "free"]),
        ("draw", ["forked", "started", "held", "load", "free"]),
    ],
)
def test_files_are_read_under_the_lock_of_the_disk(monkeypatch, tmp_path, what, expected):
    """Beside another worker's load neither an emptied page cache nor the time of a load would mean what it says.

    The imports begin before, so that each of several workers has done its own when the disk is free.
    """
    from pytest_zimage.engines import coldfiles, local

    events = []

    @contextmanager
    def reading(progress):
        events.append("held")
        yield
        events.append("free")

    class Worker:
        pid = 1

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def receive(self, stage):
            events.append("started")
            return Hello(pid=1, import_s=0.0, rss_idle_bytes=1, environment={})

        def ask(self, request, stage):
            events.append(stage)
            if stage != "load":
                raise EngineError("enough")
            return Loaded(phases_s={}, load_s=1.0, weight_bytes={}, tensors={}, compute={})

    def emptied(files):
        events.append("emptied")
        return pagecache.CacheState(residency=0.0, emptied=True)

    catalog = load_catalog()
    server = SimpleNamespace(ready=lambda *_: events.append("imported"))
    monkeypatch.setattr(local.LocalEngine, "_importing", lambda *_: events.append("importing") or server)
    monkeypatch.setattr(local.LocalEngine, "_worker", lambda *_: events.append("forked") or Worker())
    monkeypatch.setattr(coldfiles.pagecache, "empty", emptied)
    plan = RunPlan(
        variant=catalog.variant("bf16"), workload=catalog.workload("turbo-tiny"), model_set="synthetic-tiny",
        dims=catalog.models["synthetic-tiny"], files={}, tokenizer=tmp_path, device="cpu", gpu="", index=0, rounds=1,
        inject=Injection(), images=DrawImages((), 16, 16), environment={}, log=tmp_path / "log", timeout_s=9.0,
        fit=FitPlan(FitnessLimits(judged=False), 0.0, None, os.getpid()),
        disks=lambda _, progress: reading(progress),
    )  # fmt: skip
    with pytest.raises(EngineError, match="enough"):
        getattr(local.LocalEngine(), what)(plan, lambda *_: None)
    if what == "run":
        # At any time until the load: it goes on beside the imports and the worker's start.
        assert events.index("held") < events.index("emptied") < events.index("load")
        # And at any time after it: it goes on beside the first image, and others may load when it is done.
        events = [event for event in events if event not in ("emptied", "first image")]
    assert events[: events.index("free") + 1] == expected


def test_a_worker_that_takes_the_place_of_another_takes_its_gpu():
    """Slots count for each host by itself; a host of another name has GPUs of its own."""
    from execnet import XSpec

    from pytest_zimage.xdist import XdistHooks

    specs = [XSpec(text) for text in ("popen", "popen", "ssh=far//chdir=clone", "ssh=far//chdir=clone")]
    manager = SimpleNamespace(specs=specs)
    config = SimpleNamespace(stash=pytest.Stash(), rootpath=Path("/project"))
    hooks = XdistHooks(config)

    def node(name, spec):
        made = SimpleNamespace(gateway=SimpleNamespace(id=name, spec=spec), nodemanager=manager, workerinput={})
        hooks.pytest_configure_node(made)
        return made

    nodes = [node(f"gw{i}", spec) for i, spec in enumerate(specs)]
    told = [made.workerinput["zimage"] for made in nodes]
    assert [(one["slot"], one["workers"], one["apart"]) for one in told] == [
        (0, 2, False), (1, 2, False), (0, 2, True), (1, 2, True)
    ]  # fmt: skip
    assert told[0]["folder"].startswith("/project/.zimage/sessions/")
    assert told[2]["folder"] == Path(told[0]["folder"]).name, "a folder of this host means nothing on another"

    nodes[0].workeroutput = {}
    hooks.pytest_testnodedown(nodes[0], None)
    assert node("gw4", specs[0]).workerinput["zimage"]["slot"] == 0
