"""What GB10 (DGX Spark) was reported to answer and to refuse, each line on a scripted system."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted_nvml import GIB, Gpu, ScriptedNvml

import pytest_zimage
from pytest_zimage.catalog import load_catalog
from pytest_zimage.probes import device, environment, memory, packages
from pytest_zimage.probes.gpu_state import GpuState
from pytest_zimage.probes.leftover import DeviceUse
from pytest_zimage.probes.nvml import Nvml, ProcessMemory
from pytest_zimage.probes.shortage import shortage

MEM_TOTAL_BYTES = 127_600_748 * 1024
TORCH_TOTAL_BYTES = int(121.69 * GIB)
ANSWERS = {
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"0000000F:01:00.0"),
    "nvmlDeviceGetVbiosVersion": "9A.0B.1E.00.00",
    "nvmlDeviceGetInforomImageVersion": "[N/A]",
    "nvmlDeviceGetBoardPartNumber": "N/A",
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetMaxClockInfo": lambda clock: 3003 if clock == ScriptedNvml.NVML_CLOCK_SM else 0,
    "nvmlDeviceGetTemperature": lambda sensor: 61,
    "nvmlDeviceGetPowerUsage": 38_500,
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=96, memory=0),
}


def gb10(memory_gib=None, **options) -> Gpu:
    """Memory (v1 and v2), fan and power limit are refused; utilisation, temperature, power and processes answer."""
    return Gpu("NVIDIA GB10", (12, 1), memory_gib, "GPU-spark", answers=ANSWERS, **options)


def machine(gpu: Gpu) -> device.Machine:
    return device.detect(load_catalog(), None, nvml=ScriptedNvml(gpu), memory_total_bytes=MEM_TOTAL_BYTES)


@pytest.fixture
def spark(monkeypatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "release", lambda: "6.17.0-1008-nvidia")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.39"))


def test_name_capability_and_system_are_recorded(spark, tmp_path):
    found = environment.session_environment(tmp_path, machine(gb10()))
    assert {key: found[key] for key in ("device_class", "device", "device_capability", "driver", "cuda_driver")} == {
        "device_class": "gb10",
        "device": "NVIDIA GB10",
        "device_capability": "12.1",
        "driver": "580.95.05",
        "cuda_driver": "13.0",
    }
    assert (found["architecture"], found["kernel"], found["libc"]) == ("aarch64", "6.17.0-1008-nvidia", "glibc 2.39")
    assert found["device_pci_bus"] == "0000000F:01:00.0", "a domain that is no small number stays text"


def test_what_is_refused_or_not_available_is_absent_and_nothing_else_is_lost(tmp_path):
    found = environment.session_environment(tmp_path, machine(gb10()))
    refused = {"device_power_limit_w", "device_inforom", "device_board_part", "device_ecc", "device_pcie_max"}
    assert not refused & set(found)
    assert "device_clock_max_memory_mhz" not in found, "a clock of 0 MHz is no clock"
    assert (found["device_vbios"], found["device_clock_max_sm_mhz"]) == ("9A.0B.1E.00.00", "3003")


def test_newer_torch_is_not_needed_for_a_capability_above_its_maximum():
    """Before 2.11 torch warns that 12.1 is above its maximum; that is harmless and must not become an error."""

    def capability(name):
        warnings.warn("Found GPU0 NVIDIA GB10 which is of cuda capability 12.1.", UserWarning, stacklevel=2)
        return (12, 1)

    torch = SimpleNamespace(
        __version__="2.10.0+cu130",
        version=SimpleNamespace(cuda="13.0"),
        get_num_threads=lambda: 20,
        cuda=SimpleNamespace(get_device_name=lambda name: "NVIDIA GB10", get_device_capability=capability),
    )
    with pytest.warns(UserWarning, match="capability 12.1"):
        found = environment.worker_environment(torch, SimpleNamespace(list_backends=dict), "cuda:0")
    assert found["device_capability"] == "12.1"


# ---- NVML -------------------------------------------------------------------


def test_memory_that_is_not_supported_leaves_the_card_whole():
    found = machine(gb10())
    assert (found.device_class.name, found.device_class.unified_memory, found.memory_bytes) == ("gb10", True, None)
    assert found.torch_device == "cuda:0"
    assert DeviceUse("GPU-spark", lib=ScriptedNvml(gb10())).left_bytes() is None


def test_temperature_and_power_answer_where_the_power_limit_does_not():
    state = GpuState(Nvml(ScriptedNvml(gb10()), "580"), "GPU-spark")
    assert (state.temperature_c(), state.power_w(), state.power_limit_w()) == (61, 38.5, None)
    assert list(state.refused) == ["power limit"]


def test_memory_per_process_works():
    lib = ScriptedNvml(gb10(processes=[(42, 21 * GIB), (7, 3 * GIB)]))
    process = ProcessMemory(Nvml(lib, "580"), 42, "GPU-spark")
    process.poll()
    assert (process.peak_bytes, process.others, process.notes()) == (21 * GIB, 1, ())


@pytest.mark.parametrize(
    ("gib", "believed"), [(TORCH_TOTAL_BYTES / GIB, True), (MEM_TOTAL_BYTES / GIB, True), (0, False), (1 << 30, False)]
)
def test_a_memory_total_is_believed_only_beside_the_machines_own(gib, believed):
    found = machine(gb10(gib))
    assert found.device_class.name == "gb10"
    assert (found.memory_bytes is not None) is believed


@pytest.mark.parametrize("used_gib", [0, 500.0])
def test_memory_in_use_that_cannot_be_is_unknown(used_gib):
    lib = ScriptedNvml(gb10(121.7, used_gib=used_gib))
    assert DeviceUse("GPU-spark", lib=lib).left_bytes() is None


def test_not_supported_on_a_discrete_card_is_no_unified_memory():
    found = machine(Gpu("NVIDIA B200", (10, 0), None))
    assert not found.device_class.unified_memory
    assert found.device_class.name not in load_catalog().devices


# ---- one memory ---------------------------------------------------------------


def fake_torch(allocated: int, *, free: int = 2 * GIB, total: int = TORCH_TOTAL_BYTES) -> SimpleNamespace:
    properties = SimpleNamespace(uuid="spark", is_integrated=1)
    return SimpleNamespace(
        _C=SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: None),
        cuda=SimpleNamespace(
            max_memory_allocated=lambda name: allocated,
            max_memory_reserved=lambda name: allocated,
            memory_allocated=lambda name: allocated,
            memory_stats=lambda name: {"requested_bytes.all.current": allocated},
            mem_get_info=lambda name: (free, total),
            get_device_properties=lambda name: properties,
        ),
    )


def test_resident_and_device_memory_are_never_added():
    """Weights are in the process's resident set here; a sum would count them twice."""
    found = memory.peaks(memory.MemorySampler(read=lambda: 23 * GIB).start().stop(), fake_torch(21 * GIB), "cuda:0")
    assert (found.rss_sampled_peak_bytes, found.device_peak_bytes) == (23 * GIB, 21 * GIB)
    assert any("shares the machine's memory" in note for note in found.notes)


