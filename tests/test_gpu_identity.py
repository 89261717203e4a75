"""Firmware, board, link and limits of a GPU: what stays is recorded, what moves is not, and a change shows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from scripted_nvml import Gpu, ScriptedNvml, not_supported

from pytest_zimage.catalog import load_catalog
from pytest_zimage.probes import device, environment
from pytest_zimage.probes.identity import gpu_identity
from pytest_zimage.probes.nvml import Nvml
from pytest_zimage.reports.delta import delta_text
from pytest_zimage.verdict.model import Verdict

STEADY = {
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"00000000:1B:00.0"),
    "nvmlDeviceGetVbiosVersion": b"96.00.A5.00.03",
    "nvmlDeviceGetGspFirmwareVersion": b"580.95.05",
    "nvmlDeviceGetInforomImageVersion": "G520.0200.00.05",
    "nvmlDeviceGetBoardPartNumber": "692-2G520-0280-000",
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetPersistenceMode": 0,
    "nvmlDeviceGetPowerManagementLimit": 700_000,
    "nvmlDeviceGetMaxClockInfo": lambda clock: {1: 1980, 2: 3201}[clock],
}
MOVING = {
    "nvmlDeviceGetCurrPcieLinkGeneration": 1,
    "nvmlDeviceGetCurrPcieLinkWidth": 4,
    "nvmlDeviceGetClockInfo": lambda clock: 345,
    "nvmlDeviceGetTemperature": lambda sensor: 41,
    "nvmlDeviceGetPowerUsage": 77_000,
    "nvmlDeviceGetPerformanceState": 8,
    "nvmlDeviceGetEnforcedPowerLimit": 350_000,
}
KNOWN = {
    "cuda_driver": "13.0",
    "device_pci_bus": "00000000:1B:00.0",
    "device_vbios": "96.00.A5.00.03",
    "device_gsp_firmware": "580.95.05",
    "device_inforom": "G520.0200.00.05",
    "device_board_part": "692-2G520-0280-000",
    "device_pcie_max": "gen 5 x16",
    "device_ecc": "on",
    "device_mig": "off",
    "device_persistence": "off",
    "device_power_limit_w": "700",
    "device_clock_max_sm_mhz": "1980",
    "device_clock_max_memory_mhz": "3201",
}


def h200(**answers) -> Gpu:
    return Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a", answers={**STEADY, **MOVING, **answers})


def identity(gpu: Gpu, **options) -> dict[str, str]:
    return gpu_identity(Nvml(ScriptedNvml(gpu, **options), "580.95.05"), 0)


def test_what_stays_is_recorded_and_what_moves_is_not():
    assert identity(h200()) == KNOWN
    idle = {name: 0 if not callable(answer) else (lambda *_: 0) for name, answer in MOVING.items()}
    assert identity(h200(**idle)) == KNOWN


@pytest.mark.parametrize("refused", STEADY)
def test_each_refusal_costs_its_own_line_only(refused):
    found = identity(h200(**{refused: not_supported()}))
    lost = set(KNOWN) - set(found)
    assert lost
    assert found == {key: value for key, value in KNOWN.items() if key not in lost}
    assert len(lost) <= 2, "both clocks are one question"


@pytest.mark.parametrize(
    ("answer", "value", "key"),
    [
        ("nvmlDeviceGetPowerManagementLimit", 0, "device_power_limit_w"),
        ("nvmlDeviceGetPowerManagementLimit", 2**32 - 1, "device_power_limit_w"),
        ("nvmlDeviceGetMaxPcieLinkGeneration", 0, "device_pcie_max"),
        ("nvmlDeviceGetVbiosVersion", "", "device_vbios"),
        ("nvmlDeviceGetVbiosVersion", "[N/A]", "device_vbios"),
        ("nvmlDeviceGetEccMode", [7, 7], "device_ecc"),
        ("nvmlDeviceGetPciInfo", SimpleNamespace(), "device_pci_bus"),
    ],
)
def test_an_answer_that_is_none_is_absent(answer, value, key):
    assert key not in identity(h200(**{answer: value}))


def test_a_lost_gpu_and_old_bindings_leave_what_is_left():
    gone = Nvml(ScriptedNvml(Gpu("NVIDIA H200", (9, 0), 139.8, lost=True)), "580")
    assert gpu_identity(gone, 0) == {"cuda_driver": "13.0"}
    bare = SimpleNamespace(NVMLError=ScriptedNvml.NVMLError, nvmlDeviceGetHandleByIndex=lambda index: object())
    assert gpu_identity(Nvml(bare, "580"), 0) == {}


def test_a_slice_has_its_gpus_identity():
    slices = (Gpu("NVIDIA H200 MIG 1g.18gb", None, 16, "MIG-1"),)
    whole = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a", slices=slices, answers=STEADY)
    found = device.detect(load_catalog(), None, nvml=ScriptedNvml(whole))
    assert found.uuid == "MIG-1"
    assert (found.facts["device_vbios"], found.facts["device_mig"]) == ("96.00.A5.00.03", "on")


def test_it_is_part_of_the_environment_record(tmp_path):
    machine = device.detect(load_catalog(), None, nvml=ScriptedNvml(h200()))
    found = environment.session_environment(tmp_path, machine)
    assert {key: found[key] for key in KNOWN} == KNOWN
    assert list(found) == sorted(found)
    assert "GPU-a" not in found.values(), "the serial identity of a card is nobody's business"


@pytest.mark.parametrize("key", [*KNOWN, "bios", "board", "firmware_ec", "kernel", "driver", "device"])
def test_a_change_of_any_shows_in_the_delta(key):
    record = {**KNOWN, "bios": "b", "board": "c", "firmware_ec": "d", "kernel": "6.17", "driver": "580", "device": "e"}
    changed = environment.diff(record, {**record, key: "another"})
    verdict = Verdict(
        test="t", variant="bf16", metric="warm_latency", unit="s", verdict="SLOWER", outcome="regression",
        value=1.2, baseline=1.0, change=0.2, environment_changed=changed,
    )  # fmt: skip
    assert f"  environment {key}: {record[key]} -> another" in delta_text(verdict).splitlines()
