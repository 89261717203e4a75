"""Which device class a machine is: scripted NVML, with the traps that real names set."""

from __future__ import annotations

import subprocess
import sys

import pytest
from scripted_nvml import GIB, LIBRARY_NOT_FOUND, VERSION_MISMATCH, Gpu, NVMLError, ScriptedNvml

from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import CatalogError, UnsupportedError
from pytest_zimage.probes import device

GB10 = Gpu("NVIDIA GB10", (12, 1), None, "GPU-spark")
H200 = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-aaaa-h200")
RTX = Gpu("NVIDIA GeForce RTX 5090", (12, 0), 31.8, "GPU-bbbb-5090")


@pytest.fixture(scope="module")
def catalog():
    return load_catalog()


def found(catalog, *gpus, visible=None, **options):
    return device.detect(catalog, visible, nvml=ScriptedNvml(*gpus), **options)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        (GB10, "gb10"),
        (H200, "h200"),
        (Gpu("H200 NVL", (9, 0), 140), "h200"),
        (Gpu("nvidia h200", (9, 0), 139), "h200"),
        (RTX, "rtx5090"),
        (Gpu("NVIDIA GeForce RTX 5090 D", (12, 0), 31.8), "rtx5090d"),
        (Gpu("NVIDIA GeForce RTX 5070 Ti", (12, 0), 15.9), "rtx5070ti"),
        (Gpu("NVIDIA GeForce RTX 5060 Ti", (12, 0), 15.9), "rtx5060ti"),
        (Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 95.6), "rtxpro6000"),
        (Gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 95.6), "rtxpro6000_server"),
        (Gpu("NVIDIA L40S", (8, 9), 45), "l40s"),
        (Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80), "a100"),
        (Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24), "rtx4090"),
        (Gpu("NVIDIA B200", (10, 0), 179), "b200"),
        (Gpu("NVIDIA GB200", (10, 0), 184), "gb200"),
        (Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.6), "h100"),
        (Gpu("NVIDIA H100 PCIe", (9, 0), 79.6), "h100_pcie"),
        (Gpu("NVIDIA H100 NVL", (9, 0), 93.6), "h100_nvl"),
        (Gpu("NVIDIA GH200 480GB", (9, 0), 95.6), "gh200"),
        # not one of the catalogue's, however alike
        (Gpu("NVIDIA GeForce RTX 5090 Laptop GPU", (12, 0), 24), "nvidia_geforce_rtx_5090_laptop_gpu"),
        (Gpu("NVIDIA GeForce RTX 5090 D v2", (12, 0), 23.9), "nvidia_geforce_rtx_5090_d_v2"),
        (Gpu("NVIDIA GeForce RTX 5090 D", (12, 0), 23.9), "nvidia_geforce_rtx_5090_d"),
        (Gpu("NVIDIA GeForce RTX 5060 Ti", (12, 0), 7.9), "nvidia_geforce_rtx_5060_ti"),
        (Gpu("NVIDIA GeForce RTX 5070", (12, 0), 11.9), "nvidia_geforce_rtx_5070"),
        (
            Gpu("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", (12, 0), 95.6),
            "nvidia_rtx_pro_6000_blackwell_max_q_workstation_edition",
        ),
        (Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40), "nvidia_a100_sxm4_40gb"),
        (Gpu("NVIDIA L40", (8, 9), 45), "nvidia_l40"),
        (Gpu("NVIDIA GB300", (10, 3), 277), "nvidia_gb300"),
        (Gpu("NVIDIA H20", (9, 0), 95), "nvidia_h20"),
        (Gpu("NVIDIA H200 MIG 1g.18gb", (9, 0), 16), "nvidia_h200_mig_1g_18gb"),
        (Gpu("NVIDIA H100 80GB HBM3 MIG 7g.80gb", (9, 0), 79), "nvidia_h100_80gb_hbm3_mig_7g_80gb"),
        (Gpu("NVIDIA B200", (10, 3), 179), "nvidia_b200"),
        (Gpu("NVIDIA H200", (9, 0), 71), "nvidia_h200"),
        (Gpu("NVIDIA H200", (9, 0), None), "nvidia_h200"),
        (Gpu("NVIDIA H200", None, 139), "nvidia_h200"),
        (Gpu("3D Accelerator", (5, 0), 2), "gpu_3d_accelerator"),
        (Gpu("cpu", (5, 0), 2), "gpu_cpu"),
        (Gpu("", (5, 0), 2), "unnamed_gpu"),
    ],
    ids=lambda value: value.name if isinstance(value, Gpu) else value,
)
def test_class_of_a_device(catalog, gpu, name):
    machine = found(catalog, gpu)
    assert machine.device_class.name == name
    assert machine.torch_device == "cuda:0"
    assert machine.driver == "580.95.05"
    if name not in catalog.devices:
        assert name.isidentifier()
        assert machine.device_class.stored_timings
        assert any("[devices.NAME]" in note for note in machine.notes)
    else:
        assert machine.notes == gpu_notes(machine)


