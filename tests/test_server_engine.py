"""One run of a server: what is asked of it in which order, what counts as a sample, and that nothing of it is left."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from holding import holding
from msgspec import structs
from PIL import Image

from pytest_zimage.catalog import load_catalog
from pytest_zimage.catalog.device_class import FitnessLimits
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.fit import FitPlan
from pytest_zimage.engines.protocol import DrawImages, ImageJob, Injection
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.engines.servers import asking as asking_module
from pytest_zimage.engines.servers import engine as engine_module
from pytest_zimage.engines.servers import opening
from pytest_zimage.engines.servers.asking import IN_A_ROW, Asking, Seeds
from pytest_zimage.engines.servers.engine import ServerEngine
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.session import Seen, Served, ServerSession
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError
from pytest_zimage.probes.fitness import Fitness, Reading
from pytest_zimage.probes.pagecache import CacheState
from pytest_zimage.quality.images import read_image
from pytest_zimage.verdict.metrics import measurable, take

CATALOG = load_catalog()
WORKLOAD = structs.replace(CATALOG.workload("turbo-tiny"), width=32, height=16)
SEED = WORKLOAD.seed
HELD = 50_000_000


def picture(prompt: str, seed: int, width: int = 32, height: int = 16) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels(prompt, seed, width, height)).save(data, format="PNG")
    return data.getvalue()


def pixels(prompt: str, seed: int, width: int = 32, height: int = 16):
    digest = hashlib.sha256(f"{prompt} {seed}".encode()).digest()
    return np.random.default_rng(list(digest)).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Session(ServerSession):
    """Draws what the prompt and the seed say, unless the script has something for its next draw."""

    def __init__(self, engine: Scripted, holder) -> None:
        self.engine, self.holder = engine, holder
        self.started_s = engine.started_s
        self.pid = holder.pid if engine.told else None
        self.faults = dict(engine.own_faults)
        self.used = engine.used

    def forget(self):
        self.engine.happened("forget")
        return ("its weights were dropped, its process is not fresh",)

    def draw(self, workload, expected):
        self.engine.happened(f"{expected} {workload.seed}")
        if expected == "cold":
            self.holder(f"hold {HELD}")
            for path in self.engine.reads:
                path.read_bytes()
        self.faults.update(self.engine.own_faults)
        self.engine.workloads.append(workload)
        image = self.engine.image(workload) or picture(workload.prompt, workload.seed, workload.width, workload.height)
        return Served(
            seconds=0.25, phases_s={"sample": 0.2, "decode": 0.05}, beside_s={"client": 0.26, "png": 0.01}, image=image
        )

    def seen(self):
        self.engine.happened("seen")
        return Seen(environment={"scripted.version": "1.0", "device": "a CPU"}, emulated=("nvfp4",))


class Scripted(ServerEngine):
    """A server that is a process holding memory, and a list of what happened to it."""

    name = "scripted"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.workloads: list = []
        self.pids: list[int] = []
        self.started_s = 12.0
        self.told = True
        self.own_faults: dict[str, int] = {}
        self.used = ""
        self.reads: list[Path] = []
        self.script: dict[str, list] = {}
        """By event: what is done when it happens, in turn: an exception is raised, None is nothing."""
        self.image = lambda workload: None

    def happened(self, event: str) -> None:
        self.events.append(event)
        for name in (event, event.partition(" ")[0]):
            if self.script.get(name) and (error := self.script[name].pop(0)) is not None:
                raise error

    @contextmanager
    def open(self, plan, progress):
        with holding() as holder:
            self.pids.append(holder.pid)
            try:
                self.happened("open")
                yield Session(self, holder)
            finally:
                self.events.append("close")


@pytest.fixture
def engine(nothing_left, monkeypatch):
    """A scripted engine; when the test is over, nothing of it may be left."""
    engine = Scripted()
    empty = opening.pagecache.empty

    def emptied(files):
        engine.happened("emptied")
        return empty(files)

    monkeypatch.setattr(opening.pagecache, "empty", emptied)
    yield engine
    assert not any(psutil.pid_exists(pid) for pid in engine.pids)
    assert engine.events.count("open") == engine.events.count("close")


@pytest.fixture
def plan(tmp_path, engine) -> RunPlan:
    files = {role: tmp_path / f"{role}.safetensors" for role in ("transformer", "text_encoder", "vae")}
    for path in files.values():
        path.write_bytes(b"weights" * 1000)

    @contextmanager
    def reading(progress):
        engine.happened("reading")
        yield
        engine.happened("read")

    return RunPlan(
        variant=CATALOG.variant("nvfp4"),
        workload=WORKLOAD,
        model_set="synthetic-tiny",
        dims=CATALOG.models["synthetic-tiny"],
        files=files,
        tokenizer=None,
        device="cpu",
        gpu="",
        index=0,
        rounds=3,
        inject=Injection(),
        images=None,
        environment={"plugin": "0.1", "device": "the CPU"},
        log=tmp_path / "server.log",
        timeout_s=20.0,
        fit=FitPlan(FitnessLimits(judged=False), 0.0, None, os.getpid()),
        disks=lambda _, progress: reading(progress),
    )


@pytest.fixture
def jobs(tmp_path) -> DrawImages:
    pairs = (("cat", 1), ("cat", 2), ("dog", 1))
    return DrawImages(
        tuple(ImageJob(name, f"a {name}", seed, str(tmp_path / f"{name}-{seed}.png")) for name, seed in pairs), 48, 32
    )


def silent(stage, done, total):
    pass


def fault(kind="dropped connection"):
    return RequestFault(kind, f"it failed: {kind}")


# ---- the order of a run -------------------------------------------------------


def test_the_cold_image_comes_first_and_from_the_disk(engine, plan, jobs):
    engine.run(replace(plan, images=jobs), silent)
    assert engine.events == [
        "open", "reading", "emptied", f"cold {SEED}", "read",
        f"warm {SEED + 4}",
        f"warm {SEED + 1}", f"warm {SEED + 2}", f"warm {SEED + 3}",
        "seen", "any 1", "any 2", "any 1", "close",
    ]  # fmt: skip


def test_every_observation_reaches_the_record(engine, plan):
    record = engine.run(plan, silent)
    assert [round_.seed for round_ in record.rounds] == [SEED + 1, SEED + 2, SEED + 3]
    for round_ in record.rounds:
        assert round_.seconds == 0.25
        assert round_.phases_s == {"sample": 0.2, "decode": 0.05}
        assert round_.beside_s == {"client": 0.26, "png": 0.01}
        assert round_.forwards is None
        drawn = pixels(WORKLOAD.prompt, round_.seed)
        assert round_.pixels_sha256 == hashlib.sha256(drawn.tobytes()).hexdigest()
    assert (record.cold.total_s, record.cold.phases_s) == (0.25, {"server_start": 12.0, "first_image": 0.25})
    assert record.cold.fitness is not None
    assert record.fitness is not None
    assert HELD <= record.memory.rss_sampled_peak_bytes - record.rss_idle_bytes < 1.2 * HELD
    assert record.memory.rss_peak_bytes - record.rss_idle_bytes > 0.98 * HELD
    assert record.environment == {"plugin": "0.1", "scripted.version": "1.0", "device": "a CPU"}
    assert record.emulated == ("nvfp4",)
    assert record.faults == {}
    assert record.disk_bytes == 21_000
    assert (record.engine, record.variant, record.index, record.device) == ("scripted", "nvfp4", 0, "cpu")
    assert record.loaded.weight_bytes == record.loaded.tensors == record.loaded.compute == {}
    assert list(record.stages_s) == ["start and first image", "warm-up", "rounds", "images", "close", "memory back"]
    assert RunRecord.from_json(record.to_json()) == record


def test_every_metric_is_measured_or_says_why_not(engine, plan):
    record = engine.run(plan, silent)
    samples = {metric: take(metric, record) for metric in measurable()}
    measured = {metric for metric, sample in samples.items() if not sample.unavailable}
    assert measured == {"warm_latency", "cold_load", "rss_peak", "working_set", "disk_bytes"}
    assert samples["warm_latency"].rounds == (0.25, 0.25, 0.25)
    assert set(samples["warm_latency"].phases) == {"sample", "decode"}
    assert samples["working_set"].rounds[0] == pytest.approx(HELD, rel=0.2)
    assert samples["cold_load"].emptied == record.cold.emptied
    for metric in set(samples) - measured:
        assert "scripted" in samples[metric].unavailable
        assert samples[metric].rounds == ()
        assert samples[metric].exact is None


def test_a_server_of_which_nothing_is_known_here_still_gives_times(engine, plan):
    engine.told = False
    record = engine.run(replace(plan, files={}, gpu="GPU-none"), silent)
    samples = {metric: take(metric, record) for metric in measurable()}
    assert {metric for metric, sample in samples.items() if not sample.unavailable} == {"warm_latency", "cold_load"}
    assert "not known" in samples["rss_peak"].unavailable
    assert "not known" in samples["working_set"].unavailable
    assert "does not say what its allocator held" in samples["device_peak"].unavailable
    assert "not on this host" in samples["disk_bytes"].unavailable
    assert not record.cold.emptied
    assert "of its own keeping" in record.cold.notes[0]


# ---- requests that fail -------------------------------------------------------


def test_a_failed_request_is_counted_and_asked_again_with_another_seed(engine, plan):
    engine.script[f"warm {SEED + 2}"] = [fault()]
    engine.script[f"warm {SEED + 1002}"] = [fault("status 500")]
    record = engine.run(plan, silent)
    assert [round_.seed for round_ in record.rounds] == [SEED + 1, SEED + 2002, SEED + 3]
    assert record.faults == {"dropped connection": 1, "status 500": 1}
    assert take("warm_latency", record).rounds == (0.25,) * 3


def test_what_a_session_made_anew_by_itself_is_counted_too(engine, plan):
    engine.own_faults = {"timeout": 2, "dropped connection": 1}
    engine.script["seen"] = [fault()]
    assert engine.run(plan, silent).faults == {"dropped connection": 2, "timeout": 2}


def test_a_failed_cold_request_starts_another_server(engine, plan):
    engine.script["cold"] = [fault("timeout")]
    record = engine.run(plan, silent)
    once = ["open", "reading", "emptied", f"cold {SEED}"]
    assert engine.events[:10] == [*once, "close", *once, "read"]
    assert record.faults == {"timeout": 1}
    assert len(set(engine.pids)) == 2
    assert record.memory.rss_sampled_peak_bytes - record.rss_idle_bytes < 1.2 * HELD


def test_a_server_that_cannot_be_opened_by_accident_is_opened_again(engine, plan):
    engine.script["open"] = [fault("status 503")]
    assert engine.run(plan, silent).faults == {"status 503": 1}


@pytest.mark.parametrize("where", ["cold", "warm", "seen", "any"])
def test_a_server_that_only_fails_is_given_up(engine, plan, jobs, where):
    engine.script[where] = [fault("status 500")] * 50
    with pytest.raises(EngineError, match=r"scripted of nvfp4, run 1: 4 requests in a row failed \(status 500 4\)"):
        engine.run(replace(plan, images=jobs), silent)
    assert sum(event.startswith(where) for event in engine.events) == IN_A_ROW + 1


def test_faults_here_and_there_are_bounded_by_their_share():
    rests: list[float] = []
    asking = Asking("it", 200, sleep=rests.append)

    turn = itertools.cycle((True, False))

    def every_other():
        if next(turn):
            raise fault("timeout")
        return "answer"

    for _ in range(10):
        assert asking.ask(every_other) == "answer"
    with pytest.raises(EngineError, match=r"it: 11 of 200 requests failed \(timeout 11\); the last one: it failed"):
        asking.ask(every_other)
    assert len(rests) == 10
    assert min(rests) > 0


def test_what_a_session_makes_anew_by_itself_is_bounded_too(engine, plan):
    engine.own_faults = {"timeout": 3, "dropped connection": 1}
    with pytest.raises(EngineError, match=r"4 requests beside those for its 5 images failed \(dropped connection 1, t"):
        engine.run(plan, silent)
    assert engine.events == ["open", "reading", "emptied", f"cold {SEED}", "read", "close"]


def test_the_images_for_quality_are_bounded_in_the_same_way(engine, plan, jobs):
    engine.own_faults = {"timeout": 4}
    with pytest.raises(EngineError, match=r"scripted of nvfp4: 4 requests beside those for its 3 images failed"):
        engine.draw(replace(plan, images=jobs), silent)


def test_requests_beside_the_images_have_the_same_share():
    asking, beside = Asking("it", 100, sleep=lambda seconds: None), {"timeout": 0}
    asking.count(beside)
    for _ in range(5):
        beside["timeout"] += 1
        asking.ask(lambda: "an image")
    asking.failed(fault("status 500"))
    assert asking.all_faults == {"status 500": 1, "timeout": 5}
    beside["timeout"] += 1
    with pytest.raises(EngineError, match="it: 6 requests beside those for its 100 images failed"):
        asking.ask(lambda: "an image")


@pytest.mark.parametrize(("requests", "allowed"), [(2, 3), (60, 3), (80, 4), (1000, 50)])
def test_a_few_faults_are_allowed_in_any_run(requests, allowed):
    asking = Asking("it", requests, sleep=lambda seconds: None)
    for _ in range(allowed):
        asking.failed(fault())
        asking.succeeded()
    with pytest.raises(EngineError, match=f"{allowed + 1} of {requests} requests failed"):
        asking.failed(fault())


def test_a_thousand_requests_with_faults_give_no_wrong_sample(engine, plan, monkeypatch):
    """2 % dropped connections, 1 % errors, 1 % hangs; the fixtures see to what is left behind."""
    failing = {}
    for number in range(1000):
        kind = {10: "dropped connection", 60: "dropped connection", 30: "status 500", 80: "timeout"}.get(number % 100)
        if kind:
            failing[SEED + 1 + number] = kind
            engine.script[f"warm {SEED + 1 + number}"] = [fault(kind)]
    monkeypatch.setattr(asking_module, "_PAUSE_S", 0.0)
    record = engine.run(replace(plan, rounds=1000), silent)
    assert record.faults == {"dropped connection": 20, "status 500": 10, "timeout": 10}
    seeds = [round_.seed for round_ in record.rounds]
    assert len(set(seeds)) == 1000
    assert not failing.keys() & set(seeds)
    assert len({round_.pixels_sha256 for round_ in record.rounds}) == 1000


def test_another_error_is_not_asked_again(engine, plan):
    engine.script["warm"] = [None, MeasurementError("its sampler was cached")]
    with pytest.raises(MeasurementError, match="cached"):
        engine.run(plan, silent)
    assert len([event for event in engine.events if event.startswith("warm")]) == 2


def test_no_seed_is_given_twice_however_long_a_run_is():
    seeds = Seeds(WORKLOAD, 2500)
    given = [seeds.workload(number).seed for _ in range(3) for number in range(2501)]
    assert len({SEED, *given}) == 1 + len(given)
    assert given[:2500] == [SEED + 1 + number for number in range(2500)]


def test_rounds_that_are_timed_once_more_are_drawn_from_new_seeds(engine, plan, monkeypatch):
    class Twice:
        load = Fitness(before=Reading())

        def timed(self, block, *, worker, canary=None):
            block()
            return block(), Fitness(before=Reading(), retried=True)

    @contextmanager
    def guarding(fit, gpu, progress, also=None):
        yield Twice()

    monkeypatch.setattr(engine_module, "guarding", guarding)
    record = engine.run(plan, silent)
    drawn = [workload.seed for workload in engine.workloads]
    assert len(drawn) == len(set(drawn)) == 8
    assert [round_.seed for round_ in record.rounds] == [SEED + 1001, SEED + 1002, SEED + 1003]


# ---- pictures that are not what was asked for -----------------------------------


def test_the_same_picture_from_another_seed_is_no_round(engine, plan):
    prompt = re.escape(WORKLOAD.prompt)
    engine.image = lambda workload: picture("one", 1) if workload.seed in (SEED + 2, SEED + 3) else None
    with pytest.raises(MeasurementError, match=f"'{prompt}' from seed {SEED + 2} and .* from seed {SEED + 3} gave"):
        engine.run(plan, silent)


def test_the_cold_picture_given_again_is_no_round(engine, plan):
    engine.image = lambda workload: picture("one", 1) if workload.seed in (SEED, SEED + 1) else None
    with pytest.raises(MeasurementError, match=f"from seed {SEED} and .* from seed {SEED + 1} gave the same"):
        engine.run(plan, silent)


def test_the_picture_of_another_prompt_is_not_kept(engine, plan, jobs):
    engine.image = lambda workload: picture("a dog", 1, 48, 32) if workload.prompt == "a cat" else None
    with pytest.raises(MeasurementError, match="'a cat' from seed 1 and 'a cat' from seed 2 gave the same picture"):
        engine.run(replace(plan, images=jobs), silent)
    engine.image = lambda workload: picture("a cat", 1, 48, 32) if workload.prompt == "a dog" else None
    with pytest.raises(MeasurementError, match="'a cat' from seed 1 and 'a dog' from seed 1 gave the same picture"):
        engine.draw(replace(plan, images=jobs), silent)
    assert not Path(jobs.jobs[2].path).exists()


@pytest.mark.parametrize("seed", [SEED, SEED + 4, SEED + 2])
def test_a_picture_of_another_size_is_an_error_wherever_it_comes(engine, plan, seed):
    engine.image = lambda workload: picture("x", 1, 64, 64) if workload.seed == seed else None
    with pytest.raises(MeasurementError, match="64x64 where 32x16 was asked for"):
        engine.run(plan, silent)


def flat(colour, width=32, height=16, changed=()):
    array = np.full((height, width, 3), colour, dtype=np.uint8)
    for place in changed:
        array[place] ^= 1
    data = io.BytesIO()
    Image.fromarray(array).save(data, format="PNG")
    return data.getvalue()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 20, 30)])
@pytest.mark.parametrize("seed", [SEED, SEED + 4, SEED + 1, SEED + 3])
def test_a_picture_of_one_colour_is_no_picture_wherever_it_comes(engine, plan, seed, colour):
    engine.image = lambda workload: flat(colour) if workload.seed == seed else None
    with pytest.raises(
        MeasurementError, match=f"from seed {seed} gave a picture of one colour, {re.escape(str(colour))}"
    ):
        engine.run(plan, silent)


def test_no_image_for_quality_is_of_one_colour(engine, plan, jobs):
    engine.image = lambda workload: flat((0, 0, 0), 48, 32) if workload.prompt == "a dog" else None
    for ask in (engine.run, engine.draw):
        with pytest.raises(MeasurementError, match="'a dog' from seed 1 gave a picture of one colour"):
            ask(replace(plan, images=jobs), silent)


@pytest.mark.parametrize("place", [(0, 1), (0, 0, 2), (15, 31), (8, 3, 1)])
def test_a_picture_that_differs_in_a_pixel_is_one(engine, plan, place):
    engine.image = lambda workload: flat((9, 9, 9), changed=[place]) if workload.seed == SEED + 2 else None
    assert len(engine.run(plan, silent).rounds) == 3


# ---- nothing is left ------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("the server left")])
@pytest.mark.parametrize("where", ["open", "reading", "emptied", "cold", "warm", f"warm {SEED + 2}", "seen", "any"])
def test_nothing_is_left_after_any_error_anywhere(engine, plan, jobs, where, error):
    engine.script[where] = [error]
    with pytest.raises(type(error)):
        engine.run(replace(plan, images=jobs), silent)
    assert engine.events[-1] == "close"


@pytest.mark.parametrize("at", ["first image", "warm-up", "image", "image for quality"])
def test_nothing_is_left_after_ctrl_c_while_progress_is_shown(engine, plan, jobs, at):
    def progress(stage, done, total):
        if stage == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(replace(plan, images=jobs), progress)
    assert engine.events[-1] == "close"


# ---- servers that ran already, and those that load at once -----------------------


def test_a_server_that_ran_already_forgets_first(engine, plan, monkeypatch):
    asked = []
    guarding = engine_module.guarding
    monkeypatch.setattr(
        engine_module, "guarding", lambda *given, **more: asked.append(more) or guarding(*given, **more)
    )
    engine.started_s, engine.attached_pid = 0.0, os.getpid()
    record = engine.run(plan, silent)
    assert engine.events[:5] == ["open", "forget", "reading", "emptied", f"cold {SEED}"]
    assert record.cold.phases_s == {"first_image": 0.25}
    assert record.cold.notes[-1] == "its weights were dropped, its process is not fresh"
    assert record.memory.rss_peak_bytes is None, "the kernel's mark may be of what it did before"
    assert take("working_set", record).rounds[0] == pytest.approx(HELD, rel=0.2)
    assert record.device_left_bytes is None
    assert asked == [{"also": os.getpid()}], "it is no stranger on the machine"


def test_memory_of_a_server_that_worked_before_is_seen_and_not_judged(engine, plan):
    engine.started_s, engine.used = 0.0, "it had drawn before this run"
    record = engine.run(plan, silent)
    for metric in ("rss_peak", "working_set"):
        sample = take(metric, record)
        assert (sample.unavailable, sample.not_its_own) == ("it had drawn before this run", True)
    assert not take("gpu_process_peak", record).not_its_own, "nothing was seen of it"
    assert record.memory.rss_sampled_peak_bytes > HELD


@pytest.fixture
def on_disk(plan):
    """The plan's files, where a file system lets them be dropped from memory."""
    files = sorted(plan.files.values())
    if not opening.pagecache.empty(files).emptied:
        pytest.skip("this file system cannot empty its page cache")
    return files