def test_out_of_memory_tells_what_the_machine_has_beside_what_cuda_says(monkeypatch):
    """cudaMemGetInfo does not count page cache that can be dropped; MemAvailable does."""
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=90 * GIB))
    error = RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 121.69 GiB")
    lib = ScriptedNvml(gb10(processes=[(999_999_999, 70 * GIB)]))
    told = shortage(error, fake_torch(21 * GIB), "cuda:0", "loading", lib=lib)
    assert told is not None
    for part in ("3.00 GiB more", "2.00 GiB of 121.69 GiB are free", "90.00 GiB available, page cache", "70.00 GiB"):
        assert part in told.message


# ---- comfy-kitchen ------------------------------------------------------------

AARCH64 = "cp312-abi3-manylinux_2_26_aarch64,cp312-abi3-manylinux_2_28_aarch64"
GPU = {"device": "NVIDIA GB10", "device_capability": "12.1", "libc": "glibc 2.39", "python": "3.12.3"}


@pytest.mark.parametrize(
    ("wheel", "backends", "slow"),
    [
        (AARCH64, "cuda,eager,triton", False),
        ("py3-none-any", "eager,triton", True),
        ("py3-none-any", "eager", True),
        (AARCH64, "eager,triton", True),
        ("py3-none-any", None, True),
        (AARCH64, None, False),
    ],
)
def test_a_wheel_without_kernels_is_told_loudly(wheel, backends, slow):
    found = {**GPU, "comfy-kitchen_wheel": wheel} | ({"comfy-kitchen_backends": backends} if backends else {})
    told = packages.slow_kitchen(found)
    assert bool(told) is slow
    assert not slow or (wheel in told and "everything still works, slowly" in told and "glibc 2.39" in told)


def test_a_cpu_needs_no_cuda_backend():
    cpu = {"device": "CPU", "comfy-kitchen_wheel": "py3-none-any", "comfy-kitchen_backends": "eager"}
    assert packages.slow_kitchen(cpu) == ""


def test_the_note_stands_in_terminal_results_and_delta(script, results):
    gpu = {**GPU, "comfy-kitchen_wheel": "py3-none-any", "comfy-kitchen_backends": "eager,triton"}
    script.record("bf16", script.QUIET)
    script(bf16=[{"rounds": [1.0], "environment": gpu}])
    passing = script.run("bf16")
    assert passing.ret == pytest.ExitCode.OK, "slow is no failure by itself"
    passing.stdout.fnmatch_lines(
        ["NOTE: comfy-kitchen has no cuda backend on NVIDIA GB10 (wheel py3-none-any;*slowly*"]
    )
    assert any("no cuda backend" in note for note in results()["notes"])
    spread = script.run("bf16", "-n1")
    assert spread.stdout.str().count("NOTE: comfy-kitchen has no cuda backend") == 1, "and through xdist"
    script(bf16=[{"rounds": [1.2], "environment": gpu}])
    script.run("bf16").stdout.fnmatch_lines(["*bf16 warm latency: SLOWER*", "*comfy-kitchen has no cuda backend*"])


# ---- two boxes that look alike ---------------------------------------------------


def test_firmware_of_the_board_is_recorded(tmp_path):
    for name, text in {
        "bios_vendor": "American Megatrends",
        "bios_version": "5.36_0ACUM018",
        "bios_date": "08/21/2025",
        "board_vendor": "NVIDIA",
        "board_name": "P4242",
        "product_name": "NVIDIA_DGX_Spark",
        "ec_firmware_release": "1.18",
    }.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert environment.firmware(tmp_path) == {
        "bios": "American Megatrends 5.36_0ACUM018 08/21/2025",
        "board": "NVIDIA P4242 NVIDIA_DGX_Spark",
        "firmware_ec": "1.18",
    }


def test_no_kernel_profiler_is_relied_on():
    """CUPTI gives no kernel data on this machine, so nothing may need it; a profile of the CPU's side does not."""
    sources = Path(pytest_zimage.__file__).parent.rglob("*.py")
    words = ("ProfilerActivity.CUDA", "use_cuda=True", "cupti")
    assert [path.name for path in sources if any(word in path.read_text() for word in words)] == []
