"""What runs, recorded: flat text by key, so that two records can be compared line by line.

`session_environment` is made in the pytest process and imports no torch; `worker_environment` is made in the worker,
where another package may be on the path, and wins where both speak. No host name, no user name.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest_zimage
from pytest_zimage.probes.device import Machine
from pytest_zimage.probes.nvml import gpu_uuids
from pytest_zimage.probes.packages import ABSENT, kitchen_backends, package_versions

PORTABLE = ("plugin", "torch", "diffusers", "transformers", "comfy-kitchen", "safetensors")
"""Keys of what could change an exact number, such as a count of forwards. The machine is not among them."""
UNRECORDED = "(not recorded)"
MACHINE_ID = "machine"
"""Key: which machine this is."""
DEVICE_ID = "device_id"
"""Key: which GPU of its kind this is."""
_NEVER_MATTERS = frozenset({"started_at", "finished_at", "recorded_at", "wall_s", "pid"})
_GIT_LIMIT_S = 5.0
_DMI = Path("/sys/class/dmi/id")
_PROC = Path("/proc")
_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


def session_environment(rootdir: Path, machine: Machine | None = None) -> dict[str, str]:
    """Machine, operating system, packages and commit, as the pytest process sees them. Keys are sorted."""
    found = {
        "plugin": pytest_zimage.__version__,
        "commit": git_commit(rootdir),
        "python": platform.python_version(),
        "os": os_name(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu": cpu_model(),
        "cpu_cores": str(usable_cores()),
        "memory_total_gib": f"{memory_total_bytes() / 2**30:.1f}",
        MACHINE_ID: machine_fingerprint(),
        **firmware(),
        **package_versions(),
    }
    if machine is not None:
        found |= {"device_class": machine.device_class.name, "device": machine.name}
        if machine.uuid:
            found[DEVICE_ID] = hashlib.sha256(machine.uuid.encode()).hexdigest()[:12]
        if machine.driver:
            found["driver"] = machine.driver
        if machine.capability:
            found["device_capability"] = "{}.{}".format(*machine.capability)
        found |= machine.facts
    return dict(sorted(found.items()))


def worker_environment(torch: Any, comfy_kitchen: Any, device: str = "cpu") -> dict[str, str]:
    """Packages, device and kernel backends, as the worker that draws sees them. Keys are sorted."""
    found = {
        **package_versions(),
        "torch": str(torch.__version__),
        "torch_cuda": str(torch.version.cuda or "none"),
        "torch_threads": str(torch.get_num_threads()),
        "comfy-kitchen_backends": kitchen_backends(comfy_kitchen),
    }
    if device.startswith("cuda"):
        found["device"] = str(torch.cuda.get_device_name(device))
        found["device_capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return dict(sorted(found.items()))


def other_weights(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The weights files, by `weights.ROLE`, whose recorded hash is not the present one: (old, new)."""
    changed = diff(old, new)
    return {key: pair for key, pair in changed.items() if key.startswith("weights.") and pair[0] != UNRECORDED}


def git_commit(rootdir: Path) -> str:
    """Short commit of `rootdir`, with `-dirty` where tracked files differ; `none` outside of git."""
    commit = _git(rootdir, "rev-parse", "--short", "HEAD")
    if not commit:
        return "none"
    changed = _git(rootdir, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-unknown" if changed is None else f"{commit}-dirty" if changed else commit


def _git(rootdir: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            check=False,
            cwd=rootdir,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_LIMIT_S,
            # Neither a password prompt nor a lock held by an editor may hang a test session.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def cpu_model(cpuinfo: Path = _PROC / "cpuinfo") -> str:
    """The model name, or on Arm, where Linux prints none, implementer and parts (`0x41 0xd85,0xd87`)."""
    fields: dict[str, set[str]] = {}
    for line in _read(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), set()).add(value.strip())
    if names := fields.get("model name"):
        return ", ".join(sorted(names))
    if parts := fields.get("CPU part"):
        return f"{','.join(sorted(fields.get('CPU implementer', set())))} {','.join(sorted(parts))}".strip()
    return platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """Cores this process may run on; a container or `taskset` can leave fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_total_bytes() -> int:
    """The machine's RAM in bytes."""
    for line in _read(_PROC / "meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return int(importlib.import_module("psutil").virtual_memory().total)


def firmware(folder: Path = _DMI) -> dict[str, str]:
    """BIOS, embedded controller and board, where the kernel shows them (not in most virtual machines)."""
    keys = {
        "bios": ("bios_vendor", "bios_version", "bios_date"),
        "board": ("board_vendor", "board_name", "board_version", "product_name", "product_version"),
        "firmware_ec": ("ec_firmware_release",),
    }
    found = {key: " ".join(filter(None, (_read(folder / part) for part in parts))) for key, parts in keys.items()}
    return {key: value for key, value in found.items() if value}


def machine_fingerprint(ids: Iterable[Path] = _ID_FILES, gpus: Iterable[str] | None = None) -> str:
    """Twelve hex digits that are the same on this machine and, as far as can be told, on no other.

    Made of the machine id, the CPU and the UUIDs of all GPUs (`gpus`; None: NVML is asked), since machines cloned from
    one image have one id: two rented H200s did. Without an id, as in most containers, of CPU model, cores and memory.
    Nothing can be read back out of it.
    """
    identity = next((text for text in map(_read, ids) if text and text != "uninitialized"), "")
    parts = [identity, cpu_model(), *(gpu_uuids() if gpus is None else gpus)]
    if not identity:
        # Whole GiB, because MemTotal moves by a few MiB from kernel to kernel.
        parts += [str(os.cpu_count()), str(round(memory_total_bytes() / 2**30))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def diff(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What differs, by key: (old, new). A key that only one side has is there too, as not recorded or absent."""
    return {
        key: (old.get(key, UNRECORDED), new.get(key, ABSENT))
        for key in sorted({*old, *new} - _NEVER_MATTERS)
        if old.get(key) != new.get(key)
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