def test_files_that_a_server_did_not_read_are_not_said_to_be_its_own(engine, plan, on_disk):
    engine.started_s = 0.0
    engine.reads = on_disk[:-1]
    record = engine.run(replace(plan, environment={"weights.vae": "abc", "plugin": "1"}), silent)
    assert (record.cold.residency, record.cold.emptied) == (None, False)
    assert f"drew without reading {on_disk[-1].name} here: it reads others of these names" in record.cold.notes[0]
    assert record.disk_bytes is None
    assert "weights.vae" not in record.environment
    assert record.environment["plugin"] == "1"


def test_files_that_a_server_read_are_its_own(engine, plan, on_disk):
    engine.started_s = 0.0
    engine.reads = on_disk
    record = engine.run(replace(plan, environment={"weights.vae": "abc"}), silent)
    assert record.cold.emptied
    assert record.cold.notes == ("its weights were dropped, its process is not fresh",)
    assert (record.disk_bytes, record.environment["weights.vae"]) == (21_000, "abc")


def test_files_of_which_nothing_shows_that_it_reads_them_are_taken_on_trust(engine, plan, monkeypatch):
    """As where the page cache cannot be emptied."""
    engine.started_s = 0.0
    monkeypatch.setattr(opening, "_emptied", lambda files: CacheState(residency=1.0, emptied=False))
    record = engine.run(replace(plan, environment={"weights.vae": "abc"}), silent)
    assert (
        record.cold.notes[0] == "that the server reads the files here, and not others of these names, is taken from you"
    )
    assert record.environment["weights.vae"] == "abc"


