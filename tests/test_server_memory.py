"""A server's memory is that of all its processes at one moment, seen from outside, and its GPU's as NVML lists it."""

from __future__ import annotations

import psutil
import pytest
from holding import holding
from scripted_nvml import GIB, Gpu, NVMLError, ScriptedNvml

from pytest_zimage.engines.servers.memory import TreeMemory

MIB = 1 << 20


@pytest.fixture
def holder():
    with holding() as holder:
        yield holder


def still(pid: int | None, gpu: str = "", **options) -> TreeMemory:
    """One that looks when it is told to, and never by itself."""
    return TreeMemory(pid, gpu, interval_s=3600, **options)


def test_idle_and_peak_are_told_apart(holder, nothing_left):
    with still(holder.pid) as memory:
        memory.mark_idle()
        holder("hold 50000000")
        memory.now()
        holder("drop")
        memory.now()
    assert memory.idle_bytes is not None
    assert 49 * MIB > memory.idle_bytes > 4 * MIB
    assert 50_000_000 <= memory.peak_bytes - memory.idle_bytes < 60_000_000
    assert memory.gpu_peak_bytes is None
    assert memory.why_no_size == memory.why_no_gpu == ""


def test_the_kernels_mark_misses_no_moment(holder):
    with still(holder.pid) as memory:
        memory.mark_idle()
        holder("hold 50000000")
        holder("drop")
        memory.now()
    assert memory.peak_bytes - memory.idle_bytes < 10_000_000, "nobody looked while it was held"
    # The kernel counts in batches of pages, each thread on its own.
    assert memory.high_water_bytes - memory.idle_bytes >= 49_000_000


def test_children_count_even_with_another_session(holder):
    with still(holder.pid) as memory:
        memory.mark_idle()
        holder("child")
        holder("ask hold 50000000")
        holder("hold 30000000")
        memory.now()
        holder("end")
        memory.now()
    assert 80_000_000 <= memory.peak_bytes - memory.idle_bytes < 110_000_000
    assert 50_000_000 <= memory.high_water_bytes < 80_000_000, "of the largest one, not of their sum"


def test_who_lost_its_parent_still_counts(holder):
    with still(holder.pid) as memory:
        holder("child")
        holder("ask detached")
        (child,) = psutil.Process(holder.pid).children()
        (orphan,) = child.children()
        try:
            memory.now()
            holder("end")
            assert orphan.pid not in [process.pid for process in psutil.Process(holder.pid).children(recursive=True)]
            held = memory.now()
        finally:
            orphan.kill()
        psutil.wait_procs([orphan], timeout=20)
        assert memory.now() < held - 4 * MIB


def test_processes_that_vanish_are_no_error(holder):
    with still(holder.pid) as memory:
        memory.mark_idle()
        holder.process.kill()
        holder.process.wait()
        assert memory.now() is None
    assert memory.peak_bytes == memory.idle_bytes > 0
    assert memory.why_no_size == memory.why_no_gpu == ""


def test_a_process_that_is_not_there_is_a_note(holder):
    holder.process.kill()
    holder.process.wait()
    with still(holder.pid) as memory:
        memory.mark_idle()
    assert (memory.idle_bytes, memory.peak_bytes, memory.high_water_bytes) == (None, None, None)
    assert "cannot be looked at" in memory.why_no_size


def test_a_process_that_is_not_told_is_a_note():
    with still(None, "GPU-a", lib=ScriptedNvml()) as memory:
        memory.mark_idle()
    assert (memory.idle_bytes, memory.peak_bytes, memory.gpu_peak_bytes) == (None, None, None)
    assert memory.why_no_size == "which process of this host serves is not known, so its memory is not"
    assert memory.why_no_gpu == memory.why_no_size


def test_it_looks_by_itself_meanwhile(holder, nothing_left):
    with TreeMemory(holder.pid, "", interval_s=0.001) as memory:
        while memory.samples < 20:
            holder("idle")
        holder("hold 50000000")
        seen = memory.samples
        while memory.samples < seen + 3:
            holder("idle")
        held = memory.peak_bytes
    assert held > 50_000_000


def on_gpu(*processes):
    return Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a", processes=processes)


def test_the_gpu_is_asked_for_all_processes_of_the_server_together(holder):
    holder("child")
    (child,) = psutil.Process(holder.pid).children()
    gpu = on_gpu((holder.pid, 1 * GIB), (child.pid, 20 * GIB), (1, 7 * GIB))
    other = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-b", processes=((holder.pid, 50 * GIB),))
    with still(holder.pid, "GPU-a", lib=ScriptedNvml(other, gpu)) as memory:
        memory.now()
        gpu.processes = ((holder.pid, 2 * GIB), (child.pid, 10 * GIB))
        memory.now()
    assert memory.gpu_peak_bytes == 21 * GIB, "the largest sum, not the sum of the largest"
    assert memory.why_no_size == memory.why_no_gpu == ""


@pytest.mark.parametrize(
    ("lib", "says"),
    [
        (ScriptedNvml(broken=NVMLError(12, "NVML Shared Library Not Found")), "NVML Shared Library Not Found"),
        (ScriptedNvml(on_gpu(), refused=frozenset({"nvmlDeviceGetComputeRunningProcesses"})), "Not Supported"),
        (ScriptedNvml(on_gpu((1, GIB))), "NVML never listed process"),
        (ScriptedNvml(), "NVML has no device GPU-a"),
    ],
)
def test_what_nvml_cannot_say_is_a_note(holder, lib, says):
    with still(holder.pid, "GPU-a", lib=lib) as memory:
        memory.mark_idle()
    assert memory.gpu_peak_bytes is None
    assert memory.idle_bytes > 0
    note = memory.why_no_gpu
    assert says in note


def test_the_cpu_is_not_asked_for_a_gpu(holder):
    lib = ScriptedNvml(on_gpu())
    with still(holder.pid, lib=lib):
        pass
    assert lib.asked == []


def test_what_was_held_before_it_was_idle_is_no_peak(holder):
    gpu = on_gpu((holder.pid, 20 * GIB))
    with still(holder.pid, "GPU-a", lib=ScriptedNvml(gpu)) as memory:
        holder("hold 50000000")
        memory.now()
        holder("drop")
        gpu.processes = ((holder.pid, 2 * GIB),)
        memory.mark_idle()
        holder("hold 20000000")
        memory.now()
    assert 20_000_000 <= memory.peak_bytes - memory.idle_bytes < 40_000_000
    assert memory.gpu_peak_bytes == 2 * GIB
