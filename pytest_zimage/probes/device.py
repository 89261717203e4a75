"""Which device class this machine is: found in the pytest process, through NVML, without torch.

The whole device name decides, then compute capability and memory: "NVIDIA GB200" contains "B200", and a MIG slice
carries its parent's name. A GPU of no class gets one of its own, so that its numbers never mix with another's.
"""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from pytest_zimage.catalog import Catalog, DeviceClass
from pytest_zimage.errors import CatalogError, UnsupportedError
from pytest_zimage.probes import nvml as nvml_probe
from pytest_zimage.probes.identity import gpu_identity
from pytest_zimage.probes.nvml import NvmlDevice

_GIB = 1 << 30
_CHOICE = re.compile(r"auto|cpu|cuda(:(?P<index>\d+))?")


class Machine(Struct, frozen=True, kw_only=True):
    """What the tests run on."""

    device_class: DeviceClass
    torch_device: str
    """`cpu`, or `cuda:N` with N counted inside CUDA_VISIBLE_DEVICES."""
    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    """Memory of the device alone; None where it has none of its own or does not say."""
    uuid: str = ""
    """NVML's name of it. With CUDA_VISIBLE_DEVICES set to this, the device is `cuda:0` whatever CUDA's own order is."""
    driver: str = ""
    index: int | None = None
    """NVML's index, in PCI bus order."""
    visible: int = 0
    """How many GPUs CUDA_VISIBLE_DEVICES leaves; 0 on the CPU."""
    facts: dict[str, str] = {}
    """Firmware, board, link and limits of the GPU, for the environment record; see `gpu_identity`."""
    notes: tuple[str, ...] = ()


def detect(
    catalog: Catalog,
    visible: str | None,
    *,
    choice: str = "auto",
    nvml: Any = None,
    memory_total_bytes: int | None = None,
    worker: tuple[int, int] | None = None,
) -> Machine:
    """The machine as `choice` (`auto`, `cpu`, `cuda`, `cuda:N`) and CUDA_VISIBLE_DEVICES (`visible`) leave it.

    `auto` takes the first visible GPU, and the CPU with a note that says why there is none. `nvml` stands in for
    pynvml; `memory_total_bytes` is the machine's RAM, against which a unified-memory device's own figure is checked.
    `worker` is (number, of how many) where several processes share the work of this host: then `auto` and `cuda` give
    each the next visible GPU, and begin again with the first where there are more processes than GPUs.

    Raises `UnsupportedError` if `choice` is malformed, asks for a GPU that is not there, or would spread the work over
    GPUs of different classes, `CatalogError` if two classes match the device.
    """
    parsed = _CHOICE.fullmatch(choice)
    if not parsed:
        raise UnsupportedError(f"unknown device {choice!r}", mend="use auto, cpu, cuda or cuda:N with --zimage-device")
    if choice == "cpu":
        return _cpu(catalog, ("the CPU was asked for",))
    with nvml_probe.opened(nvml) as session:
        if isinstance(session, str):
            return _no_gpu(catalog, choice, (session,))
        found, notes = nvml_probe.devices(session)
        if not found:
            return _no_gpu(catalog, choice, (*notes, "the NVIDIA driver lists no device"))
        seen, why = visible_devices(found, visible)
        if not seen:
            return _no_gpu(catalog, choice, (*notes, *why))
        wanted = int(parsed["index"] or 0)
        if worker is not None and parsed["index"] is None:
            _refuse_mixture(catalog, seen[: worker[1]])
            wanted = worker[0] % len(seen)
        if wanted >= len(seen):
            raise UnsupportedError(
                f"device {choice} was asked for, {len(seen)} visible", mend=f"use cuda:0 to cuda:{len(seen) - 1}"
            )
        device = seen[wanted]
        device_class, class_notes = classify(catalog, device)
        memory, memory_notes = _plausible_memory(device, device_class, memory_total_bytes)
        return Machine(
            device_class=device_class,
            torch_device=f"cuda:{wanted}",
            name=device.name,
            capability=device.capability,
            memory_bytes=memory,
            uuid=device.uuid,
            driver=session.driver,
            index=device.index,
            visible=len(seen),
            facts=gpu_identity(session, device.index),
            notes=(*notes, *why, *_kinds(seen, device), *class_notes, *memory_notes),
        )


def visible_devices(found: list[NvmlDevice], visible: str | None) -> tuple[list[NvmlDevice], tuple[str, ...]]:
    """`found` as CUDA_VISIBLE_DEVICES leaves and orders it: indexes, `GPU-`/`MIG-` UUIDs, or their beginnings.

    As in CUDA, the list ends at its first entry that names nothing; a note says so.
    """
    if visible is None:
        return found, ()
    if not visible.strip():
        return [], ("CUDA_VISIBLE_DEVICES is empty, which hides every GPU",)
    seen: list[NvmlDevice] = []
    for entry in (part.strip() for part in visible.split(",")):
        hits = _named(found, entry)
        if len(hits) != 1:
            return seen, (f"CUDA_VISIBLE_DEVICES={visible}: {entry!r} names no one device, so it ends there",)
        if hits[0] in seen:
            return [], (f"CUDA_VISIBLE_DEVICES={visible}: {entry!r} is there twice, which hides every GPU",)
        seen += hits
    return seen, ()


