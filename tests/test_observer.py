"""What is read of a machine from the test process, through a scripted NVML and a scripted host."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import psutil
import pytest
from scripted_nvml import LIBRARY_NOT_FOUND, Gpu, NVMLError, ScriptedNvml, not_supported

from pytest_zimage.engines.protocol import CanaryTimed
from pytest_zimage.probes.fitness import GpuProcess, Reading
from pytest_zimage.probes.gpu_state import GpuState, decoded
from pytest_zimage.probes.host_load import Cores, HostLoad, core_times, own_processes, process_name, swap_used_bytes
from pytest_zimage.probes.nvml import Nvml
from pytest_zimage.probes.observer import Observer, Strangers, observing, worse

GB = 10**9
ANSWERS = {
    "nvmlDeviceGetClockInfo": 1755,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetTemperature": 66,
    "nvmlDeviceGetPowerUsage": 655_400,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
}
ASKED = frozenset({*ANSWERS, "nvmlDeviceGetComputeRunningProcesses"})


def nvml(*, processes=(), refused=(), absent=(), **answers) -> ScriptedNvml:
    """One H200 under load, UUID GPU-1, that answers otherwise where told."""
    told = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-1", processes=processes, answers={**ANSWERS, **answers})
    return ScriptedNvml(told, refused=frozenset(refused), absent=frozenset(absent))


def state(lib: ScriptedNvml, uuid: str = "GPU-1") -> GpuState:
    return GpuState(Nvml(lib, "580"), uuid)


READ = {
    "sm_clock_mhz": ("nvmlDeviceGetClockInfo", 1755),
    "sm_clock_max_mhz": ("nvmlDeviceGetMaxClockInfo", 1980),
    "temperature_c": ("nvmlDeviceGetTemperature", 66),
    "power_w": ("nvmlDeviceGetPowerUsage", 655.4),
    "power_limit_w": ("nvmlDeviceGetEnforcedPowerLimit", 700.0),
    "throttle": ("nvmlDeviceGetCurrentClocksEventReasons", ("power cap",)),
    "processes": ("nvmlDeviceGetComputeRunningProcesses", {}),
}


@pytest.mark.parametrize("figure", READ)
def test_each_figure_is_read(figure):
    assert getattr(state(nvml()), figure)() == READ[figure][1]


@pytest.mark.parametrize("figure", READ)
def test_what_is_refused_is_unknown_and_says_so(figure):
    refusing = state(nvml(refused=[READ[figure][0]]))
    assert getattr(refusing, figure)() is None
    assert list(refusing.refused.values()) == ["NVML says Not Supported"]


@pytest.mark.parametrize("figure", ["sm_clock_mhz", "sm_clock_max_mhz", "temperature_c", "power_w", "power_limit_w"])
@pytest.mark.parametrize("value", [0, -1, 2**32 - 1])
def test_what_cannot_be_is_not_believed(figure, value):
    lying = state(nvml(**{READ[figure][0]: value}))
    assert getattr(lying, figure)() is None
    assert list(lying.refused.values()) == [f"{value} cannot be"]


def test_a_refusal_is_forgotten_once_it_is_answered():
    lib = nvml(nvmlDeviceGetTemperature=not_supported())
    asking = state(lib)
    assert asking.temperature_c() is None
    lib.gpus[0].answers["nvmlDeviceGetTemperature"] = 50
    assert asking.temperature_c() == 50
    assert asking.refused == {}


def test_a_device_that_nvml_does_not_know_answers_nothing():
    nobody = state(nvml(), "MIG-7")
    assert [getattr(nobody, figure)() for figure in READ] == [None] * len(READ)
    assert nobody.refused == {"the device": "NVML says Not Found"}


def test_older_bindings_have_an_older_name_for_throttling():
    newer, older = "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
    assert state(nvml(absent=[newer], **{older: 0x20})).throttle() == ("thermal throttle",)
    neither = state(nvml(absent=[newer, older]))
    assert neither.throttle() is None
    assert neither.refused == {"throttling": "this nvidia-ml-py cannot ask"}


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0, ()),
        (0x1 | 0x2, ()),
        (0x4, ("power cap",)),
        (0x8, ("hardware slowdown",)),
        (0x8 | 0x40, ("hardware thermal throttle",)),
        (0x8 | 0x80, ("power brake",)),
        (0x10, ("sync boost",)),
        (0x20 | 0x4, ("power cap", "thermal throttle")),
        (0x100, ("display clock",)),
        (0x400, ("reason 0x400",)),
    ],
)
def test_throttling_in_words(bits, words):
    assert decoded(bits) == words


def test_a_process_without_a_size_is_listed_all_the_same():
    listed = [(7, None), (8, 2**64 - 1), (9, 5)]
    assert state(nvml(processes=listed)).processes() == {7: None, 8: None, 9: 5}


# ---- whose processes -----------------------------------------------------


def strangers(*own: int) -> Strangers:
    return Strangers(1, own=lambda root: [1, *own], name={4711: "python"}.get)


def test_the_session_itself_is_no_stranger():
    others, doubt = strangers(10, 11).among({1: GB, 10: GB, 11: GB, 4711: 3 * GB}, worker=10)
    assert others == (GpuProcess(4711, "python", 3 * GB),)
    assert doubt == ""


def test_in_a_container_the_one_newcomer_is_the_worker():
    """NVML counts as the host does; the worker's own number, 10, is not among its."""
    who = strangers(10)
    assert who.among({900: GB}, worker=None)[0] == (GpuProcess(900, None, GB),)
    assert who.among({900: GB, 901: 20 * GB}, worker=10) == ((GpuProcess(900, "", GB),), "")