def test_a_server_that_cannot_forget_has_no_cold_load(engine, plan):
    engine.started_s = 0.0
    engine.script["forget"] = [UnsupportedError("a vLLM-Omni cannot unload")]
    record = engine.run(plan, silent)
    assert take("cold_load", record).unavailable == "a vLLM-Omni cannot unload"
    assert take("warm_latency", record).rounds == (0.25,) * 3
    assert f"any {SEED}" in engine.events


def test_a_server_that_loads_at_its_start_is_timed_from_there(engine, plan):
    engine.loads_at_start = True
    record = engine.run(plan, silent)
    assert engine.events[:4] == ["reading", "emptied", "open", f"cold {SEED}"]
    assert record.cold.total_s == 12.25
    assert record.cold.phases_s == {"server_start": 12.0, "first_image": 0.25}
    assert record.rss_idle_bytes is None
    assert "loads before it is ready" in take("working_set", record).unavailable
    assert take("rss_peak", record).rounds[0] > HELD


# ---- images for quality ----------------------------------------------------------


def test_images_are_kept_as_they_were_drawn_and_told_one_by_one(engine, plan, jobs):
    arrived = []

    def told(image):
        read_image(image.path, sha256=image.pixels_sha256, size=(48, 32))
        arrived.append(image)

    record = engine.run(replace(plan, images=jobs, arrived=told), silent)
    assert list(record.images) == arrived
    assert [(image.prompt, image.seed) for image in arrived] == [("cat", 1), ("cat", 2), ("dog", 1)]
    for image in arrived:
        assert np.array_equal(read_image(image.path), pixels(f"a {image.prompt}", image.seed, 48, 32))


