"""What ComfyUI's log says of how it computes: the only place where it does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from pytest_zimage.engines.servers.wording import plain

_NATIVE, _EMULATED = "Native ops:", "emulated ops:"
_BACKEND = re.compile(r"Found comfy_kitchen backend (\w+): .*?'available': True, 'disabled': False")
_DTYPE = re.compile(r"model weight dtype ([\w.]+), manual cast: ([\w.]+)")
_ATTENTION = re.compile(r"Using ([\w -]+?)(?: optimization for)? attention(?! in VAE)\b")
_STATE = re.compile(r"Set vram state to: (\w+)")
_REQUESTED = re.compile(r"Requested to load (\w+)")
_LOADED = re.compile(r"loaded (completely|partially)")
_STAGED = re.compile(r"Model (\w+) prepared for dynamic VRAM loading")
_DYNAMIC = {"DynamicVRAM support detected and enabled": "enabled", "DynamicVRAM support disabled": "disabled"}
_MISSING = re.compile(r"(?:unet missing:|clip missing:|Missing VAE keys) \[(.*)\]")
"""Warnings: those weights stay what the memory held before, and the prompt succeeds."""
_UNUSED = re.compile(r"'(?:encoder\.|quant_conv\.|[^']*logit_scale|[^']*text_projection)")
"""What no image from text needs."""
_NO_NUMBERS = "RuntimeWarning: invalid value encountered in cast"
"""Numpy's, where pixels are made of what is no number; only for the first such image of a process."""
_SHOWN = 4
_OVERLAP = 26
"""Characters that tell one place of a log: its entries begin with times as long."""


def said_since(before: str, now: str) -> str:
    """What a log has got since it was `before`: it only grows at its end, and may lose its beginning."""
    # A line that is still written may be written anew.
    before = before[: before.rfind("\n") + 1]
    head = now[:_OVERLAP]
    at = before.find(head) if head else -1
    while at >= 0:
        if now.startswith(before[at:]):
            return now[len(before) - at :]
        at = before.find(head, at + 1)
    return now


def problem(text: str) -> str:
    """Why what this log was written beside is no image of the variant, as a sentence; empty if nothing says so."""
    text = plain(text)
    for keys in _MISSING.findall(text):
        if lacking := [key for key in keys.split(", ") if not _UNUSED.match(key)]:
            named = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
            return f"its files lack {named}: ComfyUI draws from memory that nothing was read into"
    return "it computed values that are no numbers, and made black of them" if _NO_NUMBERS in text else ""


def emulated_ops(text: str) -> tuple[str, ...]:
    """Quantised formats that this machine computes by dequantising, sorted: the log has them in random order."""
    return _sorted(emulated for _, emulated in _ops(plain(text)))


def facts(start: str, since: str) -> dict[str, str]:
    """What of the log belongs to the environment of a measurement: the same for the same server and variant.

    `start` is the log as the run found it, in which others' images may stand, `since` what came then.
    """
    return startup_facts(start + since) | run_facts(since)


def startup_facts(text: str) -> dict[str, str]:
    """What a server says of itself once, while it starts."""
    text = plain(text)
    found = {
        "kitchen_backends": ", ".join(sorted(set(_BACKEND.findall(text)))),
        "attention": _once(_ATTENTION.findall(text)),
        "vram_state": _once(_STATE.findall(text)),
        "dynamic_vram": _once(state for line, state in _DYNAMIC.items() if line in text),
    }
    return {name: value for name, value in found.items() if value}


def run_facts(text: str) -> dict[str, str]:
    """What it says of each model that it loads."""
    text = plain(text)
    found = {
        "native_ops": ", ".join(_sorted(native for native, _ in _ops(text))),
        "emulated_ops": ", ".join(emulated_ops(text)),
        "dtype": _once(f"{weight}, manual cast {cast}" for weight, cast in _DTYPE.findall(text)),
        "loaded": ", ".join(sorted(set(_loads(text)))),
    }
    return {name: value for name, value in found.items() if value}


def _ops(text: str) -> Iterator[tuple[str, str]]:
    """Native and emulated formats of each line that tells them; either may stand alone."""
    for line in text.splitlines():
        if _NATIVE in line or _EMULATED in line:
            native, _, emulated = line.partition(_EMULATED)
            yield native.partition(_NATIVE)[2], emulated


def _loads(text: str) -> Iterator[str]:
    """`MODEL completely`, `MODEL partially` or `MODEL by dynamic VRAM`."""
    model = ""
    for line in text.splitlines():
        if found := _REQUESTED.search(line):
            model = found[1]
        elif found := _STAGED.search(line):
            yield f"{found[1]} by dynamic VRAM"
        elif (found := _LOADED.search(line)) and model:
            yield f"{model} {found[1]}"


def _sorted(lists: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name.strip() for one in lists for name in one.split(",") if name.strip()}))


def _once(values: Iterable[str]) -> str:
    """Each value once, in the order of the log."""
    return "; ".join(dict.fromkeys(values))