def gpu_notes(machine):
    return tuple(note for note in machine.notes if "has no memory total here" in note)


def test_gb10_without_memory_total_is_whole(catalog):
    machine = found(catalog, GB10, memory_total_bytes=128 * GIB)
    assert (machine.device_class.name, machine.memory_bytes, machine.capability) == ("gb10", None, (12, 1))


@pytest.mark.parametrize(("answer_gib", "believed"), [(121.7, True), (0, False), (3.0, False), (16_000, False)])
def test_gb10_memory_is_believed_only_if_plausible(catalog, answer_gib, believed):
    machine = found(catalog, Gpu("NVIDIA GB10", (12, 1), answer_gib), memory_total_bytes=int(121.7 * GIB))
    assert machine.device_class.name == "gb10"
    assert machine.memory_bytes == (int(answer_gib * GIB) if believed else None)
    assert any("not believed" in note for note in machine.notes) is not believed


def test_discrete_card_without_memory_total_is_not_taken_for_unified(catalog):
    machine = found(catalog, Gpu("NVIDIA H200", (9, 0), None))
    assert machine.device_class.name not in catalog.devices
    assert not machine.device_class.unified_memory
    assert any("no memory total" in note for note in machine.notes)


def test_mig_mode_shows_the_slices_and_not_the_gpu(catalog):
    slices = (Gpu("NVIDIA H200 MIG 1g.18gb", None, 16, "MIG-1"), Gpu("NVIDIA H200 MIG 2g.35gb", None, 33, "MIG-2"))
    whole = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-x", slices=slices)
    machine = found(catalog, whole)
    assert machine.device_class.name == "nvidia_h200_mig_1g_18gb"
    assert machine.capability == (9, 0), "a slice has its GPU's"
    assert found(catalog, whole, visible="MIG-2").uuid == "MIG-2"
    assert found(catalog, whole, visible="0").uuid == "MIG-1"


def test_a_users_class_may_name_a_slice(tmp_path):
    table = tmp_path / "mine.toml"
    table.write_text('[devices.h200slice]\ntitle = "a slice"\npattern = "NVIDIA H200 MIG 1g.18gb"\n')
    machine = found(load_catalog([table]), Gpu("NVIDIA H200 MIG 1g.18gb", (9, 0), 16, "MIG-1"))
    assert machine.device_class.name == "h200slice"


def test_two_classes_that_match_are_an_error(tmp_path):
    table = tmp_path / "mine.toml"
    table.write_text('[devices.mine]\ntitle = "mine"\npattern = "NVIDIA H.*"\n')
    with pytest.raises(CatalogError, match=r"\[devices.h200\], \[devices.mine\]"):
        found(load_catalog([table]), H200)


@pytest.mark.parametrize(
    ("visible", "name", "torch_device"),
    [
        (None, "NVIDIA H200", "cuda:0"),
        ("0", "NVIDIA H200", "cuda:0"),
        ("1", "NVIDIA GeForce RTX 5090", "cuda:0"),
        (" 1 , 0 ", "NVIDIA GeForce RTX 5090", "cuda:0"),
        ("GPU-bbbb-5090", "NVIDIA GeForce RTX 5090", "cuda:0"),
        ("GPU-bb", "NVIDIA GeForce RTX 5090", "cuda:0"),
        ("1,9,0", "NVIDIA GeForce RTX 5090", "cuda:0"),
        ("", "CPU", "cpu"),
        ("-1", "CPU", "cpu"),
        ("-1,0", "CPU", "cpu"),
        ("NoDevFiles", "CPU", "cpu"),
        ("7", "CPU", "cpu"),
        ("GPU-", "CPU", "cpu"),
        ("0,0", "CPU", "cpu"),
    ],
)
def test_visible_devices_are_cudas(catalog, visible, name, torch_device):
    machine = found(catalog, H200, RTX, visible=visible)
    assert (machine.name, machine.torch_device) == (name, torch_device)
    if name == "CPU":
        assert machine.device_class.name == "cpu"
        assert any("CUDA_VISIBLE_DEVICES" in note for note in machine.notes)


def test_different_kinds_are_noted_only_if_both_are_visible(catalog):
    assert any("different kinds" in note for note in found(catalog, H200, RTX).notes)
    assert not found(catalog, H200, RTX, visible="0").notes
    assert not found(catalog, H200, H200).notes


