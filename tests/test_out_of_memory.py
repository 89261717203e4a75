"""Out of memory: that variant's error, which says what was needed, what is free and who holds it; the others go on."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from scripted_nvml import GIB, Gpu, NVMLError, ScriptedNvml

from pytest_zimage.errors import MemoryShortageError
from pytest_zimage.probes.shortage import shortage

STARVED = """
import sys
from pytest_zimage.engines.local import LocalEngine
from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.processes import Command

WORKER = '''
import sys, torch
from pytest_zimage.engines import diffusers_engine
from pytest_zimage.engines.worker import main

def starve(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")

diffusers_engine.DiffusersEngine.{method} = starve
sys.exit(main(["cpu"]))
'''
FAULTS = {{"bf16": "load", "fp8-scaled": "draw"}}

class Starved(LocalEngine):
    def _worker(self, plan, progress):
        if plan.variant.name not in FAULTS:
            return super()._worker(plan, progress)
        command = Command([sys.executable, "-c", WORKER.format(method=FAULTS[plan.variant.name])])
        return WorkerClient(f"worker of {{plan.variant.name}}", plan.log, command, timeout_s=60, progress=progress)

def pytest_zimage_engines(config):
    return {{"diffusers": Starved}}
""".replace("{{", "{").replace("}}", "}")


def test_each_starved_variant_says_so_and_the_others_are_measured(project, results):
    project.makepyfile(
        test_suite="""
        def test_size(zimage):
            zimage.gate(zimage.disk_bytes())
        """
    )
    project.makeconftest(STARVED)
    done = project.runpytest_subprocess("--zimage-config=bf16,fp8-scaled,nvfp4", "--zimage-rounds=1")
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*2 failed, 1 without baseline*"])
    errors = {error["variant"]: error for error in results()["errors"]}
    assert sorted(errors) == ["bf16", "fp8-scaled"]
    assert {error["kind"] for error in errors.values()} == {"MemoryShortageError"}
    assert "worker of bf16: out of host memory while loading: 20.00 GiB more were needed" in errors["bf16"]["message"]
    assert "worker of fp8-scaled: out of host memory while drawing" in errors["fp8-scaled"]["message"]
    assert all("GiB available" in error["message"] and error["mend"] for error in errors.values())
    assert [run["variant"] for run in results()["runs"]] == ["nvfp4"]
    (log,) = (project.path / ".zimage" / "sessions").glob("*/logs/bf16-1.log")
    assert "in starve" in log.read_text(), "where it happened stands in the worker's log"


# ---- what is said -----------------------------------------------------------

TOLD = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.25 GiB is "
    "free. Process 4711 has 118.00 GiB memory in use."
)


def fake_torch(**changes) -> SimpleNamespace:
    calls = {
        "mem_get_info": lambda device: (int(1.25 * GIB), int(139.8 * GIB)),
        "memory_allocated": lambda device: 19 * GIB,
        "get_device_properties": lambda device: SimpleNamespace(uuid="a", is_integrated=0),
    }
    return SimpleNamespace(cuda=SimpleNamespace(**{**calls, **changes}))


def told(error: Exception, torch=None, lib=None, device="cuda:0") -> str:
    processes = [(os.getpid(), 20 * GIB), (os.getppid(), 118 * GIB), (999_999_999, None)]
    lib = lib or ScriptedNvml(Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a", processes=processes))
    found = shortage(error, torch or fake_torch(), device, "loading", lib=lib)
    assert isinstance(found, MemoryShortageError)
    assert found.mend
    return found.message


def test_needed_free_held_and_by_whom():
    message = told(RuntimeError(TOLD))
    for part in (
        "out of cuda:0 memory while loading",
        "20.50 GiB more were needed",
        "1.25 GiB of 139.80 GiB are free",
        "this worker's tensors hold 19.00 GiB",
        f"pid {os.getppid()} ",
        "holds 118.00 GiB",
        "pid 999999999 holds an unknown amount",
    ):
        assert part in message
    assert f"pid {os.getpid()} " not in message, "what this worker holds is told already"
    assert "page cache" not in message, "a discrete card has memory of its own"


@pytest.mark.parametrize(
    "lib",
    [
        ScriptedNvml(broken=NVMLError(12, "NVML Shared Library Not Found")),
        ScriptedNvml(),
        ScriptedNvml(Gpu("", None, None, "GPU-a"), refused=frozenset({"nvmlDeviceGetComputeRunningProcesses"})),
    ],
)
def test_without_nvml_the_rest_is_told(lib):
    message = told(RuntimeError(TOLD), lib=lib)
    assert "1.25 GiB of 139.80 GiB are free" in message
    assert "pid" not in message


def test_a_context_that_an_error_spoilt_costs_only_its_part():
    def spoilt(device):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    message = told(RuntimeError("CUDA error: out of memory\nmore"), fake_torch(mem_get_info=spoilt))
    assert message.endswith("CUDA error: out of memory; cuda:0 does not say what is free: CUDA error: out of memory")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 12884901888 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_hosts_memory_is_not_the_devices(error, device):
    message = told(error, device=device)
    assert message.startswith("out of host memory while loading")
    assert "GiB available" in message
    assert isinstance(error, MemoryError) or "12884901888 bytes more were needed" in message


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    assert shortage(error, fake_torch(), "cuda:0", "drawing") is None


def test_torchs_own_error_is_known():
    import torch

    assert "20.50 GiB more were needed" in told(torch.OutOfMemoryError(TOLD))