def test_images_alone_are_drawn_without_timing_anything(engine, plan, jobs):
    engine.script["any"] = [None, fault()]
    images = engine.draw(replace(plan, images=jobs), silent)
    assert engine.events == ["open", "reading", "any 1", "read", "any 2", "any 2", "any 1", "close"]
    assert [Path(image.path).name for image in images] == ["cat-1.png", "cat-2.png", "dog-1.png"]


@pytest.mark.parametrize(
    ("quality", "drawn"),
    [
        ("", [("cat", 1), ("cat", 2), ("dog", 1)]),
        ("wrong-seed", [("cat", 2), ("cat", 3), ("dog", 2)]),
        ("swap-prompts", [("dog", 1), ("dog", 2), ("cat", 1)]),
    ],
)
def test_faults_of_what_is_drawn_are_put_in_and_stay_hidden(engine, plan, jobs, quality, drawn):
    images = engine.draw(replace(plan, images=jobs, inject=Injection(quality=quality)), silent)
    assert [(image.prompt, image.seed) for image in images] == [("cat", 1), ("cat", 2), ("dog", 1)]
    for image, (prompt, seed) in zip(images, drawn, strict=True):
        assert np.array_equal(read_image(image.path), pixels(f"a {prompt}", seed, 48, 32))


def test_faults_of_the_pixels_are_put_in(engine, plan, jobs):
    for image in engine.draw(replace(plan, images=jobs, inject=Injection(quality="black")), silent):
        assert not read_image(image.path, sha256=image.pixels_sha256).any()
    for image in engine.draw(replace(plan, images=jobs, inject=Injection(quality="noise:0.02")), silent):
        drawn = pixels(f"a {image.prompt}", image.seed, 48, 32).astype(float)
        moved = (read_image(image.path, sha256=image.pixels_sha256) - drawn)[(drawn > 30) & (drawn < 225)]
        assert moved.std() == pytest.approx(0.02 * 255, rel=0.1)