def test_lost_gpu_does_not_lose_the_others(catalog):
    machine = found(catalog, Gpu("", None, None, lost=True), RTX)
    assert (machine.device_class.name, machine.index) == ("rtx5090", 1)
    assert any("GPU 0: NVML says GPU is lost" in note for note in machine.notes)


def test_a_gpu_that_fell_off_the_bus_does_not_count(catalog):
    """Its handle is there and every question to it is answered by GPU_IS_LOST."""
    machine = found(catalog, Gpu("NVIDIA H200", (9, 0), 139.8, fallen=True), RTX)
    assert (machine.device_class.name, machine.index) == ("rtx5090", 1)
    assert any("GPU 0 is lost" in note for note in machine.notes)
    alone = found(catalog, Gpu("NVIDIA H200", (9, 0), 139.8, fallen=True))
    assert alone.torch_device == "cpu"
    assert any("GPU 0 is lost" in note for note in alone.notes)


def test_mig_mode_without_a_slice_hides_the_gpu(catalog):
    machine = found(catalog, Gpu("NVIDIA H200", (9, 0), 139.8, mig_mode=True))
    assert machine.torch_device == "cpu"
    assert any("MIG mode without a slice" in note for note in machine.notes)


ASKED = sorted(name for name in vars(ScriptedNvml) if name.startswith("nvml") and name != "nvmlInit")


@pytest.mark.parametrize("refused", [*([name] for name in ASKED), ASKED], ids=lambda names: ",".join(names)[:40])
def test_whatever_nvml_refuses_costs_no_crash(catalog, refused):
    """Each answer alone, then all of them: a refusal never ends a session, and never lands in another's class."""
    machine = device.detect(catalog, None, nvml=ScriptedNvml(H200, refused=frozenset(refused)))
    lists_devices = not {"nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"} & set(refused)
    assert (machine.torch_device == "cpu") is not lists_devices
    identifying = {"nvmlDeviceGetName", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetMemoryInfo"}
    assert (machine.device_class.name == "h200") is (lists_devices and not identifying & set(refused))


@pytest.mark.parametrize(
    ("nvml", "why"),
    [
        (ScriptedNvml(broken=NVMLError(LIBRARY_NOT_FOUND, "NVML Shared Library Not Found")), "Library Not Found"),
        (ScriptedNvml(broken=NVMLError(VERSION_MISMATCH, "Driver/library version mismatch")), "version mismatch"),
        (ScriptedNvml(), "lists no device"),
        (ScriptedNvml(Gpu("NVIDIA H200", (9, 0), 139.8, lost=True)), "lists no device"),
        (ScriptedNvml(H200, refused=frozenset({"nvmlDeviceGetCount"})), "lists no device"),
    ],
)
def test_no_gpu_is_the_cpu_with_a_reason(catalog, nvml, why):
    machine = device.detect(catalog, None, nvml=nvml)
    assert (machine.device_class.name, machine.torch_device, machine.memory_bytes) == ("cpu", "cpu", None)
    assert why in machine.notes[-1]
    with pytest.raises(UnsupportedError, match="there is no GPU") as refusal:
        device.detect(catalog, None, choice="cuda", nvml=nvml)
    assert why in refusal.value.message
    assert refusal.value.mend


def test_choice(catalog):
    assert found(catalog, H200, choice="cpu").torch_device == "cpu"
    assert found(catalog, H200, RTX, choice="cuda:1").name == "NVIDIA GeForce RTX 5090"
    assert found(catalog, H200, RTX, choice="cuda:1", visible="1,0").name == "NVIDIA H200"
    with pytest.raises(UnsupportedError, match="1 visible"):
        found(catalog, H200, RTX, choice="cuda:1", visible="0")
    for wrong in ("gpu", "cuda:", "cuda:x", "CPU ", ""):
        with pytest.raises(UnsupportedError, match="unknown device"):
            found(catalog, H200, choice=wrong)


def test_nvml_is_closed_again_even_on_errors(catalog):
    nvml = ScriptedNvml(H200)
    device.detect(catalog, None, nvml=nvml)
    with pytest.raises(UnsupportedError):
        device.detect(catalog, None, choice="cuda:5", nvml=nvml)
    assert nvml.asked.count("nvmlShutdown") == 2


def test_bindings_that_are_not_installed_are_the_reason(catalog, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in device.detect(catalog, None).notes[0]


def test_detection_imports_no_torch():
    code = (
        "import sys; from pytest_zimage.catalog import load_catalog\n"
        "from pytest_zimage.probes import device, environment, memory, pagecache\n"
        "device.detect(load_catalog(), None)\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
