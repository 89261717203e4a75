"""What runs, recorded as flat text."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from scripted_nvml import Gpu, ScriptedNvml, not_supported

from pytest_zimage.catalog import load_catalog
from pytest_zimage.probes import environment, packages
from pytest_zimage.probes.device import Machine
from pytest_zimage.probes.nvml import gpu_uuids


@pytest.fixture
def repository(tmp_path):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return tmp_path


def test_session_environment_is_text_sorted_and_has_no_names_of_people(tmp_path):
    machine = Machine(
        device_class=load_catalog().device("gb10"),
        torch_device="cuda:0",
        name="NVIDIA GB10",
        capability=(12, 1),
        driver="580.95.05",
    )
    found = environment.session_environment(tmp_path, machine)
    assert list(found) == sorted(found)
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["python"] == platform.python_version()
    assert (found["device_class"], found["device_capability"], found["driver"]) == ("gb10", "12.1", "580.95.05")
    assert platform.node() not in {value for key, value in found.items() if key != "device"}


def test_commit_and_its_dirt(repository):
    clean = environment.git_commit(repository)
    assert len(clean) >= 7
    (repository / "untracked").write_text("x")
    assert environment.git_commit(repository) == clean
    (repository / "file").write_text("two")
    assert environment.git_commit(repository) == f"{clean}-dirty"


def test_commit_outside_of_git_and_without_git(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = tmp_path.parent
    assert environment.git_commit(outside / "absent") == "none"
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit(repository) == "none"


def test_a_git_that_hangs_is_left_behind(repository, monkeypatch):
    def hang(*_args, timeout, **_kwargs):
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(environment.subprocess, "run", hang)
    assert environment.git_commit(repository) == "none"


def test_absent_package_is_named_absent():
    found = packages.package_versions(["pytest", "no-such-distribution"])
    assert found == {"pytest": pytest.__version__, "no-such-distribution": packages.ABSENT}


def test_wheel_tag_tells_a_wheel_without_kernels():
    assert packages.wheel_tags("Wheel-Version: 1.0\nTag: py3-none-any\n") == "py3-none-any"
    tags = "Tag: cp312-abi3-manylinux_2_28_aarch64\nTag: cp312-abi3-manylinux_2_26_aarch64\n"
    assert packages.wheel_tags(tags) == "cp312-abi3-manylinux_2_26_aarch64,cp312-abi3-manylinux_2_28_aarch64"
    assert packages.wheel_tags("") == "(not a wheel)"
    assert "comfy-kitchen_wheel" in packages.package_versions(["comfy-kitchen"])


KITCHEN = SimpleNamespace(
    list_backends=lambda: {
        "triton": {"available": True, "disabled": True, "unavailable_reason": None},
        "hip": {"available": False, "disabled": False, "unavailable_reason": "no ROCm"},
        "eager": {"available": True, "disabled": False, "unavailable_reason": None},
        "cuda": {"available": True, "disabled": False, "unavailable_reason": None},
    }
)


def fake_torch() -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.11.0+cu130",
        version=SimpleNamespace(cuda="13.0"),
        get_num_threads=lambda: 2,
        cuda=SimpleNamespace(
            get_device_name=lambda device: "NVIDIA GB10", get_device_capability=lambda device: (12, 1)
        ),
    )


def test_worker_environment_of_a_gpu():
    found = environment.worker_environment(fake_torch(), KITCHEN, "cuda:0")
    assert found["comfy-kitchen_backends"] == "cuda,eager"
    assert (found["torch"], found["torch_cuda"], found["torch_threads"]) == ("2.11.0+cu130", "13.0", "2")
    assert (found["device"], found["device_capability"]) == ("NVIDIA GB10", "12.1")
    assert list(found) == sorted(found)
    assert all(isinstance(value, str) for value in found.values())


def test_worker_environment_of_a_cpu_has_no_device():
    torch = fake_torch()
    torch.version.cuda = None
    torch.cuda = None
    found = environment.worker_environment(torch, KITCHEN)
    assert found["torch_cuda"] == "none"
    assert "device" not in found


def test_no_backend_is_said():
    assert packages.kitchen_backends(SimpleNamespace(list_backends=dict)) == "none"


def test_real_worker_environment():
    """What the installed packages answer, in a process of its own: this one must not import torch."""
    code = (
        "import json, torch, comfy_kitchen\nfrom pytest_zimage.probes.environment import worker_environment as w\n"
        "print(json.dumps(w(torch, comfy_kitchen)))"
    )
    import json

    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    assert "eager" in found["comfy-kitchen_backends"].split(",")
    assert found["torch"].startswith(importlib.metadata.version("torch").split("+")[0])


def test_fingerprint_is_stable_and_hides_the_id(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    two.write_text("ffffffffffffffffffffffffffffffff\n")
    first = environment.machine_fingerprint([one])
    assert first == environment.machine_fingerprint([tmp_path / "absent", one])
    assert first != environment.machine_fingerprint([two])
    assert first not in one.read_text()
    assert len(first) == 12
    assert int(first, 16) >= 0


def test_clones_of_one_image_are_told_apart_by_their_gpus(tmp_path):
    """Two rented H200s had one machine id, and their disks were held for one."""
    image = tmp_path / "machine-id"
    image.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    first, second = (environment.machine_fingerprint([image], gpus) for gpus in (["GPU-1"], ["GPU-2"]))
    assert first != second
    assert first == environment.machine_fingerprint([image], ["GPU-1"])
    assert first != environment.machine_fingerprint([image], [])


def test_a_machine_has_all_its_gpus_in_one_order(monkeypatch):
    first, second, lost = (
        Gpu("NVIDIA H200", (9, 0), 139, uuid=f"GPU-{number}", lost=number == 3) for number in (1, 2, 3)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_uuids(ScriptedNvml(second, first, lost)) == ("GPU-1", "GPU-2")
    assert gpu_uuids(ScriptedNvml()) == gpu_uuids(ScriptedNvml(first, broken=not_supported())) == ()
    assert gpu_uuids(ScriptedNvml(first, refused=frozenset({"nvmlDeviceGetUUID"}))) == ()


def test_fingerprint_without_an_id_is_the_hardware(tmp_path, monkeypatch):
    blank = tmp_path / "blank"
    blank.write_text("uninitialized\n")
    bare = environment.machine_fingerprint([blank])
    assert bare == environment.machine_fingerprint([])
    total = environment.memory_total_bytes()
    monkeypatch.setattr(environment, "memory_total_bytes", lambda: total * 2)
    assert environment.machine_fingerprint([]) != bare


def test_cpu_model_of_x86_and_arm(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n")
    assert environment.cpu_model(info) == "AMD EPYC"
    info.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd87\n\nCPU implementer\t: 0x41\nCPU part\t: 0xd85\n")
    assert environment.cpu_model(info) == "0x41 0xd85,0xd87"
    assert environment.cpu_model(tmp_path / "absent")


def test_firmware_where_readable(tmp_path):
    assert environment.firmware(tmp_path) == {}
    (tmp_path / "bios_vendor").write_text("NVIDIA\n")
    (tmp_path / "bios_version").write_text("5.36_0ACUM018\n")
    assert environment.firmware(tmp_path) == {"bios": "NVIDIA 5.36_0ACUM018"}


def test_diff():
    old = {"torch": "2.10", "driver": "580", "cuda": "13", "started_at": "a"}
    new = {"torch": "2.11", "driver": "580", "kernel": "6.17", "started_at": "b"}
    assert environment.diff(old, new) == {
        "cuda": ("13", packages.ABSENT),
        "kernel": (environment.UNRECORDED, "6.17"),
        "torch": ("2.10", "2.11"),
    }
    assert environment.diff(new, new) == {}