# ---- faults in the clocks -----------------------------------------------------------


def test_slowness_is_put_in_by_really_waiting(engine, plan):
    record = engine.run(replace(plan, inject=Injection(warm_latency=0.2, cold_load=0.4)), silent)
    assert record.cold.total_s == record.cold.phases_s["first_image"] >= 0.25 * 1.4
    for round_ in record.rounds:
        assert round_.seconds >= 0.25 * 1.2
        assert math.fsum(round_.phases_s.values()) == pytest.approx(round_.seconds)
        assert round_.beside_s["client"] - 0.26 == pytest.approx(round_.seconds - 0.25)
        assert round_.beside_s["png"] == 0.01
    assert record.stages_s["rounds"] > 3 * 0.2 * 0.25
    assert record.inject == Injection(warm_latency=0.2, cold_load=0.4)


def test_a_prompt_that_is_refused_starts_nothing(engine, plan, jobs):
    def refuse(variant, workload):
        if workload.prompt == "a dog":
            raise UnsupportedError("no dogs")

    engine.refuse = refuse
    for ask in (engine.run, engine.draw):
        with pytest.raises(UnsupportedError, match="no dogs"):
            ask(replace(plan, images=jobs), silent)
    assert engine.events == []


@pytest.mark.parametrize("inject", [Injection(memory_bytes=1 << 20), Injection(dispatch="fallback")])
def test_what_only_the_drawing_process_can_have_is_refused(engine, plan, inject):
    with pytest.raises(UnsupportedError, match="cannot be injected into scripted"):
        engine.run(replace(plan, inject=inject), silent)
    assert engine.events == []


def test_the_test_process_stays_free_of_torch():
    code = "import sys, pytest_zimage.engines.servers.engine; print({'torch', 'httpcore', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
