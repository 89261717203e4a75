"""Which packages are installed, and whether comfy-kitchen among them has its kernels."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

PACKAGES = (
    "accelerate",
    "comfy-kitchen",
    "diffusers",
    "msgspec",
    "numpy",
    "nvidia-ml-py",
    "pillow",
    "psutil",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)
_WHEEL = "comfy-kitchen_wheel"
_PACKAGE_KEYS = frozenset({*PACKAGES, _WHEEL, "python"})
ABSENT = "(absent)"


def kitchen_backends(comfy_kitchen: Any) -> str:
    """Backends of comfy-kitchen that would be used, such as `cuda,eager,triton`; `none` if there is none."""
    usable = (
        name
        for name, state in comfy_kitchen.list_backends().items()
        if state.get("available") and not state.get("disabled")
    )
    return ",".join(sorted(usable)) or "none"


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by distribution name; and comfy-kitchen's wheel tag, whose `py3-none-any` has no kernels."""
    found: dict[str, str] = {}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
            continue
        found[name] = distribution.version
        if name == "comfy-kitchen":
            found[_WHEEL] = wheel_tags(distribution.read_text("WHEEL") or "")
    return found


def without_packages(found: Mapping[str, str]) -> dict[str, str]:
    """`found` without Python and packages, for an engine that draws with others than those of this process."""
    return {key: value for key, value in found.items() if key not in _PACKAGE_KEYS}


def wheel_tags(wheel: str) -> str:
    """The tags in a WHEEL file (PEP 427), compressed to one line; `(not a wheel)` without any."""
    tags = [line.partition(":")[2].strip() for line in wheel.splitlines() if line.startswith("Tag:")]
    return ",".join(sorted(tags)) or "(not a wheel)"


def slow_kitchen(found: Mapping[str, str]) -> str:
    """Why quantised layers run without native kernels on the GPU of the record `found`; empty where they do not.

    pip takes the pure-Python wheel without a word where no other fits: everything still works, slowly.
    """
    wheel, backends = found.get(_WHEEL, ""), found.get("comfy-kitchen_backends")
    usable = backends is None or "cuda" in backends.split(",")
    if "device_capability" not in found or (usable and "py3-none-any" not in wheel):
        return ""
    return (
        f"comfy-kitchen has no cuda backend on {found.get('device', 'this GPU')} (wheel {wheel or 'unknown'}; backends "
        f"{backends or 'unknown'}): everything still works, slowly. Its wheels with kernels need glibc 2.28 or newer "
        f"(here {found.get('libc') or 'unknown'}) and a matching Python (here {found.get('python', 'unknown')})"
    )
