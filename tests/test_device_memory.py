"""Device memory holds the weights once and comes back: the two checks that need no baseline."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted_nvml import GIB, Gpu, NVMLError, ScriptedNvml

from pytest_zimage.probes.leftover import ALLOWED_BYTES, DeviceUse

MIB = 1 << 20
MEMORY = Path(__file__).parents[1] / "suites" / "test_memory.py"
SUITE = """
def test_held(zimage):
    zimage.gate(zimage.memory_held())

def test_returned(zimage):
    zimage.gate(zimage.memory_returned())
"""
ON_A_GPU = """
import pytest_zimage.session
from pytest_zimage.probes.device import Machine

def detect(catalog, visible, **options):
    return Machine(device_class=catalog.device("{name}"), torch_device="cuda:0", name="a GPU", capability=(9, 0))

pytest_zimage.session.detect = detect
"""
SOUND = {
    "rounds": [1.0],
    "weight_bytes": {"bfloat16": 20 * GIB},
    "device_held": 20 * GIB + 40 * MIB,
    "device_load_peak": 20 * GIB + 100 * MIB,
    "device_peak": 22 * GIB,
    "device_left": 3 * MIB,
}


# ---- the probe --------------------------------------------------------------


def use(*used_gib: float | None):
    """A `DeviceUse` before which the first size is in use, then the others in turn; and how often it slept."""
    rest, slept = list(used_gib), []

    def following(*_version):
        used = rest.pop(0) if len(rest) > 1 else rest[0]
        return SimpleNamespace(total=int(139.8 * GIB), used=int(used * GIB))

    gpu = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a", answers={"nvmlDeviceGetMemoryInfo": following})
    return DeviceUse("GPU-a", lib=ScriptedNvml(gpu), sleep=slept.append), slept


def test_memory_that_comes_back_at_once_is_asked_once():
    found, slept = use(0.5, 0.5)
    assert (found.left_bytes(), slept) == (0, [])


def test_memory_that_comes_back_late_is_waited_for():
    found, slept = use(0.5, 20.5, 20.5, 0.5)
    assert (found.left_bytes(), len(slept)) == (0, 2)


def test_memory_that_stays_is_told_after_about_five_seconds():
    found, slept = use(0.5, 1.5)
    assert found.left_bytes() == GIB
    assert 4 < sum(slept) < 7


def test_what_others_gave_back_meanwhile_is_no_fault():
    found, _ = use(2.5, 0.5)
    assert found.left_bytes() == -2 * GIB


def test_unknown_is_none_and_not_zero():
    assert DeviceUse("").left_bytes() is None, "the CPU"
    broken = ScriptedNvml(broken=NVMLError(12, "NVML Shared Library Not Found"))
    assert DeviceUse("GPU-a", lib=broken).left_bytes() is None
    assert DeviceUse("GPU-b", lib=ScriptedNvml(Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a"))).left_bytes() is None
    falling = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a")
    found = DeviceUse("GPU-a", lib=ScriptedNvml(falling))
    falling.fallen = True
    assert found.left_bytes() is None


def test_a_slice_is_asked_for_itself():
    piece = Gpu("NVIDIA H200 MIG 1g.18gb", None, 16, "MIG-1", used_gib=1)
    whole = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a", slices=(piece,), used_gib=100)
    found = DeviceUse("MIG-1", lib=ScriptedNvml(whole), sleep=lambda seconds: None)
    piece.used_gib, whole.used_gib = 1.5, 20
    assert found.left_bytes() == GIB // 2


# ---- the gates ---------------------------------------------------------------


@pytest.fixture
def gpu(script):
    """A scripted project on a scripted H200."""
    return on(script, "h200")


def on(script, name):
    script.project.makepyfile(test_suite=SUITE)
    conftest = script.project.path / "conftest.py"
    conftest.write_text(conftest.read_text() + ON_A_GPU.format(name=name))
    return script


def outcome(script, results, run, name):
    script(bf16=[run])
    done = script.run("bf16", "-k", name)
    (verdict,) = results()["verdicts"]
    return done, verdict


def test_sound_memory_passes(gpu, results):
    gpu(bf16=[SOUND])
    done = gpu.run("bf16")
    done.assert_outcomes(passed=2)
    held, returned = results()["verdicts"]
    assert (held["verdict"], returned["verdict"]) == ("PASS", "PASS")
    assert held["notes"] == ["peak 22.0 GiB = weights 20.0 GiB + activations 1.96 GiB"]
    assert results()["runs"][0]["device_left_bytes"] == 3 * MIB


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"device_held": 40 * GIB}, "and tensors hold 40.0 GiB between images"),
        ({"device_held": 10 * GIB}, "and tensors hold 10.0 GiB between images"),
        ({"device_held": int(20 * GIB * 1.021)}, "and tensors hold 20.4 GiB between images"),
        ({"device_load_peak": 40 * GIB}, "and loading held up to 40.0 GiB"),
    ],
)
def test_weights_that_are_not_held_once_are_told(gpu, results, fault, says):
    done, verdict = outcome(gpu, results, {**SOUND, **fault}, "held")
    done.assert_outcomes(failed=1)
    assert (verdict["verdict"], verdict["outcome"]) == ("NOT EXPLAINED", "error")
    assert any(says in note for note in verdict["notes"])
    done.stdout.fnmatch_lines([f"*{says}*"])


@pytest.mark.parametrize("fault", [{"device_held": int(20 * GIB * 1.019)}, {"device_held": int(20 * GIB * 0.981)}])
def test_two_per_cent_are_allowed(gpu, results, fault):
    done, _ = outcome(gpu, results, {**SOUND, **fault}, "held")
    done.assert_outcomes(passed=1)


@pytest.mark.parametrize(("left", "passes"), [(ALLOWED_BYTES, True), (ALLOWED_BYTES + MIB, False), (-5 * GIB, True)])
def test_memory_left_behind_is_told(gpu, results, left, passes):
    done, verdict = outcome(gpu, results, {**SOUND, "device_left": left}, "returned")
    done.assert_outcomes(passed=int(passes), failed=int(not passes))
    assert verdict["verdict"] == ("PASS" if passes else "NOT RETURNED")
    if not passes:
        done.stdout.fnmatch_lines(["*65.0 MiB of device memory stayed in use*64.0 MiB may*"])


@pytest.mark.parametrize("missing", ["device_held", "device_load_peak", "device_peak", "device_left"])
def test_what_is_unknown_skips_and_says_why(gpu, missing):
    gpu(bf16=[{key: value for key, value in SOUND.items() if key != missing}])
    done = gpu.run("bf16", "-rs")
    done.assert_outcomes(passed=1, skipped=1)
    done.stdout.fnmatch_lines(["SKIPPED*does not say what*"])


@pytest.mark.parametrize(("name", "why"), [("gb10", "shares the machine's memory"), ("cpu", "of its own")])
def test_a_device_without_memory_of_its_own_skips(script, name, why):
    if name == "gb10":
        on(script, name)
    else:
        script.project.makepyfile(test_suite=SUITE)
    script(bf16=[SOUND])
    done = script.run("bf16", "-rs")
    done.assert_outcomes(skipped=2)
    done.stdout.fnmatch_lines([f"SKIPPED*{why}*"])


def test_they_are_judged_also_while_baselines_are_recorded(gpu, results):
    gpu(bf16=[{**SOUND, "device_left": GIB}])
    done = gpu.run("bf16", "--update-baselines", "--update-reason", "first")
    done.assert_outcomes(passed=1, failed=1)
    assert [row["verdict"] for row in results()["verdicts"]] == ["PASS", "NOT RETURNED"]


# ---- the process as the driver counts it ----------------------------------------------


def test_memory_of_the_process_is_recorded_and_gated_where_the_driver_tells(script, results):
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    only = ("-k", "process_memory")
    quiet = [{**run, "gpu_process_peak": 2 * GIB + place * MIB} for place, run in enumerate(script.QUIET)]
    script(default=quiet)
    script.run("nvfp4", *only, "--update-baselines", "--update-reason=first").assert_outcomes(passed=1, deselected=8)
    script.run("nvfp4", *only).assert_outcomes(passed=1, deselected=8)
    script(default=[{**run, "gpu_process_peak": 2 * GIB + 200 * MIB} for run in quiet])
    bigger = script.run("nvfp4", *only)
    bigger.assert_outcomes(failed=1, deselected=8)
    bigger.stdout.fnmatch_lines(["nvfp4 peak device memory of the process: BIGGER*"])


def test_memory_of_the_process_is_skipped_with_the_reason_where_it_does_not(script):
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    script(default=script.QUIET)
    done = script.run("nvfp4", "-k", "process_memory", "-rs")
    done.assert_outcomes(skipped=1, deselected=8)
    done.stdout.fnmatch_lines(["*zimage gpu_process_peak: NVML lists no process of diffusers on cpu*"])


# ---- what cannot be said, each for itself ----------------------------------------------


def test_what_has_no_idle_is_judged_by_its_peak(script, results):
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    script.record("nvfp4", [{**run, "unavailable": {"working_set": "it is never idle"}} for run in script.QUIET])
    script(default=[{**run, "unavailable": {"working_set": "it is never idle"}} for run in script.QUIET])
    done = script.run("nvfp4", "-k", "peak_memory or working_set", "-rs")
    done.assert_outcomes(passed=1, skipped=1, deselected=7)
    done.stdout.fnmatch_lines(["*zimage working_set: it is never idle"])
    assert [(row["metric"], row["verdict"]) for row in results()["verdicts"]] == [("rss_peak", "PASS")]


def test_each_skip_has_its_own_reason(script):
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    why = {"working_set": "never idle", "gpu_process_peak": "NVML is silent"}
    script(default=[{**run, "unavailable": why, "memory_notes": ["of something else"]} for run in script.QUIET])
    done = script.run("nvfp4", "-k", "working_set or process_memory or device_memory", "-rs")
    done.stdout.fnmatch_lines_random(
        [
            "*zimage working_set: never idle",
            "*zimage gpu_process_peak: NVML is silent",
            "*zimage device_peak: diffusers on cpu reports no device memory",
        ]
    )
    assert "of something else" not in done.stdout.str()


def test_an_engine_that_tells_no_reason_by_metric_tells_it_among_its_notes(script):
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    script(default=[{**run, "memory_notes": ["the driver is silent"]} for run in script.QUIET])
    script.run("nvfp4", "-k", "device_memory", "-rs").stdout.fnmatch_lines(["*device_peak: the driver is silent"])


USED = {"unavailable": {"rss_peak": "it had drawn before"}}


@pytest.mark.parametrize(
    ("share", "says"), [(1.0, "PASS"), (1.5, "INCONCLUSIVE"), (0.5, "PASS")], ids=["same", "bigger", "smaller"]
)
@pytest.mark.parametrize("more", [(), ("--zimage-runs=2",)], ids=["one", "two"])
def test_a_second_figure_that_is_not_of_its_run_alone_confirms_nothing(script, results, share, says, more):
    """As of a server that ran already: what the first run says of it is all that can be known."""
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    script.record("nvfp4", script.QUIET)
    first = {**script.QUIET[0], "rss_peak": round(2000 * MIB * share)}
    script(default=[first, {**first, **USED}])
    done = script.run("nvfp4", "-k", "peak_memory", "-rs", *more)
    assert (done.ret == 0, "Traceback" in done.stdout.str()) == (True, False)
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["k_new"]) == (says, 1)
    asked = 2 if more or share != 1.0 else 1
    assert script.ran == [f"nvfp4-{run + 1}" for run in range(asked)]
    if asked == 2:
        assert row["notes"][-1] == "1 of 2 runs count, and no more can: it had drawn before"


def test_without_a_baseline_the_figure_of_the_first_run_is_shown(script, results):
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    script(default=[script.QUIET[0], {**script.QUIET[0], **USED}])
    script.run("nvfp4", "-k", "peak_memory", "--zimage-runs=3").assert_outcomes(deselected=8)
    (row,) = results()["verdicts"]
    assert (row["verdict"], row["value"]) == ("NO BASELINE", pytest.approx(2000 * MIB))


def test_a_figure_that_is_not_of_the_run_alone_is_skipped_whatever_was_recorded(script):
    """One that was seen has not vanished; one that was not has, and is an error."""
    shutil.copy(MEMORY, script.project.path / "test_suite.py")
    script(default=script.QUIET)
    only = ("-k", "peak_memory or process_memory")
    script.record("nvfp4", script.QUIET)
    used = {"rss_peak": "it had drawn before"}
    script(default=[{**run, "unavailable": used} for run in script.QUIET])
    skipped = script.run("nvfp4", *only, "-rs")
    skipped.assert_outcomes(skipped=2, deselected=7)
    skipped.stdout.fnmatch_lines(["*zimage rss_peak: it had drawn before"])
    script(default=[{**run, "unavailable": used, "rss_peak": None} for run in script.QUIET])
    vanished = script.run("nvfp4", *only)
    vanished.assert_outcomes(failed=1, skipped=1, deselected=7)
    vanished.stdout.fnmatch_lines(["*rss_peak has a baseline, but this run cannot say it: it had drawn before"])