def _named(found: list[NvmlDevice], entry: str) -> list[NvmlDevice]:
    if entry.isdecimal():
        # A GPU in MIG mode shows CUDA only its first slice when it is named by index.
        return [device for device in found if device.index == int(entry)][:1]
    if entry.startswith(("GPU-", "MIG-")):
        return [device for device in found if device.uuid.startswith(entry)]
    return []


def classify(catalog: Catalog, device: NvmlDevice) -> tuple[DeviceClass, tuple[str, ...]]:
    """The one class that `device` belongs to, or one made from its name; raises `CatalogError` on two."""
    hits = [entry for entry in catalog.devices.values() if _matches(entry, device)]
    if len(hits) > 1:
        names = ", ".join(f"[devices.{entry.name}]" for entry in hits)
        raise CatalogError(
            f"{device.name} matches more than one device class: {names}",
            mend="narrow the key 'pattern', 'capability' or 'memory_gib' of one of them",
        )
    if hits:
        return hits[0], ()
    name = re.sub(r"[^a-z0-9]+", "_", device.name.lower()).strip("_") or "unnamed_gpu"
    name = f"gpu_{name}" if name[0].isdigit() or name in catalog.devices else name
    return DeviceClass(name=name, title=device.name), (
        f"{device.name} is in no device class, so its baselines are kept under {name!r}; to name it yourself, add a "
        f"table [devices.NAME] with pattern = {re.escape(device.name)!r} to the file of the ini value zimage_catalog",
        *device.notes,
    )


def _matches(entry: DeviceClass, device: NvmlDevice) -> bool:
    if not entry.pattern or not re.fullmatch(entry.pattern, device.name, re.IGNORECASE):
        return False
    # A slice is not the device it was cut from, however wide the pattern.
    if device.mig and "MIG" not in entry.pattern:
        return False
    if entry.capability is not None and entry.capability != device.capability:
        return False
    if entry.memory_gib is None:
        return True
    if device.memory_bytes is None:
        # On a discrete card "not supported" means a lost GPU or a slice, never unified memory.
        return False
    low, high = entry.memory_gib
    return low <= device.memory_bytes / _GIB <= high


def _plausible_memory(device: NvmlDevice, entry: DeviceClass, total: int | None) -> tuple[int | None, tuple[str, ...]]:
    """Unified memory has no size of its own; some drivers answer all the same, some of them with odd values."""
    memory = device.memory_bytes
    if not entry.unified_memory or memory is None:
        return memory, ()
    if total is not None and 0.5 * total <= memory <= 1.1 * total:
        return memory, ()
    return None, (f"{device.name}: NVML's memory total of {memory} bytes is not believed beside the machine's {total}",)


def _kinds(seen: list[NvmlDevice], device: NvmlDevice) -> tuple[str, ...]:
    kinds = sorted({entry.name for entry in seen})
    if len(kinds) < 2:
        return ()
    return (
        f"GPUs of different kinds are visible ({', '.join(kinds)}) and {device.name} counts; CUDA numbers them by "
        "speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID, so name the one you mean by UUID in CUDA_VISIBLE_DEVICES",
    )


def _refuse_mixture(catalog: Catalog, used: list[NvmlDevice]) -> None:
    """Baselines belong to one device class, so a session spread over two could be judged against neither."""
    classes = {classify(catalog, device)[0].name for device in used}
    if len(classes) > 1:
        told = ", ".join(f"GPU {device.index} is {device.name}" for device in used)
        alike = [device for device in used if device.name == used[0].name]
        raise UnsupportedError(
            f"the {len(used)} workers would run on GPUs of different kinds: {told}",
            mend="name GPUs of one kind, and as many workers: "
            f"CUDA_VISIBLE_DEVICES={','.join(device.uuid for device in alike)} pytest ... -n {len(alike)}",
        )


def _no_gpu(catalog: Catalog, choice: str, notes: tuple[str, ...]) -> Machine:
    if choice != "auto":
        raise UnsupportedError(
            f"device {choice} was asked for and there is no GPU: {'; '.join(notes)}",
            mend="use --zimage-device auto, or correct the driver or CUDA_VISIBLE_DEVICES",
        )
    return _cpu(catalog, notes)


def _cpu(catalog: Catalog, notes: tuple[str, ...]) -> Machine:
    return Machine(device_class=catalog.device("cpu"), torch_device="cpu", name="CPU", notes=notes)