def test_in_a_container_two_newcomers_are_a_doubt_and_no_accusation():
    who = strangers(10)
    who.among({}, worker=None)
    others, doubt = who.among({901: 20 * GB, 902: GB}, worker=10)
    assert others == ()
    assert doubt == "which of 2 processes is the worker: a container hides its process number"


def test_a_driver_that_lists_nobody_accuses_nobody():
    who = strangers(10)
    assert who.among({}, worker=None) == ((), "")
    assert who.among({}, worker=10) == ((), "")


def test_own_processes_are_looked_up_again_only_for_an_unknown_number():
    asked = []
    who = Strangers(1, own=lambda root: asked.append(root) or [1, 10], name=str)
    for _ in range(3):
        who.among({1: 5, 10: 5}, worker=10)
    assert asked == [1]


def test_a_server_that_ran_before_the_session_is_no_stranger():
    family = {1: [1, 10], 700: [700, 701]}
    who = Strangers(1, 700, own=family.__getitem__, name={4711: "python"}.get)
    assert who.among({701: 20 * GB}, worker=None) == ((), "")
    listed = {701: 20 * GB, 4711: GB}
    assert who.among(listed, worker=700) == ((GpuProcess(4711, "python", GB),), "")


def test_a_newcomer_beside_a_servers_child_is_a_stranger():
    """The process that is named may have others do its work: numbers are known by any of the session's own."""
    who = strangers(10, 11)
    who.among({}, worker=None)
    others, doubt = who.among({11: 20 * GB, 4711: GB}, worker=10)
    assert others == (GpuProcess(4711, "python", GB),)
    assert doubt == ""


def test_own_processes_are_this_one_and_its_children():
    child = psutil.Popen(["sleep", "60"])
    try:
        assert {os.getpid(), child.pid} <= {process.pid for process in own_processes(os.getpid())}
        assert process_name(child.pid) == "sleep"
    finally:
        child.kill()
        child.wait()
    assert process_name(child.pid) == ""


# ---- the host ------------------------------------------------------------


