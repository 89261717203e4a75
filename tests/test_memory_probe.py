"""Memory: the kernel's high-water mark, the sampler beside it, and the device's side of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from scripted_nvml import Gpu, ScriptedNvml, not_supported

from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes import high_water, memory
from pytest_zimage.probes.nvml import Nvml, ProcessMemory

MIB = 1 << 20


def in_child(code: str) -> list[int]:
    """Runs `code` in a fresh process, so that its peak is its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


TOUCH = "b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096]); del b\n"


def test_peak_outlives_the_memory_that_made_it():
    before, after, now = in_child(
        "from pytest_zimage.probes.high_water import rss_peak\nfrom pytest_zimage.probes.memory import rss_now\n"
        f"a = rss_peak().bytes\n{TOUCH}print(a, rss_peak().bytes, rss_now())"
    )
    assert after - before > 190 * MIB
    assert now < after - 150 * MIB


def test_peak_starts_with_the_process_not_with_its_parent():
    """`ru_maxrss` survives exec and would report the parent's 200 MiB here; VmHWM must not."""
    code = (
        "import subprocess, sys\n"
        "b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096])\n"
        "c = 'from pytest_zimage.probes.high_water import rss_peak; print(rss_peak().bytes)'\n"
        "print(subprocess.run([sys.executable, '-c', c], capture_output=True, text=True).stdout)"
    )
    (child,) = in_child(code)
    assert 0 < child < 150 * MIB


def test_source_is_named_and_the_fallback_warns(tmp_path):
    assert high_water.rss_peak().source == "VmHWM"
    broken = tmp_path / "status"
    broken.write_text("Name:\tpython\nVmHWM:\tnonsense kB\n")
    for path in (broken, tmp_path / "absent"):
        fallback = high_water.rss_peak(path)
        assert fallback.source == "ru_maxrss"
        assert fallback.bytes > MIB
        assert "process that started" in fallback.notes[0]


def test_the_kernels_kilobytes_are_1024_bytes(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t  1000 kB\n")
    assert high_water.rss_peak(status) == (1_024_000, "VmHWM", ())


def test_no_peak_at_all_is_an_error_not_a_zero(tmp_path, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=0))
    with pytest.raises(MeasurementError, match="VmHWM"):
        high_water.rss_peak(tmp_path / "absent")


def test_rss_now_is_in_bytes():
    psutil = pytest.importorskip("psutil")
    assert memory.rss_now() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


class ScriptedRss:
    """Answers the scripted sizes in turn, the last one for ever; says when they were all read."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.at, self.exhausted = sizes, 0, threading.Event()

    def __call__(self) -> int:
        size = self.sizes[min(self.at, len(self.sizes) - 1)]
        self.at += 1
        if self.at >= len(self.sizes):
            self.exhausted.set()
        return size


def test_sampler_keeps_the_peak_between_start_and_stop():
    read = ScriptedRss(10, 50, 90, 20)
    with memory.MemorySampler(0.001, read=read) as sampler:
        assert sampler.samples >= 1, "start() takes a sample before it returns"
        assert read.exhausted.wait(10)
    assert sampler.peak_bytes == 90
    assert sampler.samples == read.at
    assert not [thread for thread in threading.enumerate() if thread.name == "zimage-memory"]


def test_sampler_sees_what_the_kernel_sees():
    peak, sampled = in_child(
        "from pytest_zimage.probes.memory import *\n"
        "s = MemorySampler(0.001).start()\n"
        "b = bytearray(200 << 20); b[::4096] = b'x' * len(b[::4096])\n"
        "s.now(); del b\n"
        "p = peaks(s.stop()); print(p.rss_peak_bytes, p.rss_sampled_peak_bytes)"
    )
    assert sampled == pytest.approx(peak, rel=0.05)


def test_sampler_that_can_no_longer_read_says_so():
    def read() -> int:
        if threading.current_thread().name == "zimage-memory":
            raise OSError(5, "Input/output error")
        return 7

    sampler = memory.MemorySampler(0.001, read=read).start()
    sampler._thread.join(10)
    assert "Input/output error" in sampler.failure
    assert any("ended after" in note for note in memory.peaks(sampler).notes)


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
def test_sampler_refuses_a_busy_loop(interval):
    with pytest.raises(ValueError, match="interval_s"):
        memory.MemorySampler(interval)


def test_sampler_runs_once_and_stops_twice():
    sampler = memory.MemorySampler(1.0).start()
    with pytest.raises(RuntimeError, match="already running"):
        sampler.start()
    assert sampler.stop().samples == sampler.stop().samples == 2


# ---- the device's side ----------------------------------------------------


def scripted_nvml(*answers, gpus: int = 1) -> Nvml:
    """An NVML whose running processes are `answers`, one a poll; an exception is raised."""
    script = iter(answers)

    def running():
        answer = next(script)
        if isinstance(answer, Exception):
            raise answer
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in answer]

    told = {"nvmlDeviceGetComputeRunningProcesses": running}
    listed = (Gpu("NVIDIA H200", (9, 0), 139.8, f"GPU-{index}", answers=told) for index in range(gpus))
    return Nvml(ScriptedNvml(*listed), "580.95")


def polled(*answers, uuid: str = "", gpus: int = 1) -> ProcessMemory:
    process = ProcessMemory(scripted_nvml(*answers, gpus=gpus), pid=42, uuid=uuid)
    for _ in answers[:: gpus if not uuid else 1]:
        process.poll()
    return process


def test_nvml_keeps_this_process_peak_only():
    process = polled([(42, 5 * MIB), (7, 900 * MIB)], [(42, 8 * MIB)], [(42, 3 * MIB)])
    assert process.peak_bytes == 8 * MIB
    assert process.notes() == ()


@pytest.mark.parametrize("used", [None, 2**64 - 1])
def test_nvml_without_a_figure_is_none_not_a_giant(used):
    process = polled([(42, used)])
    assert process.peak_bytes is None
    assert "without its memory" in process.notes()[0]


def test_nvml_refusal_is_a_note():
    process = polled(not_supported())
    assert process.peak_bytes is None
    assert "Not Supported" in process.notes()[0]


def test_nvml_that_hides_the_process_says_what_it_saw():
    process = polled([(7, MIB), (8, MIB)], [])
    assert process.peak_bytes is None
    assert "never listed process 42 (2 others seen)" in process.notes()[0]


def test_nvml_sums_devices_unless_one_is_named():
    assert polled([(42, 5)], [(42, 6)], gpus=2).peak_bytes == 11
    assert polled([(42, 6)], uuid="GPU-1", gpus=2).peak_bytes == 6
    assert "no device GPU-9" in polled(uuid="GPU-9", gpus=2).notes()[0]


def fake_torch(allocated: int, reserved: int, *, held: int = 2, unified: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        _C=SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: None),
        cuda=SimpleNamespace(
            memory_stats=lambda device: {"requested_bytes.all.current": held},
            max_memory_allocated=lambda device: allocated,
            max_memory_reserved=lambda device: reserved,
            get_device_properties=lambda device: SimpleNamespace(uuid="ab-cd", is_integrated=unified),
        ),
    )


def test_peaks_of_a_gpu_run():
    sampler = memory.MemorySampler(read=lambda: 5, nvml=ProcessMemory(scripted_nvml([(os.getpid(), 9)]), os.getpid()))
    found = memory.peaks(sampler, fake_torch(3, 4), "cuda:0")
    assert (found.device_peak_bytes, found.device_reserved_peak_bytes, found.nvml_process_peak_bytes) == (3, 4, 9)
    assert (found.device_held_bytes, found.rss_sampled_peak_bytes, found.notes) == (2, 5, ())


def test_unified_memory_is_said_not_to_come_on_top():
    found = memory.peaks(memory.MemorySampler(read=lambda: 5), fake_torch(3, 4, unified=True), "cuda:0")
    assert (found.device_peak_bytes, found.rss_sampled_peak_bytes) == (3, 5), "two views of one memory, never a sum"
    assert any("shares the machine's memory" in note for note in found.notes)


def test_an_allocator_that_does_not_count_requests_is_unknown_not_zero():
    torch = fake_torch(3, 4)
    torch.cuda.memory_stats = lambda device: {}
    assert memory.peaks(memory.MemorySampler(), torch, "cuda:0").device_held_bytes is None


def test_peaks_of_a_cpu_run_have_no_device_side():
    found = memory.peaks(memory.MemorySampler(), fake_torch(3, 4), "cpu")
    assert found.device_peak_bytes is found.device_reserved_peak_bytes is found.nvml_process_peak_bytes is None


def test_gpu_run_that_allocated_nothing_is_noted():
    assert any(
        "allocated nothing" in note for note in memory.peaks(memory.MemorySampler(), fake_torch(0, 0), "cuda:0").notes
    )


def test_torchs_uuid_is_written_as_nvmls():
    assert memory.nvml_uuid(fake_torch(0, 0), "cuda:0") == "GPU-ab-cd"


def test_nothing_is_sampled_while_paused_and_one_sample_follows():
    read = ScriptedRss(10, 90, 20)
    with memory.MemorySampler(60, read=read) as sampler:
        with sampler.paused():
            assert not [thread for thread in threading.enumerate() if thread.name == "zimage-memory"]
            before = read.at
        assert read.at == before + 1
        assert [thread for thread in threading.enumerate() if thread.name == "zimage-memory"]


def test_worker_on_a_cpu_asks_no_driver():
    with memory.worker_sampler(None, "cpu") as sampler:
        assert memory.peaks(sampler).notes == ()


def test_worker_on_a_gpu_without_nvml_says_why_its_peak_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with memory.worker_sampler(fake_torch(3, 4), "cuda:0") as sampler:
        found = memory.peaks(sampler, fake_torch(3, 4), "cuda:0")
    assert (found.nvml_process_peak_bytes, found.device_peak_bytes) == (None, 3)
    assert found.notes == ("nvidia-ml-py is not installed, so no GPU was looked for",)