class Host:
    """Cores whose work is a script: seconds of all and of our own at each read."""

    def __init__(self, *cores: Cores, step_s: float = 1.0) -> None:
        self.cores, self.now_s, self.step_s, self.slept_s = list(cores), 0.0, step_s, 0.0

    def load(self, cores: int = 4) -> HostLoad:
        return HostLoad(1, read=lambda _: self.cores.pop(0), clock=self.clock, sleep=self.sleep, cores=cores)

    def clock(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.now_s += seconds


@pytest.mark.parametrize(
    ("all_s", "own_s", "share"), [(8.0, 0.0, 1.0), (8.0, 4.0, 0.5), (4.0, 4.0, 0.0), (0.1, 2.0, 0)]
)
def test_what_the_session_uses_is_taken_off_the_load(all_s, own_s, share):
    host = Host(Cores(100, 50), Cores(100 + all_s, 50 + own_s))
    assert host.load().others() == pytest.approx(share)


def test_the_load_is_that_since_the_last_look():
    load = Host(Cores(100, 0), Cores(108, 0), Cores(108, 0)).load()
    assert [load.others(), load.others()] == [1.0, 0.0]


def test_a_first_look_waits_for_a_countable_while():
    host = Host(Cores(1, 0), Cores(1, 0), step_s=0.001)
    host.load().others()
    assert 0.15 < host.slept_s <= 0.2


def test_a_kernel_that_does_not_count_is_unknown():
    assert Host(Cores(0, 0), Cores(0, 0)).load().others() is None


def test_the_true_counts_contain_this_process():
    seen = core_times(os.getpid())
    assert seen.all_s >= 0
    assert seen.own_s > 0


def test_a_server_beside_the_session_counts_as_its_own():
    busy = [sys.executable, "-c", "sum(range(10**7)); print(flush=True); input()"]
    with psutil.Popen(busy, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        alone = core_times(process.pid).own_s
        ours = core_times(os.getpid()).own_s
        both = core_times(process.pid, os.getpid()).own_s
        process.kill()
    assert 0 < alone < ours
    assert abs(both - ours) < alone / 2, "it is a child too, and counts once"


def test_swap_is_read_from_the_kernel(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1 kB\nSwapTotal:  2048 kB\nSwapFree:  1024 kB\n")
    assert swap_used_bytes(meminfo) == 1024 * 1024
    meminfo.write_text("MemTotal: 1 kB\n")
    assert swap_used_bytes(meminfo) is None
    assert swap_used_bytes(tmp_path / "absent") is None


# ---- looks ---------------------------------------------------------------


def observer(lib: ScriptedNvml | None) -> Observer:
    host = Host(*[Cores(0.5 * i, 0) for i in range(1, 9)]).load()
    return Observer(state(lib) if lib else None, host, strangers(10), unknown=() if lib else ("no driver",))


def test_one_look_has_everything():
    seen = observer(nvml(processes=[(10, GB), (4711, 2 * GB)])).look(CanaryTimed(790.0, 4000.0), worker=10)
    assert (seen.sm_clock_mhz, seen.sm_clock_max_mhz, seen.throttle, seen.power_limit_w) == (
        *(1755, 1980, ("power cap",), 700.0),
    )
    assert seen.processes == (GpuProcess(4711, "python", 2 * GB),)
    assert (seen.canary.matmul_tflops, seen.canary.copy_gb_s) == (790.0, 4000.0)
    assert seen.host_load == pytest.approx(0.0625)
    assert seen.unknown == ()


GB10_REFUSES = ("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetClockInfo")


def test_gb10_leaves_what_it_refuses_unknown_and_says_the_rest():
    seen = observer(nvml(refused=GB10_REFUSES, processes=[(10, 12 * GB)])).look(CanaryTimed(95.0, 250.0), worker=10)
    assert (seen.sm_clock_mhz, seen.sm_clock_max_mhz, seen.power_limit_w) == (None, None, None)
    assert (seen.temperature_c, seen.power_w, seen.processes) == (66, 655.4, ())
    assert sorted(seen.unknown) == [
        "SM clock's maximum: NVML says Not Supported",
        "SM clock: NVML says Not Supported",
        "power limit: NVML says Not Supported",
    ]


def test_a_gpu_that_refuses_everything_is_unknown_and_no_crash():
    seen = observer(nvml(refused=ASKED)).look(CanaryTimed(notes=("out of memory",)))
    known = {name for name in Reading.__struct_fields__ if getattr(seen, name) not in (None, 1)}
    assert known == {"host_load", "swap_bytes", "canary", "unknown"}
    assert len(seen.unknown) == len(ASKED) + 1


def test_without_a_gpu_the_host_is_looked_at():
    seen = observer(None).look()
    assert seen.host_load is not None
    assert seen.unknown == ("no driver",)


def test_the_thread_keeps_the_worst_of_all_looks():
    lib = nvml()
    watching = observer(lib)
    with watching.watching(10, interval_s=3600) as watch:
        for clock, bits, heat in ((1900, 0x4, 60), (1200, 0x20, 90), (1980, 0, 70)):
            lib.gpus[0].answers |= {
                "nvmlDeviceGetClockInfo": clock,
                "nvmlDeviceGetCurrentClocksEventReasons": bits,
                "nvmlDeviceGetTemperature": heat,
            }
            watch.once()
    worst = watch.worst
    assert (worst.sm_clock_mhz, worst.throttle, worst.temperature_c, worst.looks) == (
        *(1200, ("power cap", "thermal throttle"), 90, 3),
    )


def test_the_thread_looks_by_itself_and_is_gone_afterwards():
    looked = threading.Event()

    def temperature(_sensor):
        looked.set()
        return 66

    lib = nvml(nvmlDeviceGetTemperature=temperature)
    watching = observer(lib)
    lib.threads.clear()
    with watching.watching(10, interval_s=0.001) as watch:
        assert looked.wait(10)
    assert watch.worst.looks >= 1
    assert lib.threads == {"zimage-fitness"}
    assert "zimage-fitness" not in {thread.name for thread in threading.enumerate()}


def test_the_thread_ends_when_the_block_fails():
    with pytest.raises(ZeroDivisionError), observer(nvml()).watching(10, interval_s=0.001):
        raise ZeroDivisionError
    assert "zimage-fitness" not in {thread.name for thread in threading.enumerate()}


def test_processes_are_asked_for_more_rarely_than_clocks():
    lib = nvml()
    with observer(lib).watching(10, interval_s=3600) as watch:
        for _ in range(10):
            watch.once()
    assert lib.asked.count("nvmlDeviceGetComputeRunningProcesses") == 2
    assert lib.asked.count("nvmlDeviceGetClockInfo") == 10


def test_without_a_gpu_there_is_no_thread():
    with observer(None).watching(None, interval_s=0.001) as watch:
        assert "zimage-fitness" not in {thread.name for thread in threading.enumerate()}
    assert watch.worst is None


def test_the_worse_of_two_looks():
    one = Reading(sm_clock_mhz=1500, processes=(GpuProcess(7, "x", 5),), unknown=("a",))
    other = Reading(temperature_c=70, processes=(GpuProcess(7, "x", 9), GpuProcess(8, "y", 1)), unknown=("a", "b"))
    assert worse(one, other) == Reading(
        sm_clock_mhz=1500,
        temperature_c=70,
        processes=(GpuProcess(8, "y", 1), GpuProcess(7, "x", 9)),
        looks=2,
        unknown=("a", "b"),
    )


def test_nvml_is_opened_for_a_gpu_only_and_closed_again():
    lib = nvml()
    with observing("GPU-1", os.getpid(), lib=lib) as found:
        assert found.look().sm_clock_mhz == 1755
    assert lib.asked[-1] == "nvmlShutdown"
    silent = nvml()
    with observing("", os.getpid(), lib=silent) as found:
        assert found.look().unknown == ("no GPU, so nothing was asked of one",)
    assert silent.asked == []


def test_without_a_driver_everything_of_the_gpu_is_unknown():
    lib = ScriptedNvml(broken=NVMLError(LIBRARY_NOT_FOUND, "Library Not Found"))
    with observing("GPU-1", os.getpid(), lib=lib) as found:
        assert found.look().unknown == ("no NVIDIA driver to ask: Library Not Found",)
